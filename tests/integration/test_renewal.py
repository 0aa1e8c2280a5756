"""A board's certificate before its end: renewed by the real agent at the real controller, and by nobody who may not have one."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_agent import enroll, renewal
from edgefleet_agent import settings as board_settings
from edgefleet_agent.ports import Ports
from edgefleet_agent.renewal import ChildRenewer, Renewal
from edgefleet_controller.pki import DEVICE_LIFE, CertificateAuthority
from edgefleet_controller.transport.broker import CONTROLLER
from edgefleet_shared import atomic
from edgefleet_shared.certificates import validity
from edgefleet_shared.clock import ManualClock, SystemClock
from edgefleet_shared.errors import ConflictError, TransportError
from edgefleet_shared.files import DISK
from edgefleet_shared.mqtt import Endpoint, Link
from support.broker import TestBroker, until
from support.fleet import Fleet, device_class

DAY_S = 86_400.0
NOW = SystemClock().now()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet")).start()
    made.client().put_class(device_class("pc"))
    yield made
    made.close()


class Board:
    """A board that was enrolled some time ago; only the time is not real."""

    def __init__(
        self, fleet: Fleet, folder: Path, name: str, age_s: float = 0.75 * DEVICE_LIFE.total_seconds()
    ) -> None:
        self.fleet, self.state, self.name = fleet, folder, name
        token = fleet.client().token("pc", device=name)
        enroll.enroll(folder, f"https://127.0.0.1:{fleet.api_port}", token)
        self.settings = board_settings.read(folder)
        self.certificate = folder / "identity" / "agent.pem"
        then = CertificateAuthority(fleet.home / "ca", ManualClock(NOW - age_s))
        key = serialization.load_pem_private_key((folder / "identity" / "agent.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        aged = then.enroll(request(key), name)
        self.certificate.write_bytes(aged.public_bytes(serialization.Encoding.PEM))
        self.set(enrolled_at=NOW - age_s)

    def set(self, **values: object) -> None:
        """Change the board's row in the controller's database."""
        with sqlite3.connect(self.fleet.home / "edgefleet.db") as database:
            for column, value in values.items():
                database.execute(f"UPDATE device SET {column} = ? WHERE name = ?", (value, self.name))
        database.close()

    def ends(self) -> float:
        return validity(self.certificate)[1]


def request(key: ec.EllipticCurvePrivateKey) -> bytes:
    built = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return built.public_bytes(serialization.Encoding.PEM)


def test_an_agent_renews_its_certificate_by_itself_and_goes_on_with_the_new_one(fleet: Fleet, tmp_path: Path) -> None:
    board = Board(fleet, tmp_path, "aged-1")
    before = board.certificate.read_bytes()
    with (tmp_path / "agent.log").open("ab") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "edgefleet_agent.cli", "run", "--state", str(tmp_path)], stdout=log, stderr=log
        )
    try:
        until(lambda: board.certificate.read_bytes() != before, "a new certificate", 60)
        assert board.ends() > NOW + 360 * DAY_S
        until(lambda: bool(fleet.client().device("aged-1")["online"]), "the board is online", 60)
    finally:
        agent.terminate()
        agent.wait(30)
    # The API knows it by the new one, which belongs to the same key; the old one is still good, should the new one get lost.
    identity = (str(board.certificate), str(tmp_path / "identity" / "agent.key"))
    for certificate in (board.certificate.read_bytes(), before):
        board.certificate.write_bytes(certificate)
        with fleet.http(certificate=identity) as http:
            assert http.get("/v1/repo/timestamp.json").status_code == 200
    assert fleet.client().device("aged-1")["problem"] == ""


def revoked(board: Board) -> None:
    board.set(revoked=1)


def enrolled_anew(board: Board) -> None:
    board.set(enrolled_at=NOW)


@pytest.mark.parametrize(
    ("change", "why"), [(revoked, "revoked"), (enrolled_anew, "enrolled anew")], ids=["revoked", "enrolled anew"]
)
def test_attack_a_certificate_that_counts_for_nothing_any_more_is_not_renewed(
    fleet: Fleet, tmp_path: Path, change: Callable[[Board], None], why: str
) -> None:
    board = Board(fleet, tmp_path, f"taken-{why.replace(' ', '-')}")
    change(board)
    with fleet.http(certificate=(str(board.certificate), str(tmp_path / "identity" / "agent.key"))) as http:
        answer = http.post("/v1/renew")
    assert answer.status_code == 403
    assert why in answer.json()["message"]


def test_attack_nobody_but_a_board_has_a_certificate_renewed(fleet: Fleet) -> None:
    own = {
        n: (str(fleet.home / "ca" / f"{n}.pem"), str(fleet.home / "ca" / f"{n}.key")) for n in (CONTROLLER, "server")
    }
    with fleet.http(certificate=own[CONTROLLER]) as http:
        assert http.post("/v1/renew").status_code == 404
    with fleet.http(certificate=own["server"]) as http, pytest.raises(httpx.TransportError):  # it is for no client
        http.post("/v1/renew")
    with fleet.http() as http:
        assert http.post("/v1/renew").status_code == 403


class SetClock(ManualClock):
    """One that somebody sets, ``set_s`` ahead, while time passes as ever."""

    set_s = 0.0

    def now(self) -> float:
        return super().now() + self.set_s


class Looked:
    """A board's renewal, looked at by hand."""

    def __init__(self, board: Board, settings: board_settings.Settings | None = None) -> None:
        self.problems: list[str] = []
        self.clock = SetClock(NOW)
        ports = Ports(
            uplink=None, runtime=None, examiner=None, signer=None, clock=self.clock, files=DISK,
            spawn=lambda name, work: work(),
        )  # fmt: skip
        renewer = ChildRenewer(board.state, settings or board.settings)
        self.renewal = Renewal(board.state, renewer, ports, self.problems.append)


