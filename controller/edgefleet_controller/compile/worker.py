"""Stage 2, compile: one job in a process of its own. Receives a request (one line on stdin), hands back lines: progress, then result or error.

Run as ``python -m edgefleet_controller.compile.worker`` by :mod:`edgefleet_controller.compile.jobs`. A compiler that eats memory or
crashes takes this process with it and nothing else.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem

from edgefleet_controller import source
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifest_files import parse_value
from edgefleet_controller.manifests import DeviceClass

MAX_VERSION_BYTES = 16 * 1024 * 1024


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """server -> worker. ``device_class`` is the class's manifest as JSON; folders are absolute."""

    layout: str
    cache: str
    version: str
    device_class: str
    ship_despite_quality: bool = False


class Step(msgspec.Struct, frozen=True, tag="step"):
    """worker -> server: what it is doing; ``done`` of ``total``."""

    doing: str
    done: int
    total: int


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    result: CompileResult


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    error: dict[str, str]


Line = Step | Finished | Failed


def main() -> int:
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=JobRequest)
    cancel = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: cancel.set())
    threading.Thread(target=_watch_controller, args=(cancel,), name="watch-controller", daemon=True).start()
    # Whatever a library prints must not end up between our lines.
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(line: Line) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")

    try:
        say(Finished(_compile(request, cancel, say)))
    except EdgefleetError as exc:
        say(Failed(exc.as_dict()))
    except MemoryError:
        say(Failed(EnvironmentProblem("the compile worker ran out of memory").as_dict()))
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = EnvironmentProblem(
            f"the disk is full: {exc.filename or request.cache} can't be written", hint="make room"
        )
        say(Failed(problem.as_dict()))
    return 0


def _watch_controller(cancel: threading.Event) -> None:
    """The controller holds the other end of stdin: when that closes it is gone, and the next one runs this job again. Read from the
    descriptor, because a thread that waits inside ``sys.stdin`` would block the interpreter's end."""
    while os.read(0, 4096):
        pass
    cancel.set()


def _compile(request: JobRequest, cancel: threading.Event, say: Callable[[Line], None]) -> CompileResult:
    layout, cache = Layout(Path(request.layout)), Path(request.cache)
    manifest = parse_value(msgspec.json.decode(request.device_class))
    assert isinstance(manifest, DeviceClass)
    return compile_version(
        source.decode(layout.read(request.version, MAX_VERSION_BYTES)),
        manifest,
        layout,
        Toolchains(cache, cancel=cancel),
        cache=cache,
        ship_despite_quality=request.ship_despite_quality,
        progress=lambda doing, done, total: say(Step(doing, done, total)),
    )


if __name__ == "__main__":
    sys.exit(main())
