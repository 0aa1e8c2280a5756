"""A one-shot child under watch: receives a module and its request, hands on what it reported and how it ended.

The parent's half of the sandbox: own session, wall time, resident memory, the end of every descendant, the first to go when memory ends. The child confines
itself (:mod:`edgefleet_agent.confinement`) before it touches anything untrusted. The parent stays lean: nothing but the
standard library and msgspec.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.errors import EnvironmentProblem

from edgefleet_agent import out_of_memory, run_queue

POLL_S = 0.02  # how often resident memory is looked at; a child can grow some 100 MB in that time, not a gigabyte
MAX_REPORT_BYTES = 4 * 1024 * 1024
MAX_OUTPUT_BYTES = 8 * 1024
LAST_READS = 64  # of what a child that ended left in its pipes, which hold far less


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the child may use: resident memory in bytes, wall time in seconds; how many bytes it may send where pieces are taken."""

    memory_bytes: int
    time_s: float
    piece_bytes: int = 0


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a child ended.

    Args:
        problem: empty when it returned 0; else a phrase for people: ``killed by SIGSEGV``, ``over its memory limit of 1000 bytes``.
        signal: the signal that ended it by itself, 0 when none did or when this parent sent it.
        over_limit: this parent killed it for time, memory, or what it sent.
        out_of_time: it was for time; then ``waited_share`` is the share of it that the child waited for a core, None where nobody knows.
        reports: the lines that it wrote to its report pipe, in order.
        output: the end of what it wrote to stdout and stderr.
        peak_memory_bytes: highest resident memory that was seen.
        starved: the kernel ended it for want of memory, of which it had taken no more than it may.
    """

    problem: str
    signal: int
    over_limit: bool
    reports: tuple[bytes, ...]
    output: str
    peak_memory_bytes: int
    seconds: float
    out_of_time: bool = False
    waited_share: float | None = None
    starved: bool = False

    def last_words(self) -> str:
        """See :func:`last_line`."""
        return last_line(self.output)


def last_line(output: str) -> str:
    """``: `` and the last line of what a child printed, for the end of a sentence; empty when it printed nothing. What no page shows is replaced: a
    terminal would obey it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return ""
    # By its number: a name makes Python load its table of names, a megabyte, where it compiles this.
    shown = "".join(c if c.isprintable() else "\ufffd" for c in lines[-1][:300])
    return f": {shown}"


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


def resident_bytes(pid: int) -> int:
    """What :func:`memory_of` says first, for whoever asks often: a fraction of its time."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return 0


def memory_of(pid: int) -> tuple[int, int]:
    """(resident now, highest so far) of a process in bytes; (0, 0) once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM")))
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def run(
    module: str, request: bytes, limits: Limits, on_report: Callable[[bytes], None] | None = None, *,
    on_piece: Callable[[bytes], None] | None = None, stop: threading.Event | None = None,
) -> Ended:  # fmt: skip
    """Run ``python -m module REPORT_FD`` with ``request`` on its stdin until it ends or breaks a limit.

    Args:
        on_report: called with each line as it comes.
        on_piece: the child gets a second descriptor, ``PIECE_FD``; called with what it sends there, as it comes.
        stop: the child is killed once this is set.

    Raises:
        EnvironmentProblem: the child could not be started at all: no memory, too many processes.
        Whatever ``on_report`` or ``on_piece`` raises; the child is killed.
    """
    try:
        child, pipes = _start(module, pieces=on_piece is not None)
    except OSError as exc:
        raise EnvironmentProblem(f"can't run {module} as a child: {exc.strerror or exc}") from exc
    out_of_memory.end_first(child.pid)
    takers: list[Callable[[bytes], None]] = [] if on_piece is None else [on_piece]
    watch = _Watch(child, pipes, limits, on_report, takers, stop)
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
        for fd in pipes:
            os.close(fd)