def test_a_certificate_in_the_first_two_thirds_of_its_life_is_left_alone(fleet: Fleet, tmp_path: Path) -> None:
    board = Board(fleet, tmp_path, "young-1", age_s=0.6 * DEVICE_LIFE.total_seconds())
    before, looked = board.certificate.read_bytes(), Looked(board)
    for _ in range(3):
        looked.renewal.turn()
        looked.clock.advance(renewal.LOOK_S)
    assert board.certificate.read_bytes() == before
    assert looked.problems == []


def test_a_board_that_can_not_renew_says_why_asks_ever_more_seldom_and_gets_there(fleet: Fleet, tmp_path: Path) -> None:
    board = Board(fleet, tmp_path, "cut-off-1")
    before = board.certificate.read_bytes()
    looked = Looked(board, msgspec.structs.replace(board.settings, api_port=1))
    for _ in range(8):  # asks at 0, 2 and 5 minutes; what came of it is looked at with the next turn
        looked.renewal.turn()
        looked.clock.advance(renewal.LOOK_S)
    assert len(looked.problems) == 3
    assert "could not be renewed" in looked.problems[-1]
    assert "can't reach the controller" in looked.problems[-1]
    assert board.certificate.read_bytes() == before
    again = Looked(board)
    again.renewal.turn()
    again.renewal.turn()
    assert again.problems == [""]
    assert board.ends() > NOW + 360 * DAY_S


def test_a_board_whose_clock_runs_ahead_does_not_renew_all_the_time(fleet: Fleet, tmp_path: Path) -> None:
    board = Board(fleet, tmp_path, "ahead-1")
    looked = Looked(board)
    looked.clock.advance(0.9 * DEVICE_LIFE.total_seconds())
    looked.renewal.turn()
    renewed = board.certificate.read_bytes()
    for _ in range(5):
        looked.renewal.turn()
        looked.clock.advance(renewal.LOOK_S)
    assert board.certificate.read_bytes() == renewed


def test_what_stood_in_the_way_is_told_no_longer_once_the_clock_is_right_again(fleet: Fleet, tmp_path: Path) -> None:
    board = Board(fleet, tmp_path, "back-1", age_s=0.0)
    looked = Looked(board, msgspec.structs.replace(board.settings, api_port=1))
    looked.clock.set_s = 3 * DEVICE_LIFE.total_seconds()
    for _ in range(2):
        looked.renewal.turn()
    assert len(looked.problems) == 1
    looked.clock.set_s = 0.0
    for _ in range(3):
        looked.clock.advance(renewal.LOOK_S)
        looked.renewal.turn()
    assert looked.problems[1:] == [""]


