"""Stage 7, accept: the sandboxed child: receives a candidate, hands on its figures, measured on this board.

``python -m edgefleet_agent.accept_child REPORT_FD`` with an :class:`~edgefleet_agent.accept.AcceptRequest` on stdin. It confines
itself, loads engine and model, answers every golden picture, then times inferences one after the other, as the runtime
will run them. Each stage is reported before it begins, so that a crash can be told by what caused it.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from edgefleet_shared.artifact import GOLDEN_LAYER, MODEL_LAYER, Layout, ModelConfig
from edgefleet_shared.contract import AcceptanceContract, AcceptanceFigures
from edgefleet_shared.errors import ArtifactError, EdgefleetError, EngineError, NotFoundError

from edgefleet_agent import confinement, run_queue, sensors
from edgefleet_agent.accept import AcceptRequest, Broke, ChildReport, Confined, Measured, Stage
from edgefleet_agent.power import PowerMeter, Scope, used_joules, watts
from edgefleet_agent.runtime.engines import devices
from edgefleet_agent.sandbox import memory_of

if TYPE_CHECKING:
    from edgefleet_agent.runtime.engines.port import Engine, Session
    from edgefleet_agent.runtime.tensors import Array

MAX_GOLDEN_BYTES = 1 << 30


class _MeasuringBrokeError(Exception):
    """This board can't measure: no fault of the artifact."""


def main() -> int:
    report_fd = int(sys.argv[1])

    def report(message: ChildReport) -> None:
        os.write(report_fd, msgspec.json.encode(message) + b"\n")

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=AcceptRequest)
    confinement.die_with_parent()
    policy = confinement.Policy(readable=(request.layout,), writable=devices.of(request.engine))
    missing = confinement.confine(policy)
    report(Confined(missing))

    def unconfined(more: tuple[str, ...]) -> None:
        report(Confined((*missing, *more)))

    if confinement.is_refused_threads(request.threads):
        report(Broke("board", f"the board has no room for the threads of an inference, {request.threads}"))
        return 0
    try:
        report(Measured(measure(request, lambda doing: report(Stage(doing)), unconfined)))
    except (EngineError, MemoryError) as exc:
        problem = exc.message if isinstance(exc, EngineError) else "out of memory"
        if confinement.is_refused_memory(request.memory_bytes):
            report(Broke("board", f"the board has no memory that the model may take: {problem}"))
        else:
            report(Broke("model", problem))
    except (ArtifactError, NotFoundError) as exc:
        report(Broke("model", exc.message))
    except (_MeasuringBrokeError, EdgefleetError) as exc:
        report(Broke("measuring", str(exc)))
    return 0


