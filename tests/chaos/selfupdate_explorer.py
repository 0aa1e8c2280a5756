"""Cuts, kills and refusing disks at every instant of the agent's own update, the launcher's part included; judged by content.

As :mod:`chaos.explorer` and :mod:`chaos.faults` do it for models; the board of :mod:`chaos.selfupdate` is one that starts its agent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from chaos.board import STATE
from chaos.depot import Depot
from chaos.faults import FAULTS, breaking
from chaos.selfupdate import OWN, PACKAGE, AgentStory, OwnBoard, check_end, check_remains
from edgefleet_agent import slots, verify
from edgefleet_shared.assignment import Floors
from edgefleet_shared.lifecycle import State
from edgefleet_shared.outcomes import Outcome
from support.disk import Killed, MemoryDisk, Tree, key_of, remains

PATIENCE_STARTS, PATIENCE_TURNS = 6, 60  # long enough for every retry that a broken disk allows


@dataclass(frozen=True)
class Found:
    """A disk after a cut, and how it came to it."""

    tree: Tree
    posted: int
    promised: Floors
    depth: int
    trail: str


@dataclass
class AgentExplorer:
    """Like :class:`chaos.explorer.Explorer`, for the agent's own update: cuts and kills at every instant, also of the launcher."""

    depot: Depot
    make_disk: Callable[[Tree], MemoryDisk] = MemoryDisk
    limit: int = 20
    met: int = 0
    recovered: int = 0
    failures: list[str] = field(default_factory=list)

    def explore(self, story: AgentStory, depth: int = 1) -> None:
        """A cut at every instant, then, until ``depth`` of them followed one another, one at every instant of the recovery."""
        self._seen: set[tuple[int, int, bytes]] = set()
        self._todo: deque[Found] = deque()
        self._live(story, self._start(story), depth)
        self._drain(story, depth)

    def explore_kills(self, story: AgentStory, depth: int = 1) -> None:
        """A kill after every change; with ``depth`` 2 also a cut at every instant of the recovery from it."""
        self._seen, self._todo = set(), deque()
        for number in range(1, self._live(story, self._start(story), 0) + 1):
            if len(self.failures) >= self.limit:
                return
            self._kill(story, number, depth)
            self._drain(story, depth)

    def _start(self, story: AgentStory) -> Found:
        return Found(story.tree, 1, verify.read_floors(STATE, files=MemoryDisk(story.tree)), 0, story.name)

    def _drain(self, story: AgentStory, depth: int) -> None:
        while self._todo and len(self.failures) < self.limit:
            found = self._todo.popleft()
            self.recovered += 1
            self._live(story, found, depth)

    def _live(self, story: AgentStory, found: Found, depth: int) -> int:
        disk = self.make_disk(found.tree)
        board = OwnBoard(self.depot, story, disk, found.posted, found.promised)
        try:
            if found.depth:
                check_remains(self.depot, story, disk, found.promised)
            if found.depth < depth:
                self._watch(board, found)
            board.run()
            check_end(board)
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong is a finding
            self.failures.append(f"{found.trail}: {type(exc).__name__}: {exc}")
        return len(disk.log)

    def _watch(self, board: OwnBoard, found: Found) -> None:
        def after(operation: str, path: str) -> None:
            trail = f"{found.trail}; cut after {len(board.disk.log)} {operation} {path.rpartition('/')[2][:24]}"
            for tree in remains(board.disk):
                self.met += 1
                key = (key_of(tree), board.posted, msgspec.json.encode(board.promised))
                if key not in self._seen:
                    self._seen.add(key)
                    self._todo.append(Found(tree, board.posted, board.promised, found.depth + 1, trail))

        board.disk.after = after

    def _kill(self, story: AgentStory, number: int, depth: int) -> None:
        disk = self.make_disk(story.tree)

        def after(operation: str, path: str) -> None:
            if len(disk.log) == number:
                disk.dead = True
                raise Killed

        disk.after = after
        trail = f"{story.name}; killed after {number}"
        first = OwnBoard(self.depot, story, disk, 1, self._start(story).promised)
        try:
            first.run()
        except Killed:
            pass
        else:
            return  # the board had taken itself down before
        disk.dead, disk.after = False, None
        self.recovered += 1
        second = OwnBoard(self.depot, story, disk, first.posted, first.promised)
        try:
            check_remains(self.depot, story, disk, first.promised)
            disk.log.clear()
            if depth > 1:
                self._watch(second, Found({}, first.posted, first.promised, 1, trail))
            second.run()
            check_end(second)
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong is a finding
            self.failures.append(f"{trail}: {type(exc).__name__}: {exc}")


@dataclass
class AgentFaultRunner:
    """Runs stories on disks that refuse, and counts."""

    depot: Depot
    limit: int = 20
    faults: int = 0
    failures: list[str] = field(default_factory=list)

    def every_operation(self, story: AgentStory, every: int = 1) -> None:
        """Each kind of fault at each ``every``-th operation of the story."""
        rehearsed = OwnBoard(self.depot, story, MemoryDisk(story.tree))
        rehearsed.run()
        for fault in FAULTS:
            for number in range(1, rehearsed.disk.count + 1, every):
                if len(self.failures) < self.limit:
                    self._run(story, f"{story.name}; {fault.name} at {number}", breaking(fault, number))

    def _run(self, story: AgentStory, trail: str, break_it: Callable[[MemoryDisk], None]) -> None:
        """No exception may come out of a board whose disk refuses; once it is mended, the board rests where it should."""
        self.faults += 1
        board = OwnBoard(self.depot, story, MemoryDisk(story.tree))
        board.promised = verify.read_floors(STATE, files=board.disk.calm())
        try:
            break_it(board.disk)
            rests = board.live(PATIENCE_STARTS, PATIENCE_TURNS)
            check_remains(self.depot, story, board.disk, board.promised)
            told = board.last.told if board.last else None
            if not rests and told is not None and not board.last.restarting:
                silent = told.state is not State.IDLE and not told.problem
                assert not silent, f"it stands in {told.state.value} and does not tell why"
            board.disk.fault = None
            mended = OwnBoard(self.depot, story, board.disk, board.posted, board.promised)
            mended.run()
            # What a failed operation left behind is collected at the next start.
            last = OwnBoard(self.depot, story, board.disk, board.posted, board.promised)
            last.run()
            check_end(last, ends_after_a_fault(story))
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong in the agent is a finding
            self.failures.append(f"{trail}: {type(exc).__name__}: {exc}")


def ends_after_a_fault(story: AgentStory) -> dict[str, tuple[Outcome, ...]]:
    """A disk that refuses may also cost the candidate; then what ran before runs, and that is told."""
    had = slots.read(OWN, files=MemoryDisk(story.tree))
    active = had.previous if story.rotten else had.active if story.package == PACKAGE else None
    before = active.version if active is not None else ""
    ends = {version: list(outcomes) for version, outcomes in story.ends.items()}
    unhurt = [Outcome.FAILED_NO_CHANGE, Outcome.FAILED_ROLLED_BACK]
    ends.setdefault(before, []).extend(unhurt)
    if story.earlier:  # committed before the second assignment came
        ends.setdefault(story.earlier, []).extend(unhurt)
    if story.rotten:  # what had rotted was not noticed before the assignment of the same version was looked at
        ends[before].append(Outcome.LATE_REGRESSION)
    return {version: tuple(outcomes) for version, outcomes in ends.items()}
