"""Stage 2, compile: the measuring of candidates. Receives compiled models, hands on figures, what they miss, and the outputs behind them.

On this host, where it could be a board of the class, or runs what stands in for one; on a builder board of the class, where there is
one; else what is not known is told as unmeasured, and the boards' acceptance decides.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from edgefleet_shared import chunks
from edgefleet_shared.artifact import Layout, digest_file
from safetensors.numpy import load_file

from edgefleet_controller.compile import quality
from edgefleet_controller.compile.boards import BuilderBoard, Measure
from edgefleet_controller.compile.cache import content_key
from edgefleet_controller.compile.host import cpu_features
from edgefleet_controller.compile.port import HOST, Figures, Target, engine_version
from edgefleet_controller.compile.recipe import Recipe
from edgefleet_controller.compile.search import Candidate
from edgefleet_controller.compile.steps import Steps, stands_in
from edgefleet_controller.compile.toolchains import Toolchain
from edgefleet_controller.compile.watching import ChildDied, ChildKilled, EngineFailed
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion

HOST_OVERHEAD_BYTES = 128 * 1024 * 1024  # samples, outputs and the float model beside the compiled one while timing
MOST_FOR_SEVERAL = 100  # held-out samples that candidates of one round are told apart by; the chosen one answers all


class Measured(NamedTuple):
    """One candidate with the outputs it was judged by (empty where the engine died) and the samples that got another answer."""

    candidate: Candidate
    outputs: dict[str, Any]
    changed: tuple[int, ...]


class Evaluator:
    """Measures the candidates of one compile.

    Args:
        toolchain: the target's.
        measure: has a builder board of the class measure a candidate; None where there is none.
    """

    def __init__(
        self, steps: Steps, version: ModelVersion, device_class: DeviceClass, target: Target, toolchain: Toolchain, layout: Layout,
        measure: Measure | None,
    ) -> None:  # fmt: skip
        self._steps, self._version, self._class, self._target = steps, version, device_class, target
        self._toolchain, self._layout, self._measure = toolchain, layout, measure
        self._board: BuilderBoard | None = None
        self._numbers = iter(range(10**9))

    @property
    def here(self) -> bool:
        """Whether times on this host mean something for the class: it could be a board of it."""
        spec = self._class.spec
        could = spec.arch == platform.machine() and set(spec.cpu_features) <= cpu_features()
        return could and spec.measure_on == "auto"

    @property
    def has_builder(self) -> bool:
        """Whether a builder board of the class is there to time what this host can't."""
        return not self.here and self._measure is not None

    def measure(self, tried: Sequence[tuple[Recipe, Path]]) -> list[Measured]:
        """Outputs over the held-out samples, and times interleaved with the float model's, of several compiled models in one process.

        Should that die, or the engine fail, of each alone, so that it is known whose fault it was. One alone answers all samples, several the first
        :data:`MOST_FOR_SEVERAL`; peak memory is a figure of one alone. What stands in for a compiled model gives answers only: its times and
        its memory are not the board's. What can't be run here at all is judged by boards alone.
        """
        float_model = self._steps.float_model()
        alone = len(tried) == 1
        if not self._target.runs_here:
            unheard = [self._unmeasured(*one, float_model) for one in tried]
            return [
                one._replace(candidate=self._on_board(one.candidate, path, alone=alone))
                for one, (_, path) in zip(unheard, tried, strict=True)
            ]
        count = self._version.holdout.count if alone else min(MOST_FOR_SEVERAL, self._version.holdout.count)
        outputs = [self._steps.work / f"outputs-{next(self._numbers)}.safetensors" for _ in tried]
        stood_in = any(stands_in(path) for _, path in tried)
        timed_here = self.here and not stood_in
        budget = self._class.spec.budgets.memory_bytes + HOST_OVERHEAD_BYTES
        budget += 4 * sum(path.stat().st_size for _, path in tried[1:])
        try:
            found = self._steps.run(
                {path: file for (_, path), file in zip(tried, outputs, strict=True)}, self._version.holdout, count,
                float_model=float_model if timed_here else None, memory_bytes=None if stood_in else budget,
            )  # fmt: skip
        except (ChildDied, EngineFailed) as exc:
            if not alone:
                return [self.measure([one])[0] for one in tried]
            if isinstance(exc, ChildKilled):  # by this machine: that tells nothing of the candidate
                raise
            return [self._died(*tried[0], float_model, f"{exc.ended}: {exc.how}")]
        times = found.get("times", [None] * len(tried))
        peak = found["peak_memory_bytes"] if alone and not stood_in else None
        measured = []
        for (recipe, path), file, taken in zip(tried, outputs, times, strict=True):
            base = msgspec.structs.replace(self._figures(path, float_model), samples=count)
            answered = load_file(file)
            compared = quality.compare(answered, self._steps.references(count), self._version)
            timed = {} if taken is None else taken | {f"float_{k}": v for k, v in found["float"].items()}
            unmeasured = () if timed_here else ("latency", "memory") if stood_in else ("latency",)
            figures = msgspec.structs.replace(
                base, **compared.figures, **timed, peak_memory_bytes=peak, unmeasured=unmeasured,
                timed_on=HOST if timed_here else "",
                stand_in=self._target.stand_in if stood_in else "",
            )  # fmt: skip
            misses = tuple(quality.misses(figures, self._class.spec, recipe))
            candidate = Candidate(recipe=recipe, figures=figures, misses=misses, key=self._steps.key(recipe))
            measured.append(Measured(self._on_board(candidate, path, alone=alone), answered, compared.changed))
        return measured

    def golden(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """(a compiled model's answers to the golden samples, the float model's), by output name.

        Raises:
            ChildDied, EngineFailed: the engine did, over them.
        """
        file = self._steps.work / f"golden-{next(self._numbers)}.safetensors"
        self._steps.run({path: file}, self._version.golden, self._version.golden.count)
        return load_file(file), load_file(self._steps.prepare() / "golden.safetensors")

    def _on_board(self, candidate: Candidate, path: Path, *, alone: bool) -> Candidate:
        """The candidate with a builder board's figures, where one has to tell them and is there."""
        if self.here or self._measure is None:
            return candidate
        if self._board is None:
            self._board = BuilderBoard(
                self._version, self._class, self._target, self._toolchain, self._layout, self._measure,
                self._steps.prepare() / "golden.safetensors",
            )  # fmt: skip
        recipe, float_model = self._steps.compiled_float()
        return self._board.measured(candidate, path, float_model, self._steps.key(recipe), alone=alone)

    def _figures(self, path: Path, float_model: Path) -> Figures:
        return Figures(
            engine=self._target.engine,
            engine_version=engine_version(self._target, self._toolchain.packages, self._toolchain.tools),
            float_bytes=float_model.stat().st_size,
            compiled_bytes=path.stat().st_size,
            wire_bytes=self._sent_bytes(path),
            float_wire_bytes=self._sent_bytes(float_model),
            samples=self._version.holdout.count,
        )

    def _sent_bytes(self, path: Path) -> int:
        """What is sent of a file; packing a float model to find out takes longer than measuring it."""

        def fill(staged: Path) -> None:
            (staged / "bytes").write_text(str(chunks.sent_bytes(path)))

        key = content_key("sent", digest_file(path), chunks.LEVEL)
        return int((self._steps.once("sent", key, fill) / "bytes").read_text())

    def _died(self, recipe: Recipe, path: Path, float_model: Path, how: str) -> Measured:
        missing = ("agreement", "latency", "memory")
        figures = msgspec.structs.replace(self._figures(path, float_model), unmeasured=missing)
        misses = (how, *quality.misses(figures, self._class.spec, recipe))
        return Measured(
            Candidate(recipe=recipe, figures=figures, misses=misses, key=self._steps.key(recipe), died=True), {}, ()
        )

    def _unmeasured(self, recipe: Recipe, path: Path, float_model: Path) -> Measured:
        figures = msgspec.structs.replace(
            self._figures(path, float_model), unmeasured=("agreement", "latency", "memory")
        )
        misses = tuple(quality.misses(figures, self._class.spec, recipe))
        return Measured(Candidate(recipe=recipe, figures=figures, misses=misses, key=self._steps.key(recipe)), {}, ())
