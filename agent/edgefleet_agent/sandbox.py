"""A one-shot child under watch: receives a module and its request, hands on what it reported and how it ended.

The parent's half of the sandbox: own session, wall time, resident memory, the end of every descendant. The child confines
itself (:mod:`edgefleet_agent.confinement`) before it touches anything untrusted. The parent stays lean: nothing but the
standard library and msgspec.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.errors import EnvironmentProblem

POLL_S = 0.02  # how often resident memory is looked at; a child can grow some 100 MB in that time, not a gigabyte
MAX_REPORT_BYTES = 4 * 1024 * 1024
MAX_OUTPUT_BYTES = 8 * 1024


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the child may use: resident memory in bytes, wall time in seconds."""

    memory_bytes: int
    time_s: float


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a child ended.

    Args:
        problem: empty when it returned 0; else a phrase for people: ``killed by SIGSEGV``, ``over its memory limit of 1000 bytes``.
        signal: the signal that ended it by itself, 0 when none did or when this parent sent it.
        over_limit: this parent killed it for time or memory.
        reports: the lines that it wrote to its report pipe, in order.
        output: the end of what it wrote to stdout and stderr.
        peak_memory_bytes: highest resident memory that was seen.
    """

    problem: str
    signal: int
    over_limit: bool
    reports: tuple[bytes, ...]
    output: str
    peak_memory_bytes: int
    seconds: float


def describe_exit(returncode: int) -> str:
    """An exit status for people: ``killed by SIGSEGV``, ``ended with status 3``; empty for 0."""
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"ended with status {returncode}" if returncode else ""


def child_environment() -> dict[str, str]:
    """What a child inherits: where code lies and the language, no secrets, no proxy, no notify socket."""
    kept = (
        "PATH",
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "LANG",
        "LC_ALL",
        "LD_LIBRARY_PATH",
        "TZ",
        "EDGEFLEET_LAUNCHER",
    )
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    # One inference uses the threads that it was given, whatever library computes.
    return environment | {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }


def memory_of(pid: int) -> tuple[int, int]:
    """(resident now, highest so far) of a process in bytes; (0, 0) once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM")))
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def run(module: str, request: bytes, limits: Limits, on_report: Callable[[bytes], None] | None = None) -> Ended:
    """Run ``python -m module REPORT_FD`` with ``request`` on its stdin until it ends or breaks a limit.

    Args:
        on_report: called with each line as it comes.

    Raises:
        EnvironmentProblem: the child could not be started at all: no memory, too many processes.
    """
    try:
        return _run(module, request, limits, on_report)
    except OSError as exc:
        raise EnvironmentProblem(f"can't run {module} as a child: {exc.strerror or exc}") from exc


def _run(module: str, request: bytes, limits: Limits, on_report: Callable[[bytes], None] | None) -> Ended:
    report_read, report_write = os.pipe()
    output_read, output_write = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(report_write)],
            stdin=subprocess.PIPE,
            stdout=output_write,
            stderr=output_write,
            pass_fds=(report_write,),
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )
    except BaseException:
        os.close(report_read)
        os.close(output_read)
        raise
    finally:
        os.close(report_write)
        os.close(output_write)
    watch = _Watch(child, report_read, output_read, limits, on_report)
    try:
        assert child.stdin is not None
        # A request is a few hundred bytes: it fits the pipe, so this can't block on a child that does not read.
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(request)
            child.stdin.close()
        return watch.until_end()
    finally:
        _kill_session(child)
        child.wait()
        os.close(report_read)
        os.close(output_read)


def _kill_session(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


class _Watch:
    def __init__(
        self,
        child: subprocess.Popen[bytes],
        report_fd: int,
        output_fd: int,
        limits: Limits,
        on_report: Callable[[bytes], None] | None,
    ) -> None:
        self._child, self._limits, self._on_report = child, limits, on_report
        self._report_fd = report_fd
        self._pending, self._reports, self._report_bytes = b"", list[bytes](), 0
        self._output = b""
        self._peak = 0
        self._selector = selectors.DefaultSelector()
        for fd in (report_fd, output_fd):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)

    def until_end(self) -> Ended:
        began = time.monotonic()
        broken = ""
        while self._child.poll() is None:
            self._read(POLL_S)
            resident, highest = memory_of(self._child.pid)
            self._peak = max(self._peak, highest)
            if resident > self._limits.memory_bytes:
                broken = f"over its memory limit of {self._limits.memory_bytes} bytes"
            elif time.monotonic() - began > self._limits.time_s:
                broken = f"over its time limit of {self._limits.time_s:g} s"
            elif self._report_bytes > MAX_REPORT_BYTES:
                broken = f"over its report limit of {MAX_REPORT_BYTES} bytes"
            if broken:
                _kill_session(self._child)
                self._child.wait()
        self._read(0.0)
        self._selector.close()
        code = self._child.returncode
        return Ended(
            problem=broken or describe_exit(code),
            signal=-code if code < 0 and not broken else 0,
            over_limit=bool(broken),
            reports=tuple(self._reports),
            output=self._output.decode(errors="replace"),
            peak_memory_bytes=self._peak,
            seconds=time.monotonic() - began,
        )

    def _read(self, wait_s: float) -> None:
        if not self._selector.get_map():
            # Both pipes are closed: only the exit is left to wait for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(wait_s)
            return
        for key, _ in self._selector.select(wait_s):
            try:
                content = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            if not content:
                self._selector.unregister(key.fd)
            elif key.fd == self._report_fd:
                self._take_report(content)
            else:
                self._output = (self._output + content)[-MAX_OUTPUT_BYTES:]

    def _take_report(self, content: bytes) -> None:
        self._report_bytes += len(content)
        *lines, self._pending = (self._pending + content).split(b"\n")
        for line in lines:
            self._reports.append(line)
            if self._on_report is not None:
                self._on_report(line)
