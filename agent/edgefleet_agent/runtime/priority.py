"""Who computes first: receives a process that gets ready beside one that serves, hands it on behind everything else until it is.

A model that loads on the same few cores must not be felt by requests. SCHED_IDLE takes only what others leave; a process may leave it
again where RLIMIT_NICE allows nice 0 (``LimitNICE=+0`` in the unit) or with CAP_SYS_NICE, else SCHED_BATCH is what can be had and undone.
Source: sched(7), "SCHED_IDLE" and "Nice value".
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

LEAVING_NICE = 10  # about a tenth of what a serving process may have
_CAP_SYS_NICE = 23
_NICE_0 = 20  # RLIMIT_NICE counts down from 20


def step_back(pid: int) -> None:
    """Put a process that has just started behind all that serves; the threads that it will start come along."""
    policy = os.SCHED_IDLE if _may_return() else os.SCHED_BATCH
    # A system call filter may be in the way: then the swap is felt more, and works.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(pid, policy, os.sched_param(0))


def _may_return() -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= _NICE_0:
        return True
    # Being root is not enough: a container's root has not this capability.
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_SYS_NICE & 1)


def come_forward(pid: int) -> None:
    """Give a process and every thread that it started meanwhile a normal place again."""
    with contextlib.suppress(OSError):  # it ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))


def leave(pid: int) -> None:
    """Let a process that serves no more end behind those that do; not idle, for it must end."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, LEAVING_NICE)
