"""A sandboxed child that behaves as badly as it is told: ``python -m support.misbehaving REPORT_FD`` with JSON on stdin.

Stands where a hostile model would: after the confinement. What it achieved goes to the report pipe, one JSON string per line.
"""

# ruff: noqa: SIM115  a deed that should be refused needs no context manager
from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from edgefleet_agent import confinement
from edgefleet_agent.confinement import Policy

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def main() -> None:
    request = json.load(sys.stdin)
    report_fd = int(sys.argv[1])

    def report(text: str) -> None:
        os.write(report_fd, json.dumps(text).encode() + b"\n")

    if request.get("user"):  # root is limited in less
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    missing = confinement.confine(
        Policy(
            readable=tuple(request["readable"]), writable=tuple(request["writable"]), file_bytes=request["file_bytes"]
        )
    )
    report(f"missing {list(missing)}")
    DEEDS[request["deed"]](report, request)
    report("survived")


def attempt(report: Callable[[str], None], name: str, deed: Callable[[], object]) -> None:
    try:
        deed()
        report(f"{name}: done")
    except (OSError, MemoryError) as exc:
        report(f"{name}: {type(exc).__name__}")


def tell_place(report: Callable[[str], None], request: dict[str, object]) -> None:
    """Where the kernel's out-of-memory killer has it, and whether it can change that."""
    report(Path("/proc/self/oom_score_adj").read_text().strip())
    attempt(report, "leave it", lambda: Path("/proc/self/oom_score_adj").write_text("0"))


