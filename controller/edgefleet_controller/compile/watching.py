"""Stage 2, compile: child processes. Receives a command, hands on its lines as they come and its exit status; ends it when told to.

A child leads a session of its own: whatever ends it (cancel, time, memory) ends all that it started, vendors' compilers too. What
it and its libraries print besides goes to a log that outlives it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from edgefleet_shared.errors import ToolchainError

POLL_S = 0.05  # how often cancel, time and memory are looked at
MAX_LINE_BYTES = 16 * 1024 * 1024  # of an answer; what is longer is none


class Cancelled(ToolchainError):
    """The operator, or the program's end, cancelled a compile."""

    code = "cancelled"


class ChildDied(ToolchainError):
    """A child crashed, or was killed because it outgrew its memory limit; ``how`` is for people."""

    code = "child_died"

    def __init__(self, name: str, how: str, log: str) -> None:
        self.how = how
        super().__init__(f"the {name} process died: {how}", hint=log)


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and within which limits.

    ``name`` is for messages. ``memory_bytes``: killed when more than this is resident (None: no limit).
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    folder: Path
    log: Path
    limit_s: float
    memory_bytes: int | None = None


def watch(child: Child, line: Callable[[bytes], None], cancel: threading.Event) -> int:
    """Run a child to its end; returns its exit status, negative for a signal.

    Args:
        line: gets each line of its standard output, without the newline. What it raises ends the child.

    Raises:
        Cancelled: the event was set. ChildDied: over its memory. ToolchainError: can't be started, or ran past its limit.
    """
    deadline = time.monotonic() + child.limit_s
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with child.log.open("ab") as log:
        process = _start(child, log.fileno())
    assert process.stdout is not None
    pending = b""
    try:
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdout.fileno(), False)
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                _check(child, process.pid, deadline, cancel)
                if not selector.select(timeout=POLL_S):
                    continue
                piece = process.stdout.read(65536)
                if not piece:
                    break
                *complete, pending = (pending + piece).split(b"\n")
                if len(pending) > MAX_LINE_BYTES:
                    raise ToolchainError(f"{child.name} prints a line without an end", hint=f"see {child.log}")
                for text in complete:
                    line(text)
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        if code != 0:  # what it had started may have outlived it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return code
    except subprocess.TimeoutExpired as exc:
        raise ToolchainError(f"{child.name} closed its output but did not end", hint=f"see {child.log}") from exc
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def signal_name(number: int) -> str:
    """A signal in words; SIGKILL without a cause of ours is what the kernel sends when memory runs out."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, as when this machine runs out of memory" if number == signal.SIGKILL else name


def last_line(log: Path) -> str:
    """The last line of a log that says anything: where Python and most tools put the reason."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no output"


def _start(child: Child, log: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(child.command), cwd=child.folder, env=child.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    except OSError as exc:
        raise ToolchainError(
            f"can't start {child.command[0]}: {exc.strerror}", hint="fleet toolchain check says what is missing"
        ) from exc


def _check(child: Child, pid: int, deadline: float, cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled(f"{child.name} was cancelled")
    if time.monotonic() > deadline:
        raise ToolchainError(
            f"{child.name} ran past its limit of {child.limit_s:.0f} s and was stopped", hint=f"see {child.log}"
        )
    if child.memory_bytes is not None and _resident_bytes(pid) > child.memory_bytes:
        how = f"over its memory limit of {child.memory_bytes} bytes (SIGKILL)"
        raise ChildDied(child.name, how, f"see {child.log}")


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0  # it has just ended
    return pages * os.sysconf("SC_PAGE_SIZE")
