"""Stage 2, compile: a guard. Receives a command, runs it, and ends all that it started: when it has ended, when told to, and when whoever started
the guard has died.

Run by :mod:`.watching` as a file, with the standard library alone. A toolchain starts programs, and these start others, some of which leave their
group and session; each becomes the guard's own child once its parent is gone (PR_SET_CHILD_SUBREAPER), so none escapes it. The guard ends as its
command did, by status or signal. When the machine's memory ends, what is guarded goes before who waits for it: work can be done again, and a controller
holds more than many a compiler. Source: prctl(2), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# As if it held half of the machine's memory more: before the controller, but not before another program that takes all there is.
GOES_FIRST = 500


class _Told(BaseException):
    """SIGTERM: from whoever started the guard, or from the kernel in their place."""


def main(parent: int, command: list[str]) -> int:
    """Returns the command's exit status; dies of the signal that it died of."""
    signal.signal(signal.SIGTERM, _told)
    go_first()
    _set(PR_SET_CHILD_SUBREAPER, 1)
    _set(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before this was said
        return 1
    status = 1
    try:
        with contextlib.suppress(_Told):
            status = _run(command)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_all()
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # of SIGKILL, which needs it not
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def go_first() -> None:
    """Have the kernel end this process, and what it starts from now on, before who started it when memory ends."""
    # A container shows no such file, another system has none.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+", encoding="ascii") as adjustment:
        if int(adjustment.read()) < GOES_FIRST:
            adjustment.write(str(GOES_FIRST))


def children(pid: int) -> list[int]:
    """A process's children, by all of its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as stream:
                found += map(int, stream.read().split())
    return found


def _run(command: list[str]) -> int:
    try:
        # Should the guard itself be killed, its command is too.
        process = subprocess.Popen(command, preexec_fn=lambda: _set(PR_SET_PDEATHSIG, signal.SIGKILL))
    except OSError as exc:
        sys.stderr.write(f"can't start {command[0]}: {exc.strerror}\n")
        return 127
    return process.wait()


def _end_all() -> None:
    """Whoever is killed leaves its children to the guard: until there are none."""
    while left := children(os.getpid()):
        for pid in left:
            os.kill(pid, signal.SIGKILL)  # a child that nobody waited for yet keeps its number
        os.waitpid(-1, 0)


def _told(_signal: int, _frame: FrameType | None) -> None:
    raise _Told


def _set(what: int, value: int) -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone has it
    if prctl is not None:
        prctl(what, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
