"""Whose word a result is, of a model as of the agent's own update: one attack each. The broker, and whoever holds it, can repeat and
invent; it can't speak for a board."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.results import Holder, Proof, ResultVerifier, Standing
from edgefleet_shared import results
from edgefleet_shared.assignment import Subject
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.contract import AcceptanceFigures, AcceptanceReport, Verdict
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import AgentReport, Ended, Reported, SignedResult
from edgefleet_shared.outcomes import Outcome
from support.signing import BoardKey

ENROLLED_AT = 1_750_000_000.0
SUCCEEDED = Ended(assignment="r.b1.1", manifest="sha256:2", outcome=Outcome.SUCCEEDED, at=ENROLLED_AT + 50, number=4)
FAILED = msgspec.structs.replace(SUCCEEDED, outcome=Outcome.FAILED_ROLLED_BACK, reason="it died")


class Office:
    """A CA, board b1's key, and the controller's verifier, asked about results of one subject."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        self.subject = subject
        self.clock = ManualClock(ENROLLED_AT)
        self.ca = CertificateAuthority.create(folder / "ca", self.clock)
        self.key = BoardKey.enrolled(self.ca, "b1")
        self.verifier = ResultVerifier(self.ca.certificate)

    def judge(
        self,
        ended: Ended | None,
        result: SignedResult | None,
        proof: Proof | None = None,
        enrolled_at: float = ENROLLED_AT,
    ) -> Proof:
        report: Reported | AgentReport = AgentReport(ended=ended, result=result)
        if self.subject is Subject.MODEL:
            report = Reported(
                device="b1", device_class="x86", boot="boot", at=0.0, state=State.IDLE, agent_version="1",
                fingerprint=Fingerprint(arch="x86_64"), ended=ended, result=result,
            )  # fmt: skip
        holder = Holder(device="b1", enrolled_at=enrolled_at, subject=self.subject, proof=proof or Proof())
        return self.verifier.judge(report, holder)

    def sign(self, ended: Ended, key: BoardKey | None = None) -> SignedResult:
        return (key or self.key).sign(ended, self.subject)

    def refused(self, *case: object, **more: object) -> str:
        """Why it is refused; it must be."""
        proof = self.judge(*case, **more)  # type: ignore[arg-type]
        assert proof.standing is Standing.REFUSED
        return proof.why


@pytest.fixture(params=Subject)
def office(tmp_path: Path, request: pytest.FixtureRequest) -> Office:
    return Office(tmp_path, request.param)


def test_a_result_signed_by_the_boards_own_key_is_its_word(office: Office) -> None:
    proof = office.judge(SUCCEEDED, office.sign(SUCCEEDED))
    assert proof.standing is Standing.SIGNED
    assert proof.serial
    assert office.judge(SUCCEEDED, office.sign(SUCCEEDED), proof).standing is Standing.SIGNED, "told again"


def test_it_survives_the_wire_to_the_byte(office: Office) -> None:
    signed = msgspec.json.decode(msgspec.json.encode(office.sign(SUCCEEDED)), type=SignedResult)
    assert office.judge(SUCCEEDED, signed).standing is Standing.SIGNED


def test_a_renewed_certificate_speaks_for_the_same_board(office: Office) -> None:
    office.clock.advance(100 * 86_400)
    assert (
        office.judge(SUCCEEDED, office.sign(SUCCEEDED, BoardKey.enrolled(office.ca, "b1"))).standing is Standing.SIGNED
    )
    assert office.judge(SUCCEEDED, office.sign(SUCCEEDED)).standing is Standing.SIGNED, "signed before the renewal"


def test_a_report_that_is_too_long_to_be_signed_is_left_out_and_the_outcome_is_not() -> None:
    figures = AcceptanceFigures(
        golden_count=1, agreement=1, cosine=1, load_ms=1, first_ms=1, p50_ms=1, p95_ms=1, peak_memory_bytes=1,
        providers=("x" * 50_000,),
    )  # fmt: skip
    report = AcceptanceReport(verdict=Verdict.PASSED, figures=figures)
    long = msgspec.structs.replace(SUCCEEDED, acceptance=report, reason="r" * 10_000)
    fits = results.fitting("b1", long, Subject.AGENT)
    assert (fits.acceptance, fits.outcome, len(fits.reason)) == (None, Outcome.SUCCEEDED, results.MAX_REASON)
    assert len(results.encode("b1", fits, Subject.AGENT)) <= results.MAX_PAYLOAD_BYTES
    assert results.fitting("b1", SUCCEEDED, Subject.AGENT) == SUCCEEDED


def test_nothing_said_is_nothing_to_prove(office: Office) -> None:
    assert office.judge(None, None).standing is Standing.NONE
    holder = Holder(device="b1", enrolled_at=ENROLLED_AT, subject=Subject.AGENT)
    assert office.verifier.judge(None, holder).standing is Standing.NONE, "an agent that knows no line of its own"


def test_attack_no_signature(office: Office) -> None:
    assert office.judge(SUCCEEDED, None).standing is Standing.UNSIGNED


def test_attack_another_outcome_beside_a_good_signature(office: Office) -> None:
    assert "in the open" in office.refused(SUCCEEDED, office.sign(FAILED))


def test_attack_another_assignments_result(office: Office) -> None:
    other = msgspec.structs.replace(SUCCEEDED, assignment="r.b1.2")
    assert "in the open" in office.refused(other, office.sign(SUCCEEDED))


def test_attack_another_versions_result(office: Office) -> None:
    other = msgspec.structs.replace(SUCCEEDED, manifest="sha256:3")
    assert "in the open" in office.refused(other, office.sign(SUCCEEDED))