def measure(
    request: AcceptRequest, stage: Callable[[str], None], unconfined: Callable[[tuple[str, ...]], None]
) -> AcceptanceFigures:
    """Everything between a candidate and its figures.

    Args:
        stage: is told what is done next.
        unconfined: is told of what this kernel could not limit on the way.

    Raises:
        EngineError, ArtifactError, NotFoundError: the artifact's fault.
        _MeasuringBrokeError: this board's.
    """
    stage("reading the artifact")
    layout = Layout(Path(request.layout))
    manifest = layout.manifest(request.manifest)
    config = layout.config(manifest)
    model = manifest.layer(MODEL_LAYER)
    layout.check(model)

    stage(f"loading the engine {config.engine}")
    engine = _engine(config)
    from edgefleet_shared import answers, golden

    inputs, references = golden.unpack(
        layout.read(manifest.layer(GOLDEN_LAYER).digest, MAX_GOLDEN_BYTES), config.encoding
    )
    samples = _samples(config, inputs, references)
    celsius_before = sensors.hottest_celsius()

    path = _loadable(engine, layout, request.manifest)
    stage("loading the model")
    unconfined(confinement.limit_address_space(request.address_space_bytes))
    began = time.perf_counter()
    session = engine.load(path, config, request.threads)
    load_ms = (time.perf_counter() - began) * 1e3

    stage("running the first inference")
    began = time.perf_counter()
    session.run(samples[0])
    first_ms = (time.perf_counter() - began) * 1e3

    given = []
    for number, sample in enumerate(samples):
        stage(f"running golden picture {number}")
        given.append(session.run(sample))
    reading = answers.reading_of(config.contract, config.inputs, config.outputs, config.encoding)
    agreement, cosine = golden.compare(config.contract, reading, given, references)

    stage("timing inferences")
    timed = _time(session, samples, config.contract)
    ordered = sorted(timed.times_ms)
    return AcceptanceFigures(
        golden_count=len(samples),
        agreement=agreement,
        cosine=cosine,
        load_ms=load_ms,
        first_ms=first_ms,
        p50_ms=ordered[len(ordered) // 2],
        p95_ms=ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
        peak_memory_bytes=memory_of(os.getpid())[1],
        providers=session.providers,
        cpu_share=timed.cpu_share,
        waited_share=timed.waited_share,
        watts=timed.watts,
        joules_per_inference=timed.joules_per_inference,
        power_scope=timed.power_scope,
        throttled=sensors.throttled(most_mhz=request.most_mhz),
        celsius_before=celsius_before,
        celsius_after=sensors.hottest_celsius(),
    )


def _engine(config: ModelConfig) -> Engine:
    """The adapter, its library loaded already, so that the address space it takes does not count as the model's."""
    from edgefleet_agent.runtime import engines

    engine = engines.find(config.engine)
    if engine.available() is None:
        raise _MeasuringBrokeError(f"this board can't run {config.engine}: {engine.missing()}")
    try:
        engine.load_library()
    except EngineError as exc:
        raise _MeasuringBrokeError(str(exc)) from exc
    return engine


def _loadable(engine: Engine, layout: Layout, manifest: str) -> Path:
    """The file that the engine loads. A plan that is not there is no fault of the model's: building came before, or should have."""
    from edgefleet_agent.runtime.engines.port import loadable

    try:
        return loadable(engine, layout, manifest)
    except (NotFoundError, ArtifactError, EngineError) as exc:
        raise _MeasuringBrokeError(str(exc)) from exc


def _samples(config: ModelConfig, inputs: dict[str, Array], references: dict[str, Array]) -> list[dict[str, Array]]:
    """Golden inputs one by one, checked against what the artifact says it serves."""
    import numpy as np

    from edgefleet_agent.runtime.tensors import NUMPY

    promised, known = {spec.name: spec for spec in config.inputs}, {spec.name for spec in config.outputs}
    if set(inputs) != set(promised) or not set(references) <= known:
        raise ArtifactError(
            f"golden pictures are for {sorted(inputs)} -> {sorted(references)}, the model has {sorted(promised)} -> {sorted(known)}"
        )
    for name, values in inputs.items():
        spec = promised[name]
        row = values.shape[1:]
        if len(row) + 1 != len(spec.shape) or any(m not in (-1, n) for n, m in zip(row, spec.shape[1:], strict=True)):
            raise ArtifactError(f"golden pictures of {name} are {list(row)}, the model takes {list(spec.shape)}")
    count = len(next(iter(inputs.values())))
    return [
        {
            name: np.ascontiguousarray(values[i : i + 1], dtype=NUMPY[promised[name].datatype])
            for name, values in inputs.items()
        }
        for i in range(count)
    ]


class _Timed(NamedTuple):
    """What the timed runs took: each in ms, the shares of a core that they had and waited for, and power and energy where the board tells."""

    times_ms: list[float]
    cpu_share: float
    waited_share: float | None
    watts: float | None
    joules_per_inference: float | None
    power_scope: Scope | None


def _time(session: Session, samples: list[dict[str, Array]], contract: AcceptanceContract) -> _Timed:
    """The contract's timed runs after its warm-up."""
    cycle = itertools.cycle(samples)
    for _ in range(contract.warmup_runs):
        session.run(next(cycle))
    times_ms = []
    meter = PowerMeter()
    before, waits_before = meter.look(), run_queue.waits_s()
    cpu_began, began = time.process_time(), time.perf_counter()
    for _ in range(contract.timed_runs):
        one = time.perf_counter()
        session.run(next(cycle))
        times_ms.append((time.perf_counter() - one) * 1e3)
        after = meter.look()  # between two runs: a sensor of the moment is integrated
    wall = time.perf_counter() - began
    share = (time.process_time() - cpu_began) / wall if wall > 0 else 1.0
    waited = run_queue.longest_share(waits_before, run_queue.waits_s(), wall)
    joules = used_joules(before, after)
    each = joules / contract.timed_runs if joules is not None else None
    return _Timed(times_ms, min(1.0, share), waited, watts(before, after), each, meter.scope)


if __name__ == "__main__":
    sys.exit(main())
