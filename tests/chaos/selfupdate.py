"""The agent's own update, in memory: the real launcher and the real line of the agent, started again and again on a disk that can be cut.

What a version does when it is started is the story's: it works, dies, hangs, can't reach the broker, takes the whole board down. The real
launcher chooses it, the real :class:`edgefleet_agent.runner.Runner` with :class:`edgefleet_agent.selfupdate.AgentEffects` is it.
At every instant one verified agent that can run must be there: the one that the launcher would start.
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import msgspec
from chaos.board import BOARD, CLASS, DEVICE, MAX_TURNS, SETTINGS, STATE, Clock, NotedSigner, Wire, check_signed
from chaos.depot import Depot
from chaos.stories import depot, enrolled
from edgefleet_agent import journal, launcher, slots, verify, verify_child
from edgefleet_agent.inbox import AdmissionDone, Item
from edgefleet_agent.line import Line
from edgefleet_agent.ports import Ports
from edgefleet_agent.runner import Runner
from edgefleet_agent.selfupdate import AgentEffects, AgentUplink, Myself
from edgefleet_agent.slots import SlotStatus
from edgefleet_agent.transport import Desired, Up
from edgefleet_agent.verify import AdmitRequest, Checked, Refusal
from edgefleet_shared import trust
from edgefleet_shared.artifact import Layout, digest_of
from edgefleet_shared.assignment import Admission, Assignment, Floors, Subject
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import AgentReport
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk, Tree, remains

O = Outcome  # noqa: E741 - the stories must stay readable
OWN = launcher.folder(STATE)
PACKAGE = "1"
PROVIDING = msgspec.structs.replace(BOARD, provides={"launcher": launcher.LAUNCHER})
MAX_STARTS = 24  # of a board until it rests; far more than any update needs


class Does(Enum):
    """What a version does when it is started."""

    WORK = "works"
    DIE = "dies at its import"
    HANG = "hangs"
    STAY_CUT_OFF = "can't reach the broker"
    DIE_ON_TRIAL = "dies while it proves itself"
    TAKE_ALL_DOWN = "takes the whole board down"
    DIE_LATE = "works until it is committed, then dies at each start"
    FAIL_ITS_REHEARSAL = "does not start in its rehearsal"


class Died(BaseException):
    """The simulated process is gone; nothing in it may catch that."""


@dataclass(frozen=True)
class AgentStory:
    """What happens to a board's agent.

    Args:
        desired: assignments in order; the next comes when the line is in state ``next_when``, or rests.
        does: by version, what it does when it is started; the rest works. The package's version always does.
        ends: what may run in the end ("" is the package's version), and the outcome that may then be told.
        package: the version of the package that is installed.
        rotten: a version whose bytes were changed on the disk.
        earlier: the version of the first of two assignments.
    """

    name: str
    tree: Tree
    desired: tuple[bytes, ...]
    ends: dict[str, tuple[Outcome, ...]]
    does: dict[str, Does] = field(default_factory=dict)
    next_when: State | None = None
    package: str = PACKAGE
    rotten: str = ""
    earlier: str = ""


class AgentExaminer:
    """The real checks, in this process; the rehearsal as the story has it."""

    def __init__(self, office: Depot, disk: MemoryDisk, story: AgentStory) -> None:
        self._disk = disk
        self._refused = _refused(office, story)

    def admit(self, request: AdmitRequest) -> Admission:
        tree, folder = self._disk.tree(), request.metadata
        metadata = {
            path[len(folder) + 1 :]: content for path, content in tree.items()
            if path.startswith(f"{folder}/") and content is not None and "/." not in path
        }  # fmt: skip
        assert request.subject is Subject.AGENT
        return _admit(request.root, tuple(sorted(metadata.items())), request.desired, msgspec.json.encode(request.floors), request.now)  # fmt: skip

    def check(self, state: object, assignment: Assignment) -> Checked:
        layout = Layout(OWN / "artifacts", read_only=True, files=self._disk)
        try:
            return verify_child.check(layout, assignment)
        except EnvironmentProblem:
            raise
        except EdgefleetError as exc:
            raise Refusal(exc, assignment.id) from exc

    def accept(self, state: object, manifest: str, threads: int) -> AcceptanceReport:
        if manifest in self._refused:
            return AcceptanceReport(verdict=Verdict.FAILED, reason="its rehearsal ended with status 1")
        return AcceptanceReport(verdict=Verdict.PASSED)


@functools.lru_cache(maxsize=4096)
def _admit(
    root: bytes, metadata: tuple[tuple[str, bytes], ...], desired: bytes, floors: bytes, now: float
) -> Admission:
    known = msgspec.json.decode(floors, type=Floors)
    try:
        repository = trust.ImageRepository(root, dict(metadata).get, CLASS, known, now)
        return trust.admit(
            repository, desired, device=DEVICE, device_class=CLASS, board=PROVIDING, floors=known, now=now, subject=Subject.AGENT,
        )  # fmt: skip
    except trust.Incomplete:
        raise
    except EdgefleetError as exc:
        raise Refusal(exc, "") from exc


def _refused(office: Depot, story: AgentStory) -> set[str]:
    return {office.agents[v].digest for v, does in story.does.items() if does is Does.FAIL_ITS_REHEARSAL}


class Inbox(queue.Queue[Item]):
    """Notes what the board has promised: from an admission on, something may be done for the assignment."""

    def __init__(self, board: OwnBoard) -> None:
        super().__init__()
        self._board = board

    def put(self, item: Item, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(item, AdmissionDone) and isinstance(item.result, Admission):
            self._board.promised = item.result.floors
        super().put(item, block, timeout)


class Running:
    """One start of one version."""

    def __init__(self, board: OwnBoard, manifest: str, does: Does) -> None:
        self.board, self.does = board, does
        self.clock = Clock(board.depot.clock.now())
        self.told: AgentReport | None = None
        self.restarting = self.proven = False
        self.inbox = Inbox(board)
        self.wire = Wire(board.depot, board.depot.publications["agents"], self.inbox.put)
        myself = Myself(
            manifest=manifest, launched=True, package=board.story.package, home=STATE, unproven=self._unproven, models_rest=lambda: True,
            restart=partial(setattr, self, "restarting", True), proven=partial(setattr, self, "proven", True),
        )  # fmt: skip
        self.runner = Runner(
            OWN, SETTINGS, PROVIDING, "boot", self.inbox,
            Ports(
                uplink=AgentUplink(self.wire if does is not Does.STAY_CUT_OFF else _Silent(self.wire), manifest, partial(setattr, self, "told")),
                runtime=None, examiner=AgentExaminer(board.depot, board.disk, board.story), signer=NotedSigner(), clock=self.clock, files=board.disk,
                spawn=lambda name, work: work(),
            ),
            Line(subject=Subject.AGENT, home=STATE, effects=partial(AgentEffects, myself=myself)),
        )  # fmt: skip
        if does is not Does.STAY_CUT_OFF:
            self.inbox.put(Up())
            self._post()

    def _post(self) -> None:
        self.inbox.put(Desired(self.board.story.desired[self.board.posted - 1], Subject.AGENT))

    def _unproven(self) -> str:
        if self.does is Does.DIE_ON_TRIAL:
            raise Died
        if self.does is Does.STAY_CUT_OFF:
            self.clock.elapsed += 1000.0
            return "the broker was not reached"
        return ""

    def run(self, max_turns: int = MAX_TURNS) -> bool | None:
        """Until it ends to be started again (False), rests at what is wanted (True), or neither in so many turns (None)."""
        for _ in range(max_turns):
            try:
                item: Item | None = self.inbox.get_nowait()
            except queue.Empty:
                item = None
                self.clock.elapsed += 1.0
            try:
                self.runner.turn(item)
            except Died:
                return False
            if self.restarting:
                return False
            self._next_assignment()
            if item is None and self.inbox.empty() and self._rests():
                return True
        return None

    def _next_assignment(self) -> None:
        board = self.board
        if board.posted == len(board.story.desired) or self.told is None:
            return
        if self.told.state is board.story.next_when or (self.inbox.empty() and self._rests()):
            board.posted += 1
            self._post()

    def _rests(self) -> bool:
        told = self.told
        wanted = digest_of(self.board.story.desired[self.board.posted - 1])
        return told is not None and told.state is State.IDLE and not told.problem and told.desired_seen == wanted


class _Silent(Wire):
    """A wire that nothing comes over."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire.depot, {}, wire.put)


class OwnBoard:
    """A board that starts its agent again whenever it ends, as systemd does.

    Args:
        posted: how many of the assignments were given so far.
        promised: the floors that the board has acted on before.
    """

    def __init__(
        self, office: Depot, story: AgentStory, disk: MemoryDisk, posted: int = 1, promised: Floors | None = None
    ) -> None:
        self.depot, self.story, self.disk = office, story, disk
        self.posted, self.promised = posted, promised or Floors()
        self.make_disk: Callable[[Tree], MemoryDisk] = type(disk)
        self.version_of = {made.digest: version for version, made in office.agents.items()} | {"": ""}
        self.last: Running | None = None
        self.runs = ""

    def run(self) -> None:
        """Until it rests.

        Raises:
            AssertionError: it never does, or what the launcher starts is not what it may start.
        """
        if not self.live(MAX_STARTS, MAX_TURNS):
            raise AssertionError(
                f"it does not come to rest: {self.last.told if self.last else 'started again and again'}"
            )

    def live(self, max_starts: int, max_turns: int) -> bool:
        """So many starts and turns at most; returns whether it rests.

        Raises:
            AssertionError: what the launcher starts is not what it may start.
        """
        for _ in range(max_starts):
            choice = launcher.choose(STATE, self.story.package, files=self.disk)
            version = self.version_of[choice.manifest]
            check_startable(self.depot, self.story, self.disk, choice.manifest)
            does = self.story.does.get(version, Does.WORK)
            if does is Does.HANG:
                assert choice.alarm_s > 0, f"{version} hangs, and nothing ends it"
            if does is Does.TAKE_ALL_DOWN:
                after = self.disk.after
                self.disk = self.make_disk(list(remains(self.disk))[-1])
                self.disk.after = after
            late = does is Does.DIE_LATE and slots.read(OWN, files=self.disk.calm()).active.status is SlotStatus.GOOD
            if late or does in (Does.DIE, Does.HANG, Does.TAKE_ALL_DOWN):
                continue
            self.last = Running(self, choice.manifest, does)
            self.runs = version
            rests = self.last.run(max_turns)
            if rests is None:
                return False
            if rests:
                ended_later = choice.alarm_s > 0 and not self.last.proven
                assert not ended_later, f"{version} rests, and its alarm will end it"
                return True
        return False


def check_startable(office: Depot, story: AgentStory, disk: MemoryDisk, manifest: str) -> None:
    """What the launcher starts is the package's version, or one that was signed, is whole and was rehearsed.

    Raises:
        AssertionError: it is not.
    """
    if not manifest:
        return
    assert manifest not in _refused(office, story), "a version is started that failed its rehearsal"
    layout = Layout(OWN / "artifacts", read_only=True, files=disk.calm())
    for blob in layout.manifest(manifest).blobs():
        layout.check(blob)


def check_remains(office: Depot, story: AgentStory, disk: MemoryDisk, promised: Floors) -> None:
    """What must hold at every instant, whatever was cut.

    Raises:
        AssertionError: it does not.
    """
    files = disk.calm()
    journal.read(OWN, files=files)
    found = slots.read(OWN, files=files)
    layout = Layout(OWN / "artifacts", read_only=True, files=files)
    for slot in (found.active, found.previous):
        if slot is not None:
            assert slot.manifest not in _refused(office, story), (
                f"a slot names {slot.version}, which failed its rehearsal"
            )
            for blob in layout.manifest(slot.manifest).blobs() if slot.version != story.rotten else ():
                layout.check(blob)
    # On a copy: to choose may be to count a start.
    copy = MemoryDisk(disk.tree())
    choice = launcher.choose(STATE, story.package, files=copy)
    check_startable(office, story, copy, choice.manifest)
    assert launcher.choose(STATE, "another package", files=copy) == launcher.Choice(), "the package is no last resort"
    floors = verify.read_floors(STATE, files=files)
    assert floors.agent_version >= promised.agent_version, "the assignment's floor fell"
    assert floors.clock >= promised.clock, "the clock's floor fell"
    for name, version in promised.versions.items():
        assert floors.versions.get(name, 0) >= version, f"the floor of {name} fell"


def check_end(board: OwnBoard, ends: dict[str, tuple[Outcome, ...]] | None = None) -> None:
    """What must hold at rest: the right version runs and is committed, and what is told is true.

    Args:
        ends: in place of the story's own.

    Raises:
        AssertionError: it does not.
    """
    story, files = board.story, board.disk.calm()
    ends = ends or story.ends
    check_remains(board.depot, story, board.disk, board.promised)
    found, told = slots.read(OWN, files=files), board.last.told if board.last else None
    assert board.runs in ends, f"{board.runs or 'the package'} runs, allowed are {sorted(ends)}"
    assert told is not None, "nothing was told"
    assert board.version_of[told.running] == board.runs
    assert (found.active.version if found.active else "") == board.runs, (
        f"{board.runs or 'the package'} runs, the slots say {found.active}"
    )
    assert found.active is None or found.active.status is SlotStatus.GOOD, f"{board.runs} was left {found.active}"
    check_signed(told, Subject.AGENT)
    assert told.ended is not None
    assert told.ended.outcome in ends[board.runs], f"{board.runs or 'the package'} runs, {told.ended} was told"
    assert found.candidate is None, "a candidate was left"
    kept = {slot.manifest for slot in (found.active, found.previous) if slot is not None}
    layout = Layout(OWN / "artifacts", read_only=True, files=files)
    needed = kept | {blob.digest for manifest in kept for blob in layout.manifest(manifest).blobs()}
    assert set(layout.digests()) == needed, "blobs that no slot names were left"
    assert not list(layout.unfinished()), "what never became a blob was left"


def play(story: AgentStory) -> OwnBoard:
    """A story from its beginning to its end, with nothing going wrong beside what the versions do."""
    board = OwnBoard(depot(), story, MemoryDisk(story.tree))
    board.run()
    return board


@functools.cache
def came_to(*versions: str) -> Tree:
    """The tree of a board whose agent took these versions one after the other."""
    tree = enrolled()
    for version in versions:
        board = play(AgentStory("before", tree, (depot().assign(version),), {version: (O.SUCCEEDED,)}))
        check_end(board)
        tree = board.disk.tree()
    return tree


def rotten(tree: Tree, version: str) -> Tree:
    """With one byte of a version's code changed."""
    code = depot().layout.manifest(depot().agents[version].digest).layers[0].digest.partition(":")[2]
    path = f"{OWN}/artifacts/blobs/sha256/{code}"
    content = tree[path]
    assert content is not None
    return tree | {path: b"X" + content[1:]}


@functools.cache
def agent_stories() -> tuple[AgentStory, ...]:
    """One of each kind."""
    office, none, one, two = depot(), enrolled(), came_to("a1"), came_to("a1", "a2")
    good = (O.SUCCEEDED,)
    back = (O.FAILED_ROLLED_BACK,)

    def bad(does: Does, outcomes: tuple[Outcome, ...] = back) -> AgentStory:
        return AgentStory(f"update: it {does.value}", one, (office.assign("a2"),), {"a1": outcomes}, {"a2": does})

    return (
        AgentStory("first update", none, (office.assign("a1"),), {"a1": good}),
        AgentStory("first update: it dies", none, (office.assign("a1"),), {"": back}, {"a1": Does.DIE}),
        AgentStory("update", one, (office.assign("a2"),), {"a2": good}),
        AgentStory("update over two, the first is collected", two, (office.assign("a3"),), {"a3": good}),
        AgentStory("return to the version before by assignment", two, (office.assign("a1"),), {"a1": good}),
        bad(Does.DIE),
        bad(Does.HANG),
        bad(Does.STAY_CUT_OFF),
        bad(Does.DIE_ON_TRIAL),
        bad(Does.TAKE_ALL_DOWN),
        bad(Does.FAIL_ITS_REHEARSAL, (O.FAILED_NO_CHANGE,)),
        AgentStory("superseded while fetching", one, (office.assign("a2"), office.assign("a3")), {"a3": good},
                   next_when=State.FETCHING, earlier="a2"),
        *(
            AgentStory(f"superseded while {moment.value}", one, (office.assign("a2"), office.assign("a3")), {"a3": good},
                       next_when=moment, earlier="a2")
            for moment in (State.VERIFYING, State.SWAPPING, State.SOAKING, State.COMMITTING)
        ),
        AgentStory("what was committed dies at each start", two, (office.assign("a1"),), {"a1": good}, {"a2": Does.DIE_LATE}),
        AgentStory("update: it dies once it is committed", one, (office.assign("a2"),), {"a1": (O.LATE_REGRESSION, O.FAILED_ROLLED_BACK), "a2": good},
                   {"a2": Does.DIE_LATE}),
        AgentStory("what runs has rotted", rotten(two, "a2"), (office.assign("a2"),), {"a2": good}, rotten="a2"),
        AgentStory("another package came", two, (office.assign("a3"),), {"a3": good}, package="2"),
    )  # fmt: skip