def test_attack_a_result_about_the_boards_other_line(office: Office) -> None:
    (other,) = set(Subject) - {office.subject}
    assert f"about the board's {other.value}" in office.refused(SUCCEEDED, office.key.sign(SUCCEEDED, other))


def test_attack_another_boards_result(office: Office) -> None:
    other = BoardKey.enrolled(office.ca, "b2")
    assert "another's" in office.refused(SUCCEEDED, office.sign(SUCCEEDED, other))


def test_attack_another_board_signs_in_this_ones_name(office: Office) -> None:
    other = BoardKey.enrolled(office.ca, "b2")
    claimed = other.sign_bytes(results.encode("b1", SUCCEEDED, office.subject))
    assert "another's" in office.refused(SUCCEEDED, claimed)
    with_our_certificate = msgspec.structs.replace(claimed, certificate=office.key.certificate)
    assert "signature" in office.refused(SUCCEEDED, with_our_certificate)


def test_attack_this_boards_key_on_another_boards_words(office: Office) -> None:
    assert "a result of b2" in office.refused(
        SUCCEEDED, office.key.sign_bytes(results.encode("b2", SUCCEEDED, office.subject))
    )


def test_attack_a_strangers_authority(office: Office, tmp_path: Path) -> None:
    stranger = CertificateAuthority.create(tmp_path / "stranger", office.clock)
    assert "none of this fleet's" in office.refused(
        SUCCEEDED, office.sign(SUCCEEDED, BoardKey.enrolled(stranger, "b1"))
    )


def test_attack_a_servers_certificate_with_a_boards_name(office: Office) -> None:
    office.ca.issue_server("b1", ("localhost",))
    key = BoardKey("b1", (office.ca.folder / "b1.pem").read_text(), (office.ca.folder / "b1.key").read_bytes())
    assert "another's" in office.refused(SUCCEEDED, office.sign(SUCCEEDED, key))


def test_attack_the_key_of_a_board_that_was_revoked_and_enrolled_again(office: Office) -> None:
    assert "earlier enrolment" in office.refused(SUCCEEDED, office.sign(SUCCEEDED), enrolled_at=ENROLLED_AT + 3600)


def test_attack_changed_bytes(office: Office) -> None:
    signed = office.sign(FAILED)
    content = base64.b64decode(signed.envelope.payload).replace(b"failed_rolled_back", b"succeeded")
    envelope = msgspec.structs.replace(signed.envelope, payload=base64.b64encode(content).decode())
    ended = results.decode(content).ended
    assert ended.outcome is Outcome.SUCCEEDED
    assert "signature" in office.refused(ended, msgspec.structs.replace(signed, envelope=envelope))


def test_attack_something_else_that_the_board_signed(office: Office) -> None:
    content = results.encode("b1", SUCCEEDED, office.subject)
    assert "not a result" in office.refused(SUCCEEDED, office.key.sign_bytes(content, "application/json"))
    relabelled = office.key.sign_bytes(content, "application/json")
    envelope = msgspec.structs.replace(relabelled.envelope, payload_type=results.PAYLOAD_TYPE)
    assert "signature" in office.refused(SUCCEEDED, msgspec.structs.replace(relabelled, envelope=envelope))
    assert "not a result" in office.refused(SUCCEEDED, office.key.sign_bytes(b'{"device": "b1"}'))


def test_attack_an_old_word_after_a_newer_one_about_the_same_assignment(office: Office) -> None:
    regressed = msgspec.structs.replace(
        SUCCEEDED, outcome=Outcome.LATE_REGRESSION, number=5, at=SUCCEEDED.at + 60, reason="it died"
    )
    proof = office.judge(regressed, office.sign(regressed))
    assert "older" in office.refused(SUCCEEDED, office.sign(SUCCEEDED), proof)
    later = office.judge(SUCCEEDED, None, proof)
    assert "older" in office.refused(SUCCEEDED, office.sign(SUCCEEDED), later), "not forgotten over a forgery"


def test_attack_an_older_assignments_word_in_between_makes_nobody_forget_the_newer(office: Office) -> None:
    earlier = msgspec.structs.replace(SUCCEEDED, assignment="r.b1.0", number=3, at=SUCCEEDED.at - 60)
    regressed = msgspec.structs.replace(
        SUCCEEDED, outcome=Outcome.LATE_REGRESSION, number=5, at=SUCCEEDED.at + 60, reason="it died"
    )
    proof = office.judge(regressed, office.sign(regressed))
    between = office.judge(earlier, office.sign(earlier), proof)
    assert between.standing is Standing.SIGNED
    assert "older" in office.refused(SUCCEEDED, office.sign(SUCCEEDED), between)


def test_a_board_whose_clock_fell_back_or_whose_count_began_anew_is_still_heard(office: Office) -> None:
    proof = office.judge(SUCCEEDED, office.sign(SUCCEEDED))
    for change in ({"number": 5, "at": SUCCEEDED.at - 1000}, {"number": 1, "at": SUCCEEDED.at + 10}):
        said = msgspec.structs.replace(SUCCEEDED, outcome=Outcome.LATE_REGRESSION, **change)
        assert office.judge(said, office.sign(said), proof).standing is Standing.SIGNED


@pytest.mark.parametrize("number", range(200))
def test_rubbish_is_refused_and_breaks_nothing(office: Office, number: int) -> None:
    signed = bytearray(msgspec.json.encode(office.sign(SUCCEEDED)))
    place = number * 9973 % len(signed)
    signed[place] = (signed[place] + 1 + number) % 256
    try:
        changed = msgspec.json.decode(bytes(signed), type=SignedResult)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    proof = office.judge(SUCCEEDED, changed)
    # White space in a PEM, and a hint that nobody goes by, may change without harm.
    assert proof.standing is Standing.REFUSED or changed.envelope.payload == office.sign(SUCCEEDED).envelope.payload
