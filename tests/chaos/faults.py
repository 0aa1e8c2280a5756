"""Disks that refuse: every operation of a story ends once with an error, or from it on until the disk is mended; and full disks.

While the disk refuses, the agent must neither end nor lose the model that serves, and must tell what is in the way; a second start
must come up on the same disk; once it is mended, the board must come to rest where it should be, and tell the truth about it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.board import STATE, Agent, SimulatedRuntime, Story, check_end, check_remains, has_plan, named_by
from chaos.depot import Depot
from edgefleet_agent import slots, verify
from edgefleet_shared.lifecycle import State
from edgefleet_shared.outcomes import Outcome
from support.disk import NAME_BYTES, MemoryDisk

CHANGING = frozenset({"write", "fsync", "rename", "unlink", "mkdir", "fchmod", "close"})
FILLING = frozenset({"write", "rename", "mkdir", "fsync"})
PATIENCE_TURNS = 60  # long enough for every retry that a broken disk allows


@dataclass(frozen=True)
class Fault:
    """``operations`` None: all of them, reading too. ``lasting``: until the disk is mended; else that one time."""

    name: str
    number: int
    operations: frozenset[str] | None
    lasting: bool


FAULTS = (
    Fault("EIO", errno.EIO, None, lasting=False),
    Fault("EIO from here on", errno.EIO, None, lasting=True),
    Fault("ENOSPC", errno.ENOSPC, FILLING, lasting=False),
    Fault("ENOSPC from here on", errno.ENOSPC, FILLING, lasting=True),
    Fault("EROFS", errno.EROFS, CHANGING, lasting=False),
    Fault("read-only from here on", errno.EROFS, CHANGING - {"close", "fsync"}, lasting=True),
)


@dataclass
class FaultRunner:
    """Runs stories on disks that refuse, and counts."""

    depot: Depot
    limit: int = 20
    faults: int = 0
    failures: list[str] = field(default_factory=list)

    def every_operation(self, story: Story, every: int = 1) -> None:
        """Each kind of fault at each ``every``-th operation of the story."""
        for fault in FAULTS:
            for number in range(1, self._operations(story) + 1, every):
                self._run(story, f"{story.name}; {fault.name} at {number}", breaking(fault, number))

    def every_capacity(self, story: Story, step_bytes: int = NAME_BYTES) -> None:
        """A disk that is full at each step between what the board had on it and what it needs at most."""
        had = MemoryDisk(story.tree).used_bytes()
        for room in range(0, self._most_needed(story) - had + step_bytes, step_bytes):
            self._run(story, f"{story.name}; {room} bytes free", _holding(had + room))

    def _operations(self, story: Story) -> int:
        agent = self._agent(story, MemoryDisk(story.tree))
        agent.run()
        return agent.disk.count

    def _most_needed(self, story: Story) -> int:
        disk, most = MemoryDisk(story.tree), [0]
        disk.after = lambda operation, path: most.__setitem__(0, max(most[0], disk.used_bytes()))
        self._agent(story, disk).run()
        return most[0]

    def _agent(self, story: Story, disk: MemoryDisk, first: Agent | None = None) -> Agent:
        if first is None:
            runtime = SimulatedRuntime(self.depot, disk, story.ailing, story.key)
            return Agent(self.depot, story, disk, runtime, 1, verify.read_floors(STATE, files=disk.calm()))
        return Agent(self.depot, story, disk, first.runtime, first.posted, first.promised, first.start + 1)

    def _run(self, story: Story, trail: str, break_it: Callable[[MemoryDisk], None]) -> None:
        if len(self.failures) >= self.limit:
            return
        self.faults += 1
        disk = MemoryDisk(story.tree)
        try:
            first = self._agent(story, disk)
            break_it(disk)
            self._patiently(first)
            second = self._agent(story, disk, first)
            self._patiently(second)
            disk.fault, disk.capacity_bytes = None, None
            second.run()
            # What a failed operation left behind is collected at the next start.
            last = self._agent(story, disk, second)
            last.run()
            check_end(last, ends_after_a_fault(self.depot, story))
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong in the agent is a finding
            self.failures.append(f"{trail}: {type(exc).__name__}: {exc}")

    def _patiently(self, agent: Agent) -> None:
        """Turns on the broken disk: no exception may come out of them. Ends at rest, or with the problem told."""
        resting = False
        for _ in range(PATIENCE_TURNS * 4):
            resting = not agent.turn()
            if resting or agent.clock.elapsed > PATIENCE_TURNS:
                break
        told = agent.wire.reported
        assert told is not None, "nothing was told"
        # Reading the same disk as processes do, without the fault: this is what a start after a repair would find.
        check_remains(self.depot, agent.story, agent.disk, agent.promised)
        if agent.story.tree.get(f"{STATE}/slots.json") and self._something_can_be_served(agent):
            agent.runtime.status()
            assert agent.runtime.serving is not None, "nothing serves"
        if not resting:
            assert told.problem or told.state is State.IDLE, f"it stands in {told.state.value} and does not tell why"

    def _something_can_be_served(self, agent: Agent) -> bool:
        """Of an engine that was upgraded nothing can, until a disk takes the plan that it needs now."""
        found = slots.read(STATE, files=agent.disk.calm())
        named = [slot.manifest for slot in (found.active, found.previous) if slot is not None]
        return any(has_plan(self.depot, agent.disk, manifest, agent.story.key) for manifest in named)


def breaking(fault: Fault, at: int) -> Callable[[MemoryDisk], None]:
    """What makes a disk refuse from its operation ``at``."""

    def break_it(disk: MemoryDisk) -> None:
        def refuse(count: int, operation: str, path: str) -> None:
            if count < at or (count > at and not fault.lasting):
                return
            if fault.operations is None or operation in fault.operations:
                raise OSError(fault.number, os.strerror(fault.number), path)

        disk.fault = refuse

    return break_it


def _holding(capacity_bytes: int) -> Callable[[MemoryDisk], None]:
    def break_it(disk: MemoryDisk) -> None:
        disk.capacity_bytes = capacity_bytes

    return break_it


def ends_after_a_fault(depot: Depot, story: Story) -> dict[str, tuple[Outcome, ...]]:
    """A disk that refuses may also cost the candidate; then what served before serves, and that is told."""
    before = named_by(story)
    ends = {version: list(outcomes) for version, outcomes in story.ends.items()}
    unhurt = [Outcome.FAILED_NO_CHANGE, Outcome.FAILED_ROLLED_BACK]
    if not before:
        unhurt.append(Outcome.FAILED_UNABLE_TO_ROLL_BACK)
    ends.setdefault(before, []).extend(unhurt)
    if story.regressing:  # a look at the slots that failed is not repeated by the story
        ends.setdefault(story.regressing, []).append(Outcome.SUCCEEDED)
    return {version: tuple(outcomes) for version, outcomes in ends.items()}
