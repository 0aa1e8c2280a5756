"""The certificates of compile workers and builder boards before their end: renewed by the real programs at the real controller."""

from __future__ import annotations

import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_agent import enroll
from edgefleet_controller.compile import remote
from edgefleet_controller.pki import DEVICE_LIFE, CertificateAuthority
from edgefleet_controller.store.workers import RENEWED_KEPT
from edgefleet_shared import enrolling, work_renewal
from edgefleet_shared.certificates import validity
from edgefleet_shared.clock import ManualClock, SystemClock
from edgefleet_shared.errors import TransportError, TrustError
from edgefleet_shared.work import IDENTITY_PREFIX
from edgefleet_shared.work_client import WorkClient
from support import workers
from support.broker import until
from support.fleet import FLEET, Fleet, device_class

AGED_S = 0.75 * DEVICE_LIFE.total_seconds()
NOW = SystemClock().now()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet")).start(EDGEFLEET_COMPILE_WORKERS="0")
    made.client().put_class(device_class("pc"))
    yield made
    made.close()


class Aged:
    """A worker that was enrolled some time ago; only the time is not real."""

    def __init__(self, fleet: Fleet, folder: Path, name: str, device_class: str = "") -> None:
        self.fleet, self.folder, self.name = fleet, folder, name
        token = fleet.client().token(device_class, device=name, role="worker")
        url, kind = f"https://127.0.0.1:{fleet.api_port}", "agent" if device_class else "worker"
        if device_class:
            enroll.enroll(folder, url, token)
        else:
            remote.enrol(folder, url, token)
        self.certificate, self.key = folder / "identity" / f"{kind}.pem", folder / "identity" / f"{kind}.key"
        key = serialization.load_pem_private_key(self.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        then = CertificateAuthority(fleet.home / "ca", ManualClock(NOW - AGED_S))
        aged = then.renew(x509.load_pem_x509_certificate(self.certificate.read_bytes()))
        self.certificate.write_bytes(aged.public_bytes(serialization.Encoding.PEM))
        with sqlite3.connect(fleet.home / "edgefleet.db") as database:
            database.execute(
                "UPDATE worker SET certificate_serial = ?, enrolled_at = ? WHERE name = ?",
                (f"{aged.serial_number:x}", NOW - AGED_S, name),
            )
        database.close()

    def client(self, port: int = 0) -> WorkClient:
        return WorkClient(
            "127.0.0.1", port or self.fleet.api_port,
            ca=self.folder / "identity" / "ca.pem", certificate=self.certificate, key=self.key,
        )  # fmt: skip

    def is_young(self) -> bool:
        return validity(self.certificate)[1] > NOW + 0.9 * DEVICE_LIFE.total_seconds()

    def renew(self) -> str:
        return enrolling.renew(
            "127.0.0.1", self.fleet.api_port, self.client().tls,
            self.certificate.read_bytes(), (self.folder / "identity" / "ca.pem").read_bytes(),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["compiles", "measures"])
def test_a_worker_renews_its_certificate_by_itself_and_goes_on_with_the_new_one(
    fleet: Fleet, tmp_path: Path, kind: str
) -> None:
    aged = Aged(fleet, tmp_path / kind, f"aged-{kind}", "" if kind == "compiles" else "pc")
    before = aged.certificate.read_bytes()
    command = {
        "compiles": [*FLEET, "worker", "run", "--folder", str(aged.folder)],
        "measures": [*workers.AGENT, "measure", "--state", str(aged.folder)],
    }[kind]
    running = workers.Process(command, tmp_path / "log", EDGEFLEET_CACHE=str(tmp_path / "cache"))
    try:
        until(aged.is_young, f"a new certificate, see {running.log_file}", 60)
        until(lambda: "certificate renewed" in running.log(), "that is told", 20)
        # What it was given counts, and it is the one that it shows: what it was enrolled with is taken from it here.
        with sqlite3.connect(fleet.home / "edgefleet.db") as database:
            database.execute("UPDATE worker SET certificate_serial = '0', last_seen = 0 WHERE name = ?", (aged.name,))
        database.close()
        until(lambda: {w["name"]: w["last_seen"] for w in fleet.client().workers()}[aged.name] > 0, "it asks", 30)
        assert running.process.poll() is None
    finally:
        assert running.end(signal.SIGTERM) == 0, running.log()
    assert aged.certificate.read_bytes() != before


def test_a_worker_whose_new_certificate_was_lost_on_the_way_asks_again_by_the_old_one(
    fleet: Fleet, tmp_path: Path
) -> None:
    aged = Aged(fleet, tmp_path / "w", "cut-off")
    given = [aged.renew(), aged.renew()]
    assert aged.client().claim() is None, "the old one counts until the new one was shown to be there"
    # A request that nobody waited for any longer may be carried out after the one that took its place: the worker has either.
    for kept in reversed(given):
        aged.certificate.write_text(kept)
        assert aged.client().claim() is None


def test_a_worker_that_asks_over_and_over_is_let_in_by_the_last_ones_it_was_given(fleet: Fleet, tmp_path: Path) -> None:
    aged = Aged(fleet, tmp_path / "w", "over-and-over")
    given = [aged.renew() for _ in range(2 * RENEWED_KEPT)]
    for kept, counts in ((given[0], False), (given[-RENEWED_KEPT], True), (given[-1], True)):
        aged.certificate.write_text(kept)
        if counts:
            assert aged.client().claim() is None
        else:
            with pytest.raises(TrustError, match="no worker of this fleet"):
                aged.client().claim()


def test_a_worker_that_has_used_its_new_certificate_loses_the_old_one_with_the_next(
    fleet: Fleet, tmp_path: Path
) -> None:
    aged = Aged(fleet, tmp_path / "w", "twice")
    old = aged.certificate.read_bytes()
    aged.certificate.write_text(aged.renew())
    with fleet.http(certificate=(str(aged.certificate), str(aged.key))) as http:  # a worker wants one that ends later
        aged.certificate.write_text(http.post("/v1/renew").json()["certificate"])
    assert aged.client().claim() is None
    aged.certificate.write_bytes(old)
    with pytest.raises(TrustError, match="no worker of this fleet"):
        aged.client().claim()


def test_a_builder_board_without_a_clock_renews_by_the_controllers(fleet: Fleet, tmp_path: Path) -> None:
    aged = Aged(fleet, tmp_path / "w", "no-clock", "pc")
    client, in_the_past = aged.client(), NOW - 3 * DEVICE_LIFE.total_seconds()
    assert not client.renewal_is_due(in_the_past), "it has heard of nobody yet"
    client.claim()
    assert client.renewal_is_due(in_the_past)
    client.adopt(aged.renew())
    client.claim()
    assert not client.renewal_is_due(in_the_past)


@pytest.mark.parametrize("again", [False, True], ids=["revoked", "enrolled anew"])
def test_attack_a_worker_that_was_revoked_gets_no_other_certificate(fleet: Fleet, tmp_path: Path, again: bool) -> None:
    aged = Aged(fleet, tmp_path / "w", f"taken-{int(again)}")
    renewed = aged.renew()
    fleet.client().revoke_worker(aged.name)
    if again:
        answer, _ = fleet.enroll(fleet.client().token("", device=aged.name, role="worker"))
        assert answer.status_code == 200
    for _ in range(2):
        with pytest.raises(TrustError, match="no worker of this fleet"):
            aged.renew()
        aged.certificate.write_text(renewed)


def test_attack_a_workers_certificate_is_renewed_as_a_workers(fleet: Fleet, tmp_path: Path) -> None:
    aged = Aged(fleet, tmp_path / "w", "prefixed")
    fleet.board("prefixed")  # a board may have the same name
    renewed = x509.load_pem_x509_certificate(aged.renew().encode())
    assert renewed.subject.rfc4514_string() == f"CN={IDENTITY_PREFIX}prefixed"


def test_a_worker_that_can_not_renew_goes_on_and_gets_there_when_it_can(fleet: Fleet, tmp_path: Path) -> None:
    aged, stopping, asked = Aged(fleet, tmp_path / "w", "patient"), threading.Event(), list[float]()

    def renew() -> str:
        asked.append(0)
        if len(asked) < 3:
            raise (TransportError("can't reach the controller"), FileNotFoundError("ca.pem"))[len(asked) - 1]
        return aged.renew()

    keeping = threading.Thread(
        target=work_renewal.keep_renewed, args=(stopping, aged.client(), renew), kwargs={"look_s": 0.01}
    )
    keeping.start()
    until(aged.is_young, "a new certificate", 20)
    stopping.set()
    keeping.join(20)
    assert not keeping.is_alive()
    assert len(asked) == 3


def test_a_worker_that_was_revoked_or_came_too_late_is_enrolled_again_by_another_token(
    fleet: Fleet, tmp_path: Path
) -> None:
    folder, url = tmp_path / "w", f"https://127.0.0.1:{fleet.api_port}"
    first = fleet.client().token("", device="again", role="worker")

    def start(token: str) -> workers.Process:
        command = [*FLEET, "worker", "run", "--controller", url, "--token", token, "--folder", str(folder)]
        log = tmp_path / "log"
        log.write_text("")
        return workers.Process(command, log, EDGEFLEET_CACHE=str(tmp_path / "cache"))

    assert start(first).until_ready().end() == 0
    assert start(first).until_ready().end() == 0, "the service gives it at each start"
    fleet.client().revoke_worker("again")
    refused = start(first)
    assert refused.process.wait(60) == 1
    assert "another token" in refused.log()
    stranger = fleet.client().token("", device="another", role="worker")
    taken = start(stranger)
    assert taken.process.wait(60) != 0
    assert "the token is for another, not for again" in taken.log()
    anew = start(fleet.client().token("", device="again", role="worker"))
    anew.until_ready()
    until(lambda: not {w["name"]: w["revoked"] for w in fleet.client().workers()}["again"], "it is one again", 30)
    assert anew.process.poll() is None
    assert anew.end() == 0
