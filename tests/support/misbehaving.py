"""A sandboxed child that behaves as badly as it is told: ``python -m support.misbehaving REPORT_FD`` with JSON on stdin.

Stands where a hostile model would: after the confinement. What it achieved goes to the report pipe, one JSON string per line.
"""

# ruff: noqa: SIM115  a deed that should be refused needs no context manager
from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from edgefleet_agent import confinement
from edgefleet_agent.confinement import Policy


def main() -> None:
    request = json.load(sys.stdin)
    report_fd = int(sys.argv[1])

    def report(text: str) -> None:
        os.write(report_fd, json.dumps(text).encode() + b"\n")

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
    # What a model needs must still work.
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


def _syscall(number: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


DEEDS: dict[str, Callable[[Callable[[str], None], dict[str, object]], None]] = {
    deed.__name__: deed
    for deed in (segfault, illegal_instruction, abort, hang, eat_memory, reserve_memory, flood, escape)
}

if __name__ == "__main__":
    main()
