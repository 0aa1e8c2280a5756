"""Which assignment a board takes up: each is decided about, a refusal is not for ever, and nothing is told twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from edgefleet_agent.admission import Admissions
from edgefleet_agent.inbox import AdmissionDone
from edgefleet_agent.journal import Keeper
from edgefleet_agent.ports import Ports
from edgefleet_agent.settings import Settings
from edgefleet_agent.verify import AdmitRequest, Refusal
from edgefleet_shared import atomic
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import Admission, Assignment, Subject
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.errors import TrustError
from edgefleet_shared.files import DISK
from edgefleet_shared.fingerprint import Fingerprint, Requirement
from edgefleet_shared.lifecycle import Life, State
from edgefleet_shared.messages import Ended, Refused
from edgefleet_shared.outcomes import Outcome

ROOT = msgspec.json.encode({"signed": {"version": 1}})
STALE = TrustError("timestamp", "timestamp.json is expired")
ASSIGNMENT = Assignment(
    id="a1", device="b1", device_class="c", rollout="r", model="m", version="1", manifest="sha256:" + "1" * 64, size=9,
    issued_at=1,
)  # fmt: skip


class Uplink:
    followed: tuple[str, ...] = ()

    def follow_metadata(self, files: tuple[str, ...]) -> None:
        self.followed = files


class SteppedClock(ManualClock):
    """One that can be set, as a time server does."""

    def step(self, seconds: float) -> None:
        monotonic = self.monotonic()
        self.advance(seconds)
        self.monotonic = lambda: monotonic  # type: ignore[method-assign]


class Board:
    """The admissions of a board; what the verifying child says is set by hand, and said at once."""

    def __init__(self, state: Path) -> None:
        self.state = state
        for folder in ("trust", "metadata"):
            atomic.make_folder(state / folder)
        atomic.write(state / "trust" / "root.json", ROOT)
        self.says: TrustError | None = STALE
        self.named = ""
        self.uplink, self.reached, self.clock = Uplink(), b"", SteppedClock()
        self.asked = 0
        self.told: list[Any] = []
        self.ended: list[Ended] = []
        self.start()

    def start(self) -> None:
        """The agent starts (again), and its line comes up."""
        self.keeper = Keeper(self.state, DISK)
        self.keeper.load()
        self.inbox: list[AdmissionDone] = []
        ports = Ports(
            uplink=cast(Any, self.uplink), runtime=cast(Any, None), examiner=cast(Any, self), signer=cast(Any, None),
            clock=self.clock, files=DISK, spawn=lambda name, work: work(),
        )  # fmt: skip
        self.admissions = Admissions(
            self.state, Settings(device="b1", device_class="c", site="", broker_host="b", broker_port=1),
            Fingerprint(arch="x86_64"), self.keeper, ports, tell=self.told.append, tell_result=self.ended.append,
            put=cast(Any, self.inbox.append), problem=lambda what, why: None, subject=Subject.MODEL,
            deciding=threading.Lock(),
        )  # fmt: skip
        self.admissions.begin()
        self.metadata(b"timestamp 1")

    def admit(self, request: AdmitRequest) -> Admission:
        self.asked += 1
        if self.says is not None:
            raise Refusal(self.says, self.named, self.reached)
        return Admission(
            assignment=ASSIGNMENT, desired=digest_of(request.desired), requires=Requirement(), floors=request.floors,
            root=ROOT,
        )  # fmt: skip

    def desire(self, content: bytes = b"an assignment") -> None:
        self.admissions.desire(content)
        self.turn()

    def metadata(self, content: bytes) -> None:
        self.admissions.take_metadata("timestamp.json", content)
        self.turn()

    def turn(self) -> None:
        while self.inbox:
            self.admissions.done(self.inbox.pop(0))


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_what_was_refused_for_stale_metadata_is_taken_up_once_they_are_renewed(board: Board) -> None:
    board.desire()
    assert board.keeper.now.refusal == str(STALE)
    board.says = None
    board.metadata(b"timestamp 2")
    assert board.keeper.now.pending == ASSIGNMENT
    assert board.keeper.now.refusal == ""


def test_what_was_refused_is_looked_at_once_more_after_a_start(board: Board) -> None:
    board.desire()
    board.says = None
    board.start()
    board.desire()  # retained, it comes again
    assert board.keeper.now.pending == ASSIGNMENT


@pytest.mark.parametrize(("seconds", "looks"), [(-30 * 365 * 86_400.0, True), (86_400.0, True), (1.0, False)])
def test_what_was_refused_is_looked_at_again_once_the_clock_was_set(board: Board, seconds: float, looks: bool) -> None:
    board.desire()
    asked = board.asked
    board.admissions.tick()
    assert board.asked == asked
    board.says = None
    board.clock.step(seconds)
    for _ in range(3):
        board.admissions.tick()
        board.turn()
    assert board.asked == asked + looks
    assert (board.keeper.now.pending == ASSIGNMENT) is looks


def test_a_refusal_that_stands_is_told_once(board: Board) -> None:
    board.says, board.named = TrustError("agreement", "m 1 is not released"), "a1"
    board.desire()
    board.metadata(b"timestamp 2")
    board.metadata(b"timestamp 3")
    assert board.asked == 3
    assert [type(event) for event in board.told] == [Refused]
    assert [ended.outcome for ended in board.ended] == [Outcome.REJECTED]


def test_an_assignment_that_ended_is_not_told_to_have_ended_again_when_it_is_refused_later(board: Board) -> None:
    done = Ended(assignment="a1", manifest="", outcome=Outcome.SUCCEEDED, reason="", at=1.0, number=1)
    board.keeper.keep(ended=done)
    board.says, board.named = TrustError("fingerprint", "engine onnxruntime is not on this board"), "a1"
    board.desire(b"the same, signed anew")
    assert board.keeper.now.refusal
    assert board.keeper.now.ended == done
    assert board.ended == []


def test_an_assignment_that_is_at_work_is_not_told_to_have_ended_when_it_is_refused_anew(board: Board) -> None:
    board.keeper.keep(assignment=ASSIGNMENT, life=Life(State.SOAKING))
    board.says, board.named = TrustError("fingerprint", "engine onnxruntime is not on this board"), "a1"
    board.desire(b"the same, signed anew")
    assert board.keeper.now.refusal
    assert board.ended == []
    assert board.keeper.now.ended is None


def test_attack_a_broker_can_not_fill_the_disk_with_metadata_that_nobody_asked_for(board: Board) -> None:
    for number in range(20):
        board.admissions.take_metadata(f"junk-{number}.json", bytes(1000))
    board.admissions.take_metadata("2.root.json", b"the next root")
    assert sorted(path.name for path in (board.state / "metadata").iterdir()) == ["2.root.json", "timestamp.json"]


def test_attack_a_next_root_that_nobody_signed_is_gone_once_it_was_refused(board: Board) -> None:
    board.admissions.take_metadata("2.root.json", b"junk")
    board.says = TrustError("root_chain", "Failed to deserialize JSON")
    board.desire()
    assert [path.name for path in (board.state / "metadata").iterdir()] == ["timestamp.json"]
    # The broker is in good hands again. There is no such file in the repository that could come in its place.
    board.says = None
    board.metadata(b"timestamp 2")
    assert board.keeper.now.pending == ASSIGNMENT


def test_a_board_that_missed_several_roots_asks_for_each_in_turn(board: Board) -> None:
    """Only the root after its own is sent to it, and the rest of the metadata is signed by keys of the newest."""
    assert board.uplink.followed[0] == "2.root.json"
    board.reached = ROOT.replace(b"1", b"2")
    board.admissions.take_metadata("2.root.json", board.reached)
    board.desire()
    assert board.keeper.now.refusal
    assert board.uplink.followed[0] == "3.root.json"
    board.start()
    assert board.uplink.followed[0] == "3.root.json", "that is kept"
    board.says = None
    board.admissions.take_metadata("3.root.json", b"the third")
    board.desire()
    assert board.keeper.now.pending == ASSIGNMENT


def test_what_the_broker_forgot_is_no_file(board: Board) -> None:
    board.admissions.take_metadata("2.root.json", b"")
    assert [path.name for path in (board.state / "metadata").iterdir()] == ["timestamp.json"]


def test_what_was_withdrawn_is_refused_no_longer_and_asks_nobody(board: Board) -> None:
    board.says, board.named = TrustError("assignment_device", "made out to b1 of class d"), "a1"
    board.desire()
    assert board.keeper.now.refusal
    asked = board.asked
    board.desire(b"")
    board.metadata(b"timestamp 2")
    assert (board.asked, board.keeper.now.refusal) == (asked, "")
    assert board.admissions.unverified() == "no assignment, or not all metadata, has arrived"
    board.says = None
    board.desire()
    assert board.keeper.now.pending == ASSIGNMENT


def test_what_was_withdrawn_while_it_was_verified_is_not_taken_up(board: Board) -> None:
    board.says = None
    board.admissions.desire(b"an assignment")
    board.desire(b"")
    assert board.keeper.now.pending is None


def test_what_was_admitted_is_not_looked_at_again(board: Board) -> None:
    board.says = None
    board.desire()
    board.metadata(b"timestamp 2")
    board.start()
    board.desire()
    assert board.asked == 1


def test_what_was_admitted_before_and_comes_once_more_does_not_take_the_place_of_what_is_verified(board: Board) -> None:
    board.says = None
    board.desire(b"the first")
    board.admissions.desire(b"the second")
    board.desire(b"the first")  # by a relay, or a broker that sends again what was acknowledged
    assert board.keeper.now.desired_seen == digest_of(b"the second")


def test_what_is_verified_and_comes_once_more_does_not_take_the_place_of_what_came_after_it(board: Board) -> None:
    board.says = None
    board.admissions.desire(b"the first")
    board.admissions.desire(b"the second")
    board.desire(b"the first")
    assert board.keeper.now.desired_seen == digest_of(b"the second")
