"""Who is ended first when the board is out of memory: receives a process, hands it on with another place in the kernel's choice.

The kernel ends the process with the highest score: the memory that it holds, plus its ``oom_score_adj`` in thousandths of all there is.
What is only tried, or loads, must go before what serves, which as a rule holds more. To raise the adjustment needs no right, and neither does
to lower it again to what a process was started with.
Source: proc(5), ``/proc/pid/oom_score_adj``.
"""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

from edgefleet_agent import sysfs

_BEFORE_ALL_OTHERS = 1000


def end_first(pid: int) -> None:
    """Put a process, and what it starts from now on, before everything else on the board."""
    _own()  # known before it can be changed
    _adjust(pid, _BEFORE_ALL_OTHERS)


def end_as_us(pid: int) -> None:
    """Give a process the place that this one was started with."""
    _adjust(pid, _own())


@cache
def _own() -> int:
    return int(sysfs.number(_file("self")) or 0)


def _adjust(pid: int, value: int) -> None:
    # It may have ended, or a container shows no such file: then the kernel chooses as it would have.
    with contextlib.suppress(OSError):
        _file(str(pid)).write_text(str(value))


def _file(process: str) -> Path:
    return Path(f"/proc/{process}/oom_score_adj")