def _start(module: str, *, pieces: bool) -> tuple[subprocess.Popen[bytes], list[int]]:
    """The child, and the ends of its pipes that are read here: reports, output and, when asked for, pieces."""
    read: list[int] = []
    written: list[int] = []
    try:
        for _ in range(3 if pieces else 2):
            ends = os.pipe()
            read.append(ends[0])
            written.append(ends[1])
        given = (written[0], *written[2:])
        child = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=written[1],
            stderr=written[1],
            pass_fds=given,
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )
    except BaseException:
        for fd in read:
            os.close(fd)
        raise
    finally:
        for fd in written:
            os.close(fd)
    return child, read


def _kill_session(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


class _Watch:
    def __init__(
        self,
        child: subprocess.Popen[bytes],
        pipes: list[int],
        limits: Limits,
        on_report: Callable[[bytes], None] | None,
        takers: list[Callable[[bytes], None]],
        stop: threading.Event | None,
    ) -> None:
        self._child, self._limits, self._on_report = child, limits, on_report
        self._stop = stop or threading.Event()
        self._report_fd = pipes[0]
        self._takers = dict(zip(pipes[2:], takers, strict=True))
        self._piece_bytes = 0
        self._pending, self._reports, self._report_bytes = b"", list[bytes](), 0
        self._output = b""
        self._peak, self._kills_before = 0, out_of_memory.kills()
        self._selector = selectors.DefaultSelector()
        for fd in pipes:
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)

    def until_end(self) -> Ended:
        try:
            return self._until_end()
        finally:
            self._selector.close()

    def _until_end(self) -> Ended:
        began = time.monotonic()
        broken, out_of_time, waited_share = "", False, None
        while self._child.poll() is None:
            self._read(POLL_S)
            broken = self._broken_limit()
            if not broken and time.monotonic() - began > self._limits.time_s:
                broken, out_of_time = f"over its time limit of {self._limits.time_s:g} s", True
                waits = run_queue.waits_s(str(self._child.pid))
                waited_share = run_queue.longest_share({}, waits, time.monotonic() - began)
            if broken or self._stop.is_set():
                _kill_session(self._child)
                self._child.wait()
                break
        for _ in range(LAST_READS):
            if not self._read(0.0):
                break
        broken = broken or self._broken_limit()
        code, limit_bytes = self._child.returncode, self._limits.memory_bytes
        starved = not broken and out_of_memory.is_starved(code, self._peak, limit_bytes, self._kills_before)
        return Ended(
            problem=broken or describe_exit(code),
            starved=starved,
            signal=-code if code < 0 and not broken else 0,
            over_limit=bool(broken),
            out_of_time=out_of_time,
            waited_share=waited_share,
            reports=tuple(self._reports),
            output=self._output.decode(errors="replace"),
            peak_memory_bytes=self._peak,
            seconds=time.monotonic() - began,
        )

    def _broken_limit(self) -> str:
        """Which limit is broken, but for time; empty when none is."""
        resident, highest = memory_of(self._child.pid)
        self._peak = max(self._peak, highest)
        if resident > self._limits.memory_bytes:
            return f"over its memory limit of {self._limits.memory_bytes} bytes"
        if self._report_bytes > MAX_REPORT_BYTES:
            return f"over its report limit of {MAX_REPORT_BYTES} bytes"
        if self._piece_bytes > self._limits.piece_bytes:
            return f"over its limit of {self._limits.piece_bytes} bytes sent"
        return ""

    def _read(self, wait_s: float) -> bool:
        """Take what the pipes hold, or wait for it; returns whether there was something."""
        if not self._selector.get_map():
            # All pipes are closed: only the exit is left to wait for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(wait_s)
            return False
        something = False
        for key, _ in self._selector.select(wait_s):
            try:
                content = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            something = something or bool(content)
            if not content:
                self._selector.unregister(key.fd)
            elif key.fd == self._report_fd:
                self._take_report(content)
            elif key.fd in self._takers:
                self._piece_bytes += len(content)
                if self._piece_bytes <= self._limits.piece_bytes:
                    self._takers[key.fd](content)
            else:
                self._output = (self._output + content)[-MAX_OUTPUT_BYTES:]
        return something

    def _take_report(self, content: bytes) -> None:
        self._report_bytes += len(content)
        *lines, self._pending = (self._pending + content).split(b"\n")
        for line in lines:
            self._reports.append(line)
            if self._on_report is not None:
                self._on_report(line)
