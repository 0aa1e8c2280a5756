"""An enrolment whose answer was cut off: the same token and the same key get the same answer, and nobody else gets any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_agent import enroll
from edgefleet_agent import settings as board_settings
from edgefleet_controller.enrolment import Enrolment
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.settings import Settings
from edgefleet_controller.sign import Repository, make_key
from edgefleet_controller.store import devices
from edgefleet_controller.store.database import Database
from edgefleet_controller.transport.broker import CONTROLLER
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.errors import InputError, TrustError
from sqlmodel import Session

TOKEN_LIFE_S = 3600.0


class Office:
    """The controller's side of an enrolment."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.database = Database(f"sqlite:///{folder}/fleet.db")
        self.database.migrate()
        with self.database.write() as session:
            devices.put_class(session, "pc", "{}", 1.0)
        keys = [make_key(folder / f"{name}.pem") for name in ("snapshot", "timestamp")]
        repository = Repository(folder / "repository", keys[0], keys[1], self.clock)
        (folder / "repository" / "1.root.json").write_bytes(b"{}")
        ca = CertificateAuthority.create(folder / "ca", self.clock)
        self.enrolment = Enrolment(self.database, ca, repository, Settings(home=folder), self.clock)

    def token(self, role: str = "device") -> str:
        return self.enrolment.token("pc", site="", device="b1", ttl_s=TOKEN_LIFE_S, role=role)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def request(key: ec.EllipticCurvePrivateKey) -> str:
    built = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return built.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize("role", ["device", "worker"])
def test_a_board_that_was_cut_off_before_it_kept_its_answer_gets_it_again(
    office: Office, tmp_path: Path, role: str
) -> None:
    token, state = office.token(role), tmp_path / "board"
    lost = office.enrolment.enroll(token, "b1", request(enroll.prepare(state)))
    again = office.enrolment.enroll(token, "b1", request(enroll.prepare(state)))
    assert again == lost
    enroll.keep(state, again, again.ca, threads=1, health_period_s=10.0)
    assert board_settings.read(state).device == "b1"


def test_a_key_that_was_torn_is_made_anew(tmp_path: Path) -> None:
    first = enroll.prepare(tmp_path)
    (tmp_path / "identity" / "agent.key").write_bytes(b"-----BEGIN PRIV")
    assert enroll.prepare(tmp_path).private_numbers() != first.private_numbers()


def test_attack_a_spent_token_in_other_hands_is_refused(office: Office, tmp_path: Path) -> None:
    token = office.token()
    office.enrolment.enroll(token, "b1", request(enroll.prepare(tmp_path / "board")))
    with pytest.raises(TrustError, match="not valid"):
        office.enrolment.enroll(token, "b1", request(enroll.prepare(tmp_path / "thief")))


def test_attack_a_board_that_calls_itself_the_controller_gets_no_certificate_of_that_name(
    office: Office, tmp_path: Path
) -> None:
    token = office.enrolment.token("pc", site="", device="", ttl_s=TOKEN_LIFE_S)
    with pytest.raises(InputError, match="the controller's own name"):
        office.enrolment.enroll(token, CONTROLLER, request(enroll.prepare(tmp_path)))
    with pytest.raises(InputError, match="the controller's own name"):
        office.enrolment.token("pc", site="", device=CONTROLLER, ttl_s=TOKEN_LIFE_S)


def revoke_device(session: Session) -> None:
    devices.revoke(session, "b1")


def renew_device(session: Session) -> None:
    devices.renew(session, "b1", "1f")


@pytest.mark.parametrize("change", [revoke_device, renew_device])
def test_attack_what_was_revoked_or_renewed_meanwhile_is_not_given_again(
    office: Office, tmp_path: Path, change: Callable[[Session], None]
) -> None:
    token, key = office.token(), enroll.prepare(tmp_path / "board")
    office.enrolment.enroll(token, "b1", request(key))
    with office.database.write() as session:
        change(session)
    with pytest.raises(TrustError, match="not valid"):
        office.enrolment.enroll(token, "b1", request(key))


def test_a_token_that_expired_gives_nothing_again(office: Office, tmp_path: Path) -> None:
    token, key = office.token(), enroll.prepare(tmp_path / "board")
    office.enrolment.enroll(token, "b1", request(key))
    office.clock.advance(TOKEN_LIFE_S + 1)
    with pytest.raises(TrustError, match="not valid"):
        office.enrolment.enroll(token, "b1", request(key))
