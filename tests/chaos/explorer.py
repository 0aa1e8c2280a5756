"""Cuts the power, and kills the agent, at every instant of a story; then lets the agent recover, and judges by content.

A state is what a disk can be found as: a story, the bytes and names that are left, the assignments given so far, the floors
promised so far. The same state found twice is recovered once. ``depth`` cuts follow one another: the second one falls into the
recovery from the first, at every instant of it. A kill leaves everything that processes saw, so a cut after it can still take
what was never synced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from chaos.board import STATE, Agent, SimulatedRuntime, Story, check_end, check_remains
from chaos.depot import Depot
from edgefleet_agent import verify
from edgefleet_shared.assignment import Floors
from support.disk import Killed, MemoryDisk, Tree, key_of, remains

MakeDisk = Callable[[Tree], MemoryDisk]


@dataclass(frozen=True)
class Found:
    """A disk after a cut, and how it came to it."""

    tree: Tree
    posted: int
    promised: Floors
    depth: int
    trail: str


@dataclass
class Explorer:
    """Explores stories and counts.

    Args:
        make_disk: where a planted mistake of the disk comes in.
        limit: stop after so many failures.
    """

    depot: Depot
    make_disk: MakeDisk = MemoryDisk
    limit: int = 20
    met: int = 0
    recovered: int = 0
    failures: list[str] = field(default_factory=list)

    def explore(self, story: Story, depth: int = 1) -> None:
        """A cut at every instant of ``story``, then, until ``depth`` of them followed one another, one at every instant of the recovery."""
        self._begin()
        self._live(story, self._start(story), depth)
        self._drain(story, depth)

    def explore_kills(self, story: Story, depth: int = 1) -> None:
        """A kill at every instant of ``story``; ``depth`` counts it: with 2, also a cut at every instant of the recovery from it."""
        self._begin()
        for number in range(1, self._live(story, self._start(story), 0) + 1):
            if len(self.failures) >= self.limit:
                return
            self._kill(story, number, depth)
            self._drain(story, depth)

    def _begin(self) -> None:
        self._seen: set[tuple[int, int, bytes]] = set()
        self._todo: deque[Found] = deque()

    def _start(self, story: Story) -> Found:
        promised = verify.read_floors(STATE, files=MemoryDisk(story.tree))
        return Found(story.tree, 1, promised, 0, story.name)

    def _drain(self, story: Story, depth: int) -> None:
        while self._todo and len(self.failures) < self.limit:
            found = self._todo.popleft()
            self.recovered += 1
            self._live(story, found, depth)

    def _live(self, story: Story, found: Found, depth: int) -> int:
        """One start of the agent on what was found; cuts along the way are noted. Returns how many changes the disk saw."""
        disk = self.make_disk(found.tree)
        try:
            if found.depth:
                check_remains(self.depot, story, disk, found.promised)
            agent = self._agent(story, disk, None, found)
            if found.depth < depth:
                self._watch(disk, agent, found)
            agent.run()
            check_end(agent)
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong in the agent is a finding
            self.failures.append(f"{found.trail}: {type(exc).__name__}: {exc}")
        return len(disk.log)

    def _agent(self, story: Story, disk: MemoryDisk, runtime: SimulatedRuntime | None, found: Found) -> Agent:
        served = runtime.on(disk) if runtime else SimulatedRuntime(self.depot, disk, story.ailing, story.key)
        return Agent(self.depot, story, disk, served, found.posted, found.promised, found.depth)

    def _watch(self, disk: MemoryDisk, agent: Agent, found: Found) -> None:
        def after(operation: str, path: str) -> None:
            trail = f"{found.trail}; cut after {len(disk.log)} {operation} {path.rpartition('/')[2][:24]}"
            for tree in remains(disk):
                self._note(Found(tree, agent.posted, agent.promised, found.depth + 1, trail))

        disk.after = after

    def _note(self, found: Found) -> None:
        self.met += 1
        key = (key_of(found.tree), found.posted, msgspec.json.encode(found.promised))
        if key not in self._seen:
            self._seen.add(key)
            self._todo.append(found)

    def _kill(self, story: Story, number: int, depth: int) -> None:
        """The agent dies after the change of that number; the machine goes on, and may lose its power while a new agent recovers."""
        disk = self.make_disk(story.tree)

        def after(operation: str, path: str) -> None:
            if len(disk.log) == number:
                disk.dead = True
                raise Killed

        disk.after = after
        trail = f"{story.name}; killed after {number}"
        first = self._agent(story, disk, None, self._start(story))
        try:
            first.run()
        except Killed:
            pass
        else:
            raise AssertionError(f"{trail}: it was not killed")
        disk.dead = False
        found = Found({}, first.posted, first.promised, 1, f"{trail} {disk.log[-1].rpartition('/')[2][:24]}")
        self.recovered += 1
        try:
            check_remains(self.depot, story, disk, found.promised)
            second = self._agent(story, disk, first.runtime, found)
            disk.log.clear()
            disk.after = None
            if found.depth < depth:
                self._watch(disk, second, found)
            second.run()
            check_end(second)
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong in the agent is a finding
            self.failures.append(f"{found.trail}: {type(exc).__name__}: {exc}")
