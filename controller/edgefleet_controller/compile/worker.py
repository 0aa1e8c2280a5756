"""Stage 2, compile: one job in a process of its own. Receives a request (one line on stdin), hands back lines: progress, then result or error.

Run as ``python -m edgefleet_controller.compile.worker`` by :mod:`edgefleet_controller.compile.attempt`. A compiler that eats memory or
crashes takes this process with it and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.work import Answer, Progress

from edgefleet_controller import model_version
from edgefleet_controller.compile import guard
from edgefleet_controller.compile.cache_limit import keep_within
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.watching import Cancelled, last_words
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.manifests.files import parse_value

MAX_VERSION_BYTES = 16 * 1024 * 1024
CANCEL_POLL_S = 0.2
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}
MAX_LOG_CHARACTERS = 32 * 1024  # of each child: its last words


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks -> process. ``device_class`` is the class's manifest as JSON; folders are absolute; ``builder``: a board of the class is
    there to measure."""

    layout: str
    cache: str
    cache_limit_bytes: int
    version: str
    device_class: str
    ship_despite_quality: bool = False
    builder: bool = False


class Wanted(msgspec.Struct, frozen=True, tag="wanted"):
    """process -> who asked: an artifact that a board of its class shall measure. The answer is a line back."""

    manifest: str


class Said(msgspec.Struct, frozen=True, tag="said"):
    """process -> who asked: what the toolchains printed; before the end, however that is."""

    log: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    result: CompileResult


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    error: dict[str, str]


Line = Progress | Wanted | Said | Finished | Failed


def main() -> int:
    guard.go_first()
    asked = sys.stdin.buffer.readline()
    if not asked.endswith(b"\n"):  # who asked died over it
        return 0
    request = msgspec.json.decode(asked, type=JobRequest)
    cancel = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: cancel.set())
    answers: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(cancel, answers), name="listen", daemon=True).start()
    # Whatever a library prints must not end up between our lines.
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(line: Line) -> None:
        try:
            lines.write(msgspec.json.encode(line) + b"\n")
        except BrokenPipeError as exc:
            raise Cancelled("nobody listens any more") from exc

    def measure(manifest: str) -> Answer:
        say(Wanted(manifest))
        while True:
            with contextlib.suppress(Empty):
                return msgspec.json.decode(answers.get(timeout=CANCEL_POLL_S), type=Answer)
            if cancel.is_set():
                raise Cancelled("cancelled while a board measured")

    began = time.time()
    try:
        last: Line = Finished(_compile(request, cancel, say, measure))
    except EdgefleetError as exc:
        last = Failed(exc.as_dict())
    except MemoryError:
        last = Failed(EnvironmentProblem("the compile worker ran out of memory").as_dict())
    except OSError as exc:
        if exc.errno not in _FULL | _REFUSED:
            raise
        where = exc.filename or request.cache
        if exc.errno in _FULL:
            problem = EnvironmentProblem(f"the disk is full: {where} can't be written", hint="make room")
        else:
            problem = EnvironmentProblem(
                f"{where} can't be written: {exc.strerror}", hint="check owner, mode and mount"
            )
        last = Failed(problem.as_dict())
    with contextlib.suppress(EdgefleetError):  # where the version itself can't be read nothing ran
        say(Said(_log(request, began)))
    with contextlib.suppress(Cancelled):
        say(last)
    with contextlib.suppress(OSError):  # the job is done; the next one tries again
        keep_within(Path(request.cache), request.cache_limit_bytes, time.time())
    return 0


def _log(request: JobRequest, began: float) -> str:
    """What the job's children printed, each one's end, in the order in which they ended."""
    asked = model_version.decode(Layout(Path(request.layout)).read(request.version, MAX_VERSION_BYTES))
    name = msgspec.json.decode(request.device_class)["metadata"]["name"]
    job = f"{asked.model}-{asked.version}-{name}"
    files = (Path(request.cache) / "logs").glob(f"{job}-*.log")
    # Not those of a class whose name goes on after this one's.
    written = sorted((file.stat().st_mtime, file) for file in files if file.stem.rpartition("-")[0] == job)
    return "".join(
        f"== {file.stem.rpartition('-')[2]}\n{last_words(file)[-MAX_LOG_CHARACTERS:]}\n"
        for at, file in written
        if at >= began
    )


def _listen(cancel: threading.Event, answers: SimpleQueue[bytes]) -> None:
    """Answers come line by line. The other end of stdin is held by who listens: when that closes it is gone, and this job is another's.
    Read from the descriptor, because a thread that waits inside ``sys.stdin`` would block the interpreter's end."""
    pending = b""
    while piece := os.read(0, 65536):
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            answers.put(line)
    cancel.set()


def _compile(
    request: JobRequest, cancel: threading.Event, say: Callable[[Line], None], measure: Callable[[str], Answer]
) -> CompileResult:
    layout, cache = Layout(Path(request.layout)), Path(request.cache)
    manifest = parse_value(msgspec.json.decode(request.device_class))
    assert isinstance(manifest, DeviceClass)
    return compile_version(
        model_version.decode(layout.read(request.version, MAX_VERSION_BYTES)),
        manifest,
        layout,
        Toolchains(cache, cancel=cancel),
        cache=cache,
        ship_despite_quality=request.ship_despite_quality,
        progress=lambda doing, done, total: say(Progress(doing, done, total)),
        measure=measure if request.builder else None,
    )


if __name__ == "__main__":
    sys.exit(main())
