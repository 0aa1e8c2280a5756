"""Stage 7, accept: the sandboxed child that builds. Receives a candidate, hands its plan through a pipe to :mod:`edgefleet_agent.build`.

``python -m edgefleet_agent.build_child REPORT_FD PIECE_FD`` with a :class:`~edgefleet_agent.build.BuildRequest` on stdin. It confines itself
before it imports the engine: a compiler is as much code from outside as the model that it reads. Each step is reported before it begins, so
that a crash can be told by what caused it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import MODEL_LAYER, Layout
from edgefleet_shared.errors import ArtifactError, EdgefleetError, EngineError, NotFoundError

from edgefleet_agent import confinement
from edgefleet_agent.build import Broke, BuildRequest, ChildReport, Confined, Made, Step
from edgefleet_agent.runtime.engines import devices


class _BoardBrokeError(Exception):
    """This board can't build: no fault of the artifact."""


def main() -> int:
    report_fd, piece_fd = int(sys.argv[1]), int(sys.argv[2])

    def report(message: ChildReport) -> None:
        os.write(report_fd, msgspec.json.encode(message) + b"\n")

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildRequest)
    confinement.die_with_parent()
    policy = confinement.Policy(readable=(request.layout,), writable=devices.of(request.engine))
    report(Confined(confinement.confine(policy)))
    try:
        report(_build(request, piece_fd, lambda *step: report(Step(*step))))
    except (EngineError, ArtifactError, NotFoundError) as exc:
        report(Broke("model", exc.message))
    except MemoryError:
        report(Broke("model", "out of memory"))
    except (_BoardBrokeError, EdgefleetError) as exc:
        report(Broke("board", str(exc)))
    return 0


def _build(request: BuildRequest, piece_fd: int, told: Callable[[str, int, int], None]) -> Made:
    told("reading the artifact", 0, 0)
    layout = Layout(Path(request.layout), read_only=True)
    manifest = layout.manifest(request.manifest)
    config = layout.config(manifest)
    model = manifest.layer(MODEL_LAYER)
    layout.check(model)

    from edgefleet_agent.runtime import engines
    from edgefleet_agent.runtime.engines.port import Builder

    told(f"loading the engine {config.engine}", 0, 0)
    try:
        engine = engines.find(config.engine)
        if not isinstance(engine, Builder):
            raise _BoardBrokeError(f"{config.engine} takes models as they are, there is nothing to build")
        if engine.available() is None:
            raise _BoardBrokeError(engine.missing())
        engine.load_library()
        key = engine.build_key()
    except EngineError as exc:
        raise _BoardBrokeError(str(exc)) from exc
    if key == request.have:
        return Made(key, anew=False)

    told("building", 0, 0)
    confinement.limit_address_space(request.address_space_bytes)
    with os.fdopen(piece_fd, "wb", closefd=False) as pieces:
        engine.build(layout.path(model.digest), config, request.memory_bytes, pieces, told)
    return Made(key, anew=True)


if __name__ == "__main__":
    sys.exit(main())