def test_a_board_whose_certificate_has_ended_is_enrolled_again_and_keeps_what_it_has(
    fleet: Fleet, tmp_path: Path
) -> None:
    board = Board(fleet, tmp_path, "ended-1", age_s=1.1 * DEVICE_LIFE.total_seconds())
    (tmp_path / "slots.json").write_bytes(b"what serves")
    board_settings.write(tmp_path, msgspec.structs.replace(board.settings, threads=3))
    url = f"https://127.0.0.1:{fleet.api_port}"
    fleet.client().revoke_device("ended-1")
    token = fleet.client().token("pc")
    with pytest.raises(ConflictError, match="enrolled already") as refused:
        enroll.enroll(tmp_path, url, token)
    assert "--again" in refused.value.hint
    with pytest.raises(ConflictError, match="is ended-1"):  # floors and slots are that board's
        enroll.enroll(tmp_path, url, token, "another-1", again=True)
    with atomic.lock(tmp_path, "fleet-agent"), pytest.raises(ConflictError, match="in use by fleet-agent"):
        enroll.enroll(tmp_path, url, token, again=True)
    key = (tmp_path / "identity" / "agent.key").read_bytes()
    enroll.enroll(tmp_path, url, token, again=True)
    assert board_settings.read(tmp_path) == msgspec.structs.replace(board.settings, threads=3)
    assert (tmp_path / "identity" / "agent.key").read_bytes() == key
    assert (tmp_path / "slots.json").read_bytes() == b"what serves"
    assert board.ends() > NOW + 360 * DAY_S
    with fleet.http(certificate=(str(board.certificate), str(tmp_path / "identity" / "agent.key"))) as http:
        assert http.get("/v1/repo/timestamp.json").status_code == 200


def test_a_board_of_another_fleet_is_not_enrolled_again_over_what_that_one_signed(fleet: Fleet, tmp_path: Path) -> None:
    board = Board(fleet, tmp_path / "board", "moved-1")
    kept = {p: p.read_bytes() for p in board.state.rglob("*") if p.is_file() and p.name != ".lock"}
    (tmp_path / "other").mkdir()
    other = Fleet(tmp_path / "other").start()
    try:
        other.client().put_class(device_class("pc"))
        token, url = other.client().token("pc", device="moved-1"), f"https://127.0.0.1:{other.api_port}"
        with pytest.raises(ConflictError, match="another fleet"):
            enroll.enroll(board.state, url, token, again=True)
        assert {p: p.read_bytes() for p in kept} == kept
        enroll.enroll(tmp_path / "anew", url, token)  # it was not used up
    finally:
        other.close()


def test_a_board_whose_enrolment_is_damaged_is_enrolled_over_it(fleet: Fleet, tmp_path: Path) -> None:
    Board(fleet, tmp_path, "damaged-1")
    (tmp_path / "agent.json").write_bytes(b'{"device": "dam')
    fleet.client().revoke_device("damaged-1")
    enroll.enroll(tmp_path, f"https://127.0.0.1:{fleet.api_port}", fleet.client().token("pc", device="damaged-1"))
    assert board_settings.read(tmp_path).device == "damaged-1"


def test_the_next_connection_shows_the_certificate_that_is_there_then(tmp_path: Path) -> None:
    running = TestBroker(tmp_path / "ours")
    running.broker.start()
    known, strange = running.endpoint("b1"), TestBroker(tmp_path / "another").endpoint("b1")
    endpoint = Endpoint(
        host=known.host, port=known.port, ca=known.ca, certificate=tmp_path / "b.pem", key=tmp_path / "b.key"
    )
    for source, target in ((strange.certificate, endpoint.certificate), (strange.key, endpoint.key)):
        target.write_bytes(source.read_bytes())
    downs: list[str] = []
    link = Link(endpoint, "b1", on_message=lambda topic, payload: None, on_down=downs.append)
    link.start()
    try:
        until(lambda: bool(downs), "a refused attempt")
        endpoint.certificate.write_bytes(
            known.certificate.read_bytes()
        )  # a moment in which the two do not belong together
        until(lambda: any("can't be used" in why for why in downs), "that is told")
        endpoint.key.write_bytes(known.key.read_bytes())
        until(link.connected.is_set, "the connection by the certificate that is there now", 60)
    finally:
        link.stop()
        running.broker.stop()


def test_a_certificate_that_is_damaged_is_told(fleet: Fleet, tmp_path: Path) -> None:
    board = Board(fleet, tmp_path, "torn-1")
    board.certificate.write_bytes(board.certificate.read_bytes()[:100])
    looked = Looked(board)
    looked.renewal.turn()
    assert len(looked.problems) == 1
    assert "agent.pem can't be read" in looked.problems[0]
    with pytest.raises(TransportError):
        board_settings.endpoint(tmp_path, board.settings).tls()
