"""Who computes first, and who lives on: receives a process that starts, loads or ends beside one that serves, hands it on behind everything else.

A model that loads or is let go on the same few cores must not be felt by requests. SCHED_IDLE takes only what others leave; a process may leave it
again where RLIMIT_NICE allows nice 0 (``LimitNICE=+0`` in the unit) or with CAP_SYS_NICE, else SCHED_BATCH is what can be had and undone.
When memory ends meanwhile, it goes first (:mod:`edgefleet_agent.out_of_memory`).
Source: sched(7), "SCHED_IDLE" and "Nice value".
"""

from __future__ import annotations

import contextlib
import os
import resource
from functools import cache
from pathlib import Path

from edgefleet_agent import out_of_memory

_CAP_SYS_NICE = 23
_NICE_0 = 20  # RLIMIT_NICE counts down from 20


def step_back(pid: int) -> None:
    """Put a process behind all that serves; threads and processes that it will start come along."""
    _place(pid, os.SCHED_IDLE if _may_return() else os.SCHED_BATCH)
    out_of_memory.end_first(pid)


def come_forward(pid: int) -> None:
    """Give a process and every thread that it started meanwhile a normal place again."""
    _place(pid, os.SCHED_OTHER)
    out_of_memory.end_as_us(pid)


def _place(pid: int, policy: int) -> None:
    # It may have ended, or a system call filter is in the way: then the swap is felt more, and works.
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))


@cache
def _may_return() -> bool:
    """Whether this process, and so what it starts, may leave SCHED_IDLE again."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= _NICE_0:
        return True
    # Being root is not enough: a container's root has not this capability.
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_SYS_NICE & 1)