def look_around(report: Callable[[str], None], request: dict[str, object]) -> None:
    """Once the parent says so: read what the kernel tells of the machine and of this process."""
    report("confined")
    while Path(str(request["inside"])).read_text() != "look":
        time.sleep(0.01)
    for path in ("/proc/self/statm", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat"):
        attempt(report, path, Path(path).read_bytes)
    attempt(report, "/proc/self/task", lambda: os.listdir("/proc/self/task"))


def segfault(report: Callable[[str], None], request: dict[str, object]) -> None:
    ctypes.string_at(1)


def illegal_instruction(report: Callable[[str], None], request: dict[str, object]) -> None:
    os.kill(os.getpid(), signal.SIGILL)


def abort(report: Callable[[str], None], request: dict[str, object]) -> None:
    os.abort()


def hang(report: Callable[[str], None], request: dict[str, object]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def eat_memory(report: Callable[[str], None], request: dict[str, object]) -> None:
    eaten = []
    while True:
        eaten.append(bytearray(b"x") * (4 << 20))
        time.sleep(0.001)


def reserve_memory(report: Callable[[str], None], request: dict[str, object]) -> None:
    confinement.limit_address_space(256 << 20)
    attempt(report, "small", lambda: bytearray(16 << 20))
    attempt(report, "large", lambda: bytearray(1 << 30))


def flood(report: Callable[[str], None], request: dict[str, object]) -> None:
    while True:
        report("noise" * 1000)


def many_threads(report: Callable[[str], None], request: dict[str, object]) -> None:
    threading.stack_size(64 << 10)
    end, started = threading.Event(), 0
    try:
        while started < 4000:
            threading.Thread(target=end.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        report("refused")
    report(f"{started} started")
    end.set()


def escape(report: Callable[[str], None], request: dict[str, object]) -> None:
    outside, inside, scratch = str(request["outside"]), str(request["inside"]), str(request["scratch"])
    attempt(report, "tcp socket", lambda: socket.socket())
    attempt(report, "unix socket", lambda: socket.socket(socket.AF_UNIX))
    attempt(report, "fork", os.fork)
    attempt(report, "exec", lambda: os.execv("/bin/true", ["true"]))
    attempt(report, "subprocess", lambda: subprocess.run(["/bin/true"], check=True))
    attempt(report, "new session", os.setsid)
    attempt(report, "signal parent", lambda: os.kill(os.getppid(), 0))
    attempt(report, "read outside", lambda: open(outside).read())
    attempt(report, "list root", lambda: os.listdir("/root"))
    attempt(report, "read parent's memory", lambda: open(f"/proc/{os.getppid()}/environ", "rb").read())
    attempt(report, "write outside", lambda: open(outside + ".new", "w"))
    attempt(report, "change artifact", lambda: open(inside, "r+"))
    attempt(report, "delete artifact", lambda: os.unlink(inside))
    attempt(report, "link artifact away", lambda: os.rename(inside, scratch + "/stolen"))
    attempt(report, "ptrace", lambda: _syscall({"x86_64": 101}.get(os.uname().machine, 117), 0, 0, 0, 0))
    parent = os.getppid()
    attempt(report, "limit parent", lambda: resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0)))
    attempt(report, "put parent behind", lambda: os.sched_setscheduler(parent, os.SCHED_OTHER, os.sched_param(0)))
    attempt(report, "pin parent", lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)))
    attempt(report, "renice parent", lambda: os.setpriority(os.PRIO_PROCESS, parent, 0))
    attempt(report, "have the kernel signal parent", lambda: fcntl.fcntl(1, fcntl.F_SETOWN, parent))
    attempt(report, "outlive parent", lambda: _prctl(_PR_SET_PDEATHSIG, 0))
    attempt(report, "type at the terminal", lambda: fcntl.ioctl(0, 0x5412, b"x"))
    attempt(report, "open a file to all", lambda: os.chmod(outside, 0o666))
    attempt(report, "close a folder to all", lambda: os.chmod(os.path.dirname(outside), 0))
    attempt(report, "give a file away", lambda: os.chown(outside, os.getuid(), os.getgid()))
    attempt(report, "date a file back", lambda: os.utime(outside, (0, 0)))
    attempt(report, "mark a file", lambda: os.setxattr(outside, "user.mark", b"x"))
    # Kernels before 6.2 let it empty what it may open: with a folder that it may write, this one does too.
    attempt(report, "cut a file by its name", lambda: os.truncate(scratch + "/kept", 4))
    attempt(report, "empty a file by reading", lambda: os.open(scratch + "/kept", os.O_RDONLY | os.O_TRUNC))
    shmget = {"x86_64": 29, "armv7l": 307}.get(os.uname().machine, 194)
    attempt(report, "memory that outlives it", lambda: _syscall(shmget, 0, 4096, 0o1600))
    # What a model needs must still work.
    attempt(report, "limit itself", lambda: resource.prlimit(0, resource.RLIMIT_CORE, (0, 0)))
    attempt(report, "pin itself", lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))
    attempt(report, "name itself", lambda: _prctl(_PR_SET_NAME, ctypes.create_string_buffer(b"model")))
    attempt(report, "empty a file by writing", lambda: os.open(scratch + "/kept", os.O_WRONLY | os.O_TRUNC))
    attempt(report, "read artifact", lambda: open(inside).read())
    attempt(report, "write scratch", lambda: open(scratch + "/small", "w").write("x"))
    thread = threading.Thread(target=report, args=("thread: done",))
    thread.start()
    thread.join()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    attempt(report, "fill the disk", lambda: _fill(scratch + "/large"))


def _fill(path: str) -> None:
    with open(path, "wb", buffering=0) as stream:
        for _ in range(64):
            if stream.write(bytes(1 << 20)) != 1 << 20:
                raise OSError("short write")


def _prctl(option: int, value: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def _syscall(number: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


DEEDS: dict[str, Callable[[Callable[[str], None], dict[str, object]], None]] = {
    deed.__name__: deed
    for deed in (
        tell_place,
        look_around,
        segfault,
        illegal_instruction,
        abort,
        hang,
        eat_memory,
        reserve_memory,
        flood,
        many_threads,
        escape,
    )
}

if __name__ == "__main__":
    main()
