"""Who computes first, and who lives on: receives which processes serve and which start, load or end beside them, places these behind everything else.

A model that loads or is let go on the same few cores must not be felt by requests. Two things are done about it:

- SCHED_IDLE takes only what others leave; a process may leave it again where RLIMIT_NICE allows nice 0 (``LimitNICE=+0`` in the unit) or
  with CAP_SYS_NICE, else SCHED_BATCH is what can be had and undone.
- That is not enough where an inference takes longer than the scheduler's slice (some 3 ms): a process that has just woken up to answer a request
  has by then had no less than its share against one that slept as long as it, so the other gets the processor for a tick (4 ms), even if one
  beside it is idle. So what loads has a processor that those which serve stay away from meanwhile.

When memory ends meanwhile, what stands aside goes first (:mod:`edgefleet_agent.out_of_memory`).

Source: sched(7), "SCHED_IDLE" and "Nice value"; sched_setaffinity(2); the kernel's documentation of EEVDF and of cpu_capacity.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from edgefleet_agent import out_of_memory, sysfs

_CAP_SYS_NICE = 23
_NICE_0 = 20  # RLIMIT_NICE counts down from 20


def step_back(pid: int) -> None:
    """Put a process behind all that serves; threads and processes that it will start come along."""
    _schedule(pid, _behind())
    out_of_memory.end_first(pid)


def come_forward(pid: int) -> None:
    """Give a process and every thread that it started meanwhile a normal place again."""
    _schedule(pid, os.SCHED_OTHER)
    out_of_memory.end_as_us(pid)


class Precedence:
    """Which of a few processes come first, and on which processors.

    Args:
        apart: whether a processor is kept for those that stand aside. Right where one is all that a request uses: with more threads than
            processors left, the others would wait for each other.
    """

    def __init__(self, *, apart: bool) -> None:
        self._apart = apart
        self._in_front: set[int] = set()
        self._aside: set[int] = set()

    def join(self, pid: int, *, aside: bool) -> None:
        """Here is a process; nothing else is to be felt of one that stands aside."""
        if aside:
            self.step_back(pid)
        else:
            self.come_forward(pid)

    def step_back(self, pid: int) -> None:
        """A process' work is waited for by nobody."""
        self._in_front.discard(pid)
        self._aside.add(pid)
        step_back(pid)
        self._settle(pid, *self._in_front)

    def come_forward(self, pid: int) -> None:
        """A process serves, or is hurried."""
        self._aside.discard(pid)
        self._in_front.add(pid)
        come_forward(pid)
        self._settle(pid, *self._in_front)

    @contextlib.contextmanager
    def standing_aside(self, pid: int) -> Iterator[None]:
        """A process does something that nobody waits for, and what it starts comes along; its life is worth as much as ever."""
        self._in_front.discard(pid)
        self._aside.add(pid)
        _schedule(pid, _behind())
        self._settle(pid, *self._in_front)
        try:
            yield
        finally:
            if pid in self._aside:
                self._aside.discard(pid)
                self._in_front.add(pid)
                _schedule(pid, os.SCHED_OTHER)
                self._settle(pid, *self._in_front)

    def leave(self, pid: int) -> None:
        """A process has ended."""
        self._in_front.discard(pid)
        if pid in self._aside:
            self._aside.discard(pid)
            self._settle(*self._in_front)

    def _settle(self, *pids: int) -> None:
        if not self._apart:
            return
        processors = os.sched_getaffinity(0)
        kept = {_spare(processors)} if self._aside and len(processors) > 1 else set()
        for pid in pids:
            with contextlib.suppress(OSError):
                for thread in _threads(pid):
                    with contextlib.suppress(OSError):
                        os.sched_setaffinity(thread, kept if kept and pid in self._aside else processors - kept)


def _spare(processors: set[int]) -> int:
    """The processor that is missed least: the slowest, where some are slower."""
    return min(sorted(processors, reverse=True), key=_capacity)


@cache
def _capacity(processor: int) -> float:
    """0 where the kernel tells none: they are alike."""
    return sysfs.number(Path(f"/sys/devices/system/cpu/cpu{processor}/cpu_capacity")) or 0.0


def _threads(pid: int) -> list[int]:
    return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]


def _schedule(pid: int, policy: int) -> None:
    # It may have ended, or a system call filter is in the way: then the swap is felt more, and works.
    with contextlib.suppress(OSError):
        for thread in _threads(pid):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(thread, policy, os.sched_param(0))


def _behind() -> int:
    return os.SCHED_IDLE if _may_return() else os.SCHED_BATCH


@cache
def _may_return() -> bool:
    """Whether this process, and so what it starts, may leave SCHED_IDLE again."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= _NICE_0:
        return True
    # Being root is not enough: a container's root has not this capability.
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_SYS_NICE & 1)
