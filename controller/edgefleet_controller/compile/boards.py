"""Stage 2, compile: figures from the class's own hardware. Receives candidates, hands on what a builder board measured of them.

A candidate is packed as the artifact that it would be shipped as, and a builder board of the class runs the very acceptance on it that every
board of the class would: latency, memory, agreement on the golden pictures. Float and candidate run one after the other there, not
interleaved. Where no builder board is there, or it could not tell (busy, throttling), the candidate stays unmeasured and the boards' acceptance decides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import AcceptanceFigures, AcceptanceReport, Verdict
from edgefleet_shared.work import Answer

from edgefleet_controller.compile import quality
from edgefleet_controller.compile.packing import pack
from edgefleet_controller.compile.port import Figures, Target
from edgefleet_controller.compile.recipe import FLOAT
from edgefleet_controller.compile.search import Candidate
from edgefleet_controller.compile.toolchains import Toolchain
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion

MOST_TRIES = 3
Measure = Callable[[str], Answer]  # an artifact's manifest digest -> what became of it


class BuilderBoard:
    """The builder boards of one class, as one.

    Args:
        answers: the file of the float model's answers to the golden samples.
    """

    def __init__(
        self, version: ModelVersion, device_class: DeviceClass, target: Target, toolchain: Toolchain, layout: Layout,
        measure: Measure, answers: Path,
    ) -> None:  # fmt: skip
        self._version, self._class, self._target, self._toolchain = version, device_class, target, toolchain
        self._layout, self._measure, self._answers = layout, measure, answers
        self._float: AcceptanceFigures | None = None
        self._float_told = False

    def measured(
        self, candidate: Candidate, model: Path, float_model: Path, float_key: str, *, alone: bool
    ) -> Candidate:
        """The candidate with the board's figures in it.

        Args:
            model, float_model: compiled for the class's engine.
            alone: whether its peak of memory is wanted, too.
        """
        answer = self._ask(candidate, model)
        report = answer.report
        if report is None or report.verdict is Verdict.ERROR or _was_busy(report):
            return candidate
        if report.figures is None:
            return _failed(candidate, answer.by, report)
        found = report.figures
        base = found if candidate.key == float_key else self._of_float(candidate, float_model, float_key)
        figures = msgspec.structs.replace(
            candidate.figures, p50_ms=found.p50_ms, p95_ms=found.p95_ms, timed_on=answer.by,
            unmeasured=() if candidate.figures.agreement is not None else ("agreement",),  # on held-out samples; the board saw golden ones
            float_p50_ms=base.p50_ms if base else None, float_p95_ms=base.p95_ms if base else None,
            peak_memory_bytes=found.peak_memory_bytes if alone else candidate.figures.peak_memory_bytes,
        )  # fmt: skip
        misses = tuple(quality.misses(figures, self._class.spec, candidate.recipe))
        measured = msgspec.structs.replace(candidate, figures=figures, misses=misses)
        return _failed(measured, answer.by, report) if report.verdict is Verdict.FAILED else measured

    def _of_float(self, candidate: Candidate, float_model: Path, float_key: str) -> AcceptanceFigures | None:
        """The float model on the board, measured once; None where it can't run there, or the board could not tell."""
        if not self._float_told:
            figures = _bare(candidate.figures, float_model)
            report = self._ask(Candidate(recipe=FLOAT, figures=figures, misses=(), key=float_key), float_model).report
            self._float_told = report is not None and report.verdict is not Verdict.ERROR and not _was_busy(report)
            self._float = report.figures if report is not None and self._float_told else None
        return self._float

    def _ask(self, candidate: Candidate, model: Path) -> Answer:
        """The board's word; asked again where it had no core to itself."""
        packed = pack(
            self._version, self._class, self._target, (self._toolchain,), self._layout, candidate, model, self._answers
        )
        answer = self._measure(packed.digest)
        for _ in range(MOST_TRIES - 1):
            if answer.report is None or not _was_busy(answer.report):
                break
            answer = self._measure(packed.digest)
        return answer


def _was_busy(report: AcceptanceReport) -> bool:
    """Whether the board itself says that its times tell nothing of the model."""
    doubted = any(row.name == "latency_p95" and row.verdict is Verdict.INCONCLUSIVE for row in report.measurements)
    return doubted and report.verdict is not Verdict.FAILED  # what else it proved against the model stands


def _failed(candidate: Candidate, board: str, report: AcceptanceReport) -> Candidate:
    return msgspec.structs.replace(
        candidate, misses=(*candidate.misses, f"refused by the builder board {board}: {report.reason}")
    )


def _bare(figures: Figures, model: Path) -> Figures:
    return Figures(
        engine=figures.engine, engine_version=figures.engine_version, float_bytes=figures.float_bytes,
        compiled_bytes=model.stat().st_size, samples=figures.samples,
    )  # fmt: skip
