"""Stage 2, compile: child processes. Receives a command, hands on its lines as they come and its exit status; ends it when told to.

Between this process and a child stands a guard (:mod:`.guard`): whatever ends the child (its own end, cancel, time, memory, the death of this
process) ends all that it started, vendors' compilers too. What it and its libraries print besides goes to a log that outlives it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from edgefleet_shared.errors import ToolchainError, ToolchainUnusable

from edgefleet_controller.compile import guard

POLL_S = 0.05  # how often cancel, time and memory are looked at
MAX_LINE_BYTES = 16 * 1024 * 1024  # of an answer; what is longer is none
MAX_LOG_BYTES = 256 * 1024 * 1024  # of one child: what prints more is in a loop, and would fill the disk
LAST_WORDS_BYTES = 256 * 1024
DIED = " process died: "
# What ends a process through no doing of what it was given, and what that says of the machine.
OF_THE_MACHINE = {
    signal.SIGKILL: "as when this machine runs out of memory",
    signal.SIGILL: "as when this machine's processor lacks an instruction that the program was built with",
    signal.SIGBUS: "as when this machine's disk can't give back, or has no room for, what the program mapped",
}


class Cancelled(ToolchainError):
    """The operator, or the program's end, cancelled a compile."""

    code = "cancelled"


class TimeUp(ToolchainError):
    """A child ran past its time limit."""


class ChildDied(ToolchainError):
    """A child crashed, or was killed because it outgrew its memory limit; ``how`` is for people."""

    code = "child_died"
    ended = "engine died"  # where it ran one

    @property
    def how(self) -> str:
        return self.message.partition(DIED)[2]


class ChildKilled(ChildDied):
    """The kernel, or a person, ended a child (:data:`OF_THE_MACHINE`): that tells of the machine, not of what the child was given."""

    code = "child_killed"


class EngineFailed(ToolchainError):
    """The engine, in a child, raised an error over a compiled model or over a sample in it; ``how`` is for people."""

    code = "compiled_model_failed"
    ended = "engine failed"

    @property
    def how(self) -> str:
        return self.message


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and within which limits.

    ``name`` is for messages. ``memory_bytes``: killed when more than this is resident, of it and all that it started (None: no limit).
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    folder: Path
    log: Path
    limit_s: float
    memory_bytes: int | None = None


def watch(child: Child, line: Callable[[bytes], None], cancel: threading.Event) -> int:
    """Run a child to its end, and what it started with it; returns its exit status, negative for a signal.

    Args:
        line: gets each line of its standard output, without the newline. What it raises ends the child.

    Raises:
        Cancelled: the event was set. ChildDied: over its memory. ToolchainUnusable: can't be started. TimeUp: ran past its limit. ToolchainError: floods
            its log.
    """
    deadline = time.monotonic() + child.limit_s
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with child.log.open("ab") as log:
        longest_log = os.fstat(log.fileno()).st_size + MAX_LOG_BYTES
        process = _start(child, log.fileno())
    assert process.stdout is not None
    pending = b""
    try:
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdout.fileno(), False)
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:  # the guard holds the other end, too: it is open until all have ended
                _check(child, process.pid, deadline, longest_log, cancel)
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
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        # A kernel that tells nobody's children (no CONFIG_PROC_CHILDREN, not Linux): at least whoever stayed in the guard's group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def died(name: str, number: int, log: str) -> ChildDied:
    """How a child of that name was ended by a signal."""
    kind = ChildKilled if number in OF_THE_MACHINE else ChildDied
    return kind(f"the {name}{DIED}{signal_name(number)}", hint=log)


def signal_name(number: int) -> str:
    """A signal in words, with what it is the usual sign of where that is this machine."""
    try:
        found = signal.Signals(number)
    except ValueError:
        return f"signal {number}"
    return f"{found.name}, {OF_THE_MACHINE[found]}" if found in OF_THE_MACHINE else found.name


def last_words(log: Path) -> str:
    """A log's end."""
    with log.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - LAST_WORDS_BYTES))
        return stream.read(LAST_WORDS_BYTES).decode(errors="replace")


def last_line(log: Path) -> str:
    """The last line of a log that says anything: where Python and most tools put the reason."""
    lines = [line.strip() for line in last_words(log).splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no output"


def _start(child: Child, log: int) -> subprocess.Popen[bytes]:
    """The guard of the child, which starts it."""
    program = child.command[0]
    if shutil.which(program) is None:
        raise ToolchainUnusable(
            f"can't start {program}: it is no program here", hint="fleet toolchain check says what is missing"
        )
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *child.command], cwd=child.folder, env=child.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    except OSError as exc:
        raise ToolchainUnusable(f"can't start {program}: {exc.strerror}") from exc


def _check(child: Child, pid: int, deadline: float, longest_log: int, cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled(f"{child.name} was cancelled")
    if time.monotonic() > deadline:
        raise TimeUp(
            f"{child.name} ran past its limit of {child.limit_s:.0f} s and was stopped", hint=f"see {child.log}"
        )
    if child.log.stat().st_size > longest_log:
        raise ToolchainError(
            f"{child.name} printed more than {MAX_LOG_BYTES / 1e6:.0f} MB and was stopped", hint=f"see {child.log}"
        )
    if child.memory_bytes is not None and _resident_bytes(pid) > child.memory_bytes:
        how = f"over its memory limit of {child.memory_bytes} bytes (SIGKILL)"
        raise ChildDied(f"the {child.name}{DIED}{how}", hint=f"see {child.log}")


def _resident_bytes(guarding: int) -> int:
    """Of all that a guard started."""
    pages, left = 0, guard.children(guarding)
    while left:
        pid = left.pop()
        left += guard.children(pid)
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
