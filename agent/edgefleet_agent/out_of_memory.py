"""When the board is out of memory: receives a process, hands it on with another place in the kernel's choice, and tells whom the kernel has ended.

The kernel ends the process with the highest score: the memory that it holds, plus its ``oom_score_adj`` in thousandths of all there is.
What is only tried, or loads, must go before what serves, which as a rule holds more. To raise the adjustment needs no right, and neither does
to lower it again to what a process was started with.
What had kept to its own limit was ended for others' sake, and that says nothing against it: it is tried again a little later.
Source: proc(5), ``/proc/pid/oom_score_adj``, and ``oom_kill`` in ``/proc/vmstat`` (Linux 4.13).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from edgefleet_shared.errors import StarvedError

from edgefleet_agent import sysfs

VMSTAT = Path("/proc/vmstat")
ATTEMPTS, PAUSE_S = 3, 5.0
_T = TypeVar("_T")
_BEFORE_ALL_OTHERS = 1000


def end_first(pid: int) -> None:
    """Put a process, and what it starts from now on, before everything else on the board."""
    _own()  # known before it can be changed
    _adjust(pid, _BEFORE_ALL_OTHERS)


def end_as_us(pid: int) -> None:
    """Give a process the place that this one was started with."""
    _adjust(pid, _own())


def kills() -> int:
    """How many processes the kernel has ended for want of memory since it started; 0 where it does not tell."""
    for line in sysfs.text(VMSTAT).splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def is_starved(code: int, peak_bytes: int, limit_bytes: int, kills_before: int) -> bool:
    """Whether the kernel ended a process although that had never held more than it may.

    Args:
        code: how it ended, not by our doing; a signal's number below 0.
        peak_bytes: the most that it ever held, 0 where nobody knows.
        kills_before: :func:`kills` when it was started.
    """
    return code == -signal.SIGKILL and 0 < peak_bytes <= limit_bytes and kills() > kills_before


def outlast(work: Callable[[], _T], stop: threading.Event) -> _T:
    """What ``work`` returns. While a process has to go for others in it, it is done again: they may have gone meanwhile.

    Raises:
        StarvedError: each time, or until ``stop``.
        Whatever else ``work`` raises.
    """
    attempt = 1
    while True:
        try:
            return work()
        except StarvedError:
            if attempt >= ATTEMPTS or stop.wait(PAUSE_S):
                raise
            attempt += 1


@cache
def _own() -> int:
    return int(sysfs.number(_file("self")) or 0)


def _adjust(pid: int, value: int) -> None:
    # It may have ended, or a container shows no such file: then the kernel chooses as it would have.
    with contextlib.suppress(OSError):
        _file(str(pid)).write_text(str(value))


def _file(process: str) -> Path:
    return Path(f"/proc/{process}/oom_score_adj")
