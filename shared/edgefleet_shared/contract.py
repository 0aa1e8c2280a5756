"""Stage 7, accept: the acceptance contract and its verdict. Pure: receives figures, hands on a judged report.

The contract is part of the signed artifact. It says what a board must measure before a candidate may serve:
golden pictures answered like the float model, in time, in memory, by the engine that was meant, cool enough.

Verdicts are four different things and only ``passed`` advances (Argo Rollouts' ``analysis``): *failed* is the model's fault,
*inconclusive* means this board could not tell now (busy, throttling), *error* means the measuring itself broke.
A contract that would measure nothing is refused: there is no vacuous pass.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Literal

import msgspec

from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.reading import AnswerKind, BoxDecoding, MaskReading, TextReading


class Verdict(str, Enum):
    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


# A board that accepts heeds no other assignment, and the deployment's own time does not end it: what hangs must not hold it for ever.
MAX_ACCEPTANCE_S = 6 * 3600.0
# Nor while it makes the plans of what serves anew, which no deployment bounds.
MAX_BUILD_S = 6 * 3600.0

CHANNELS = (1, 3, 4)  # of a picture: grey, three colours, these and how opaque it is
MAX_WAITED_SHARE = 0.25  # of the time, for a core; beyond that, what time was measured says little of the model

# When several checks disagree the first in this order wins: a proven fault outweighs a doubt.
_GRAVITY = (Verdict.FAILED, Verdict.ERROR, Verdict.INCONCLUSIVE, Verdict.PASSED)


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output as it is served. ``datatype`` is the Open Inference Protocol's name (FP32, UINT8, INT64, ...);
    ``shape`` has -1 where any size is served."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class PictureEncoding(msgspec.Struct, frozen=True):
    """How stored pictures become the input tensor: ``x = (u8 - mean) / std``, then the layout.

    Golden pictures are stored as uint8, N x H x W x C, a quarter of their float size. ``mean`` and ``std`` have one value per
    channel of the picture or a single one for all; ``colour`` says which order the *network* wants (stored pictures are RGB).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    colour: Literal["RGB", "BGR", "GREY"] = "RGB"


def picture_size(tensor: TensorSpec, encoding: PictureEncoding | None) -> tuple[int, int]:
    """Rows and columns of an input of four axes, which is a picture; without an encoding, its channels are where there are few."""
    _, second, third, last = tensor.shape
    last_are_channels = (
        encoding.layout == "NHWC" if encoding is not None else last in CHANNELS and second not in CHANNELS
    )
    return (second, third) if last_are_channels else (third, last)


class ShadowPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How an accepted candidate answers live requests beside what serves, unseen, before it may serve; ``requests`` 0: not at all.

    ``requests`` is how many must be compared within ``time_limit_s``; ``min_agreement`` the share of them that both answer alike,
    by the contract's kind; ``max_latency_ratio`` the median of the engine's time against that of what serves (None: not looked at).
    """

    requests: int = 0
    min_agreement: float = 0.0
    max_latency_ratio: float | None = None
    time_limit_s: float = 300.0


class BuildBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What making a plan on the board may cost, for engines that need one: wall time, resident memory of the child that builds, and
    the size of the plan."""

    time_limit_s: float = 900.0
    memory_bytes: int = 2 << 30
    disk_bytes: int = 1 << 30


class ShadowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the runtime counted while a candidate answered unseen. ``compared`` requests were answered by both, ``agreed`` of them alike, ``failed`` by
    what serves alone. ``partly`` is what a detector's other answers have in common, in all: of each the lower of recall and precision of its
    boxes. Times are the engine's, medians in ms, None before the first."""

    manifest: str
    compared: int = 0
    agreed: int = 0  # an agent of before reads this from its journal: it stays a whole number
    failed: int = 0
    p50_ms: float | None = None
    serving_p50_ms: float | None = None
    partly: float = 0.0

    @property
    def alike(self) -> float:
        """How many requests' worth of answers were alike."""
        return self.agreed + self.partly


class OutputTolerance(msgspec.Struct, frozen=True):
    """How far the values of one output may lie from the float model's: ``tolerance_abs + tolerance_rel * |reference|``."""

    name: str
    tolerance_abs: float
    tolerance_rel: float


class AcceptanceContract(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate must show on the board.

    ``agreement`` is, by ``kind``, the share of golden samples with the float reference's answer: the same top-1 class at every place (``classification``),
    the same line (``text``), the same masks (``segmentation``); the lower of recall and precision of the boxes in all of them (``detection``); or the share of
    values within ``tolerance_abs + tolerance_rel * |reference|`` (``raw``), of the output that has the smallest; ``tolerances`` are those of single
    outputs, where one does not suit all. ``detection``, ``masks`` and ``text`` say how outputs are read for that.
    ``min_cosine`` is the smallest allowed mean cosine between outputs and reference. Times in ms, memory in bytes (the peak
    of the child that holds engine and model), temperature in degrees Celsius. ``max_watts`` is the mean power of the whole board while
    it infers without a pause; a board that does not measure its power says so in the report and is not held against it.
    """

    kind: AnswerKind
    min_agreement: float
    latency_p95_ms: float
    peak_memory_bytes: int
    allowed_providers: tuple[str, ...]
    min_cosine: float = 0.0
    tolerance_abs: float = 0.0
    tolerance_rel: float = 0.0
    tolerances: tuple[OutputTolerance, ...] = ()
    detection: BoxDecoding | None = None
    masks: MaskReading = MaskReading()
    text: TextReading = TextReading()
    max_celsius: float | None = None
    max_watts: float | None = None
    min_golden: int = 8
    warmup_runs: int = 5
    timed_runs: int = 40
    time_limit_s: float = 120.0
    build: BuildBudget = BuildBudget()
    shadow: ShadowPlan = ShadowPlan()

    def tolerance(self, output: str) -> tuple[float, float]:
        """(absolute, relative) of an output, by name."""
        own = {one.name: (one.tolerance_abs, one.tolerance_rel) for one in self.tolerances}
        return own.get(output, (self.tolerance_abs, self.tolerance_rel))

    def check(self) -> None:
        """Refuse a contract that could not fail.

        Raises:
            ArtifactError: a limit is missing, out of range, or would let everything pass.
        """
        problems = []
        if not 0.0 < self.min_agreement <= 1.0:
            problems.append("min_agreement must lie in (0, 1]")
        if not self.latency_p95_ms > 0:
            problems.append("latency_p95_ms must be above 0")
        if self.peak_memory_bytes <= 0:
            problems.append("peak_memory_bytes must be above 0")
        if not self.allowed_providers:
            problems.append("allowed_providers must name at least one")
        if self.min_golden < 1 or self.timed_runs < 10 or self.warmup_runs < 1:
            problems.append("at least 1 golden picture, 10 timed runs and 1 warm-up run")
        if self.kind == "raw" and self.tolerance_abs <= 0 and self.tolerance_rel <= 0:
            problems.append("kind raw needs a tolerance")
        if (self.kind == "detection") != (self.detection is not None):
            problems.append("kind detection and how boxes are read go together")
        if any(
            one.tolerance_abs < 0 or one.tolerance_rel < 0 or not (one.tolerance_abs or one.tolerance_rel)
            for one in self.tolerances
        ):
            problems.append("the tolerance of an output must be above 0")
        if not 0 < self.time_limit_s <= MAX_ACCEPTANCE_S:
            problems.append(f"time_limit_s must be above 0 and at most {MAX_ACCEPTANCE_S:.0f}")
        if not (self.build.time_limit_s > 0 and self.build.memory_bytes > 0 and self.build.disk_bytes > 0):
            problems.append("build.time_limit_s, build.memory_bytes and build.disk_bytes must be above 0")
        if self.build.time_limit_s > MAX_BUILD_S:
            problems.append(f"build.time_limit_s must be at most {MAX_BUILD_S:.0f}")
        shadow = self.shadow
        if shadow.requests and not (0.0 < shadow.min_agreement <= 1.0 and shadow.time_limit_s > 0):
            problems.append("shadow needs a min_agreement in (0, 1] and a time_limit_s above 0")
        if shadow.requests < 0 or (shadow.max_latency_ratio is not None and not shadow.max_latency_ratio > 0):
            problems.append("shadow.requests must not be below 0, shadow.max_latency_ratio above 0")
        if self.max_watts is not None and not self.max_watts > 0:
            problems.append("max_watts must be above 0")
        if problems:
            raise ArtifactError("the acceptance contract is not usable: " + "; ".join(problems))


class AcceptanceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the accepting child measured on the board. ``None`` means: could not be measured; a ``cosine`` of None (in JSON, of
    NaN) means that an output held NaN or infinity."""

    golden_count: int
    agreement: float
    cosine: float | None
    load_ms: float
    first_ms: float
    p50_ms: float
    p95_ms: float
    peak_memory_bytes: int
    providers: tuple[str, ...]
    # CPU time over wall time of the timed runs, and the share of it that the thread which waited most has waited for a core; None where
    # not measured.
    cpu_share: float | None = None
    waited_share: float | None = None
    throttled: bool | None = None
    celsius_before: float | None = None
    celsius_after: float | None = None
    # Over the timed runs, of what ``power_scope`` says: the whole board, or the processor's package alone.
    watts: float | None = None
    joules_per_inference: float | None = None
    power_scope: Literal["board", "package"] | None = None


class Measurement(msgspec.Struct, frozen=True):
    """One judged figure. ``value`` and ``limit`` are in ``unit``; ``detail`` is for people. ``value`` None: no number came out,
    or none could be measured (JSON has no NaN, and a report that can't be read back would hide the failure)."""

    name: str
    verdict: Verdict
    value: float | None
    limit: float
    unit: str
    detail: str


class AcceptanceReport(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict over one candidate on one board, with every measurement behind it. ``unconfined`` names the layers of the
    sandbox that the board's kernel could not give, ``unmeasured`` what the contract asks and the board can't measure, each with
    its reason."""

    verdict: Verdict
    measurements: tuple[Measurement, ...] = ()
    figures: AcceptanceFigures | None = None
    shadow: ShadowFigures | None = None
    reason: str = ""
    unconfined: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()


def judge(contract: AcceptanceContract, figures: AcceptanceFigures) -> AcceptanceReport:
    """Hold measured figures against the contract.

    A latency that misses its limit is *inconclusive*, not failed, when the board was throttling or when the child had to wait for
    a core: then the board, not the model, was slow.

    Returns:
        the report; its verdict is the gravest of its measurements.
    """
    waited = figures.waited_share
    if waited is None and figures.cpu_share is not None:
        waited = (
            1.0 - figures.cpu_share
        )  # what was not computed was waited for: right for models that compute on the processor
    busy = is_busy(figures.throttled, waited)
    rows = [
        _row("golden_count", figures.golden_count >= contract.min_golden, figures.golden_count, contract.min_golden,
             "pictures", "golden pictures answered"),
        _row("agreement", figures.agreement >= contract.min_agreement, figures.agreement, contract.min_agreement,
             "share", "same answer as the float model"),
        _row("cosine", figures.cosine is not None and figures.cosine >= contract.min_cosine, figures.cosine,
             contract.min_cosine, "cosine", "mean cosine with the float model's output"),
        _row("latency_p95", figures.p95_ms <= contract.latency_p95_ms, figures.p95_ms, contract.latency_p95_ms,
             "ms", "the board was busy or throttling" if busy else "95th percentile after warm-up",
             otherwise=Verdict.INCONCLUSIVE if busy else Verdict.FAILED),
        _row("peak_memory", figures.peak_memory_bytes <= contract.peak_memory_bytes, figures.peak_memory_bytes,
             contract.peak_memory_bytes, "bytes", "peak of engine and model"),
    ]  # fmt: skip
    strangers = [p for p in figures.providers if p not in contract.allowed_providers]
    rows.append(
        _row("providers", bool(figures.providers) and not strangers, len(strangers), 0, "providers",
             f"used {', '.join(figures.providers) or 'none'}; allowed {', '.join(contract.allowed_providers)}")
    )  # fmt: skip
    if contract.max_celsius is not None:
        if figures.celsius_after is None:
            rows.append(Measurement("temperature", Verdict.INCONCLUSIVE, None, contract.max_celsius, "celsius",
                                    "the contract has a ceiling but this board has no sensor"))  # fmt: skip
        else:
            rows.append(_row("temperature", figures.celsius_after <= contract.max_celsius, figures.celsius_after,
                             contract.max_celsius, "celsius", "after the timed runs"))  # fmt: skip
    unmeasured = []
    if contract.max_watts is not None:
        if figures.watts is None or figures.power_scope != "board":
            what = "no sensor" if figures.watts is None else "a sensor of the processor's package alone"
            unmeasured.append(f"power against {contract.max_watts:.4g} watts: this board has {what}")
        else:
            rows.append(_row("power", figures.watts <= contract.max_watts, figures.watts, contract.max_watts,
                             "watts", "mean of the board while inferring without a pause"))  # fmt: skip
    return _judged(AcceptanceReport(verdict=Verdict.PASSED, figures=figures, unmeasured=tuple(unmeasured)), tuple(rows))


def is_busy(throttled: bool | None, waited_share: float | None) -> bool:
    """Whether the board, not the model, is to blame for time: it was throttling, or a thread had to wait for a core for too much of it."""
    return bool(throttled) or (waited_share is not None and waited_share > MAX_WAITED_SHARE)


def judge_shadow(plan: ShadowPlan, figures: ShadowFigures, report: AcceptanceReport) -> AcceptanceReport:
    """Add what a candidate showed on live requests to the report of its acceptance.

    Too few requests within the time are *inconclusive*: nobody asked, so nothing is known. A candidate that disagrees, fails or is slow
    has failed whatever their number.
    """
    seen = figures.compared + figures.failed
    enough = seen >= plan.requests
    share = figures.alike / seen if seen else None
    rows = [
        _row("shadow_requests", enough, seen, plan.requests, "requests", "live requests answered beside what serves",
             otherwise=Verdict.INCONCLUSIVE),
    ]  # fmt: skip
    if share is not None:
        # Before there are enough, one odd answer of a handful is no verdict.
        rows.append(_row("shadow_agreement", share >= plan.min_agreement, share, plan.min_agreement, "share",
                         "same answer as what serves, on live requests",
                         otherwise=Verdict.FAILED if enough else Verdict.INCONCLUSIVE))  # fmt: skip
    if plan.max_latency_ratio is not None and figures.p50_ms is not None and figures.serving_p50_ms:
        ratio = figures.p50_ms / figures.serving_p50_ms
        rows.append(_row("shadow_latency", ratio <= plan.max_latency_ratio, ratio, plan.max_latency_ratio, "times",
                         "median of the engine's time against what serves, on live requests",
                         otherwise=Verdict.FAILED if enough else Verdict.INCONCLUSIVE))  # fmt: skip
    return _judged(msgspec.structs.replace(report, shadow=figures), (*report.measurements, *rows))


def doubted(report: AcceptanceReport, reason: str) -> AcceptanceReport:
    """The report of a candidate on a board that could not tell whether it serves, or go on telling."""
    return msgspec.structs.replace(report, verdict=Verdict.INCONCLUSIVE, reason=reason)


def _judged(report: AcceptanceReport, rows: tuple[Measurement, ...]) -> AcceptanceReport:
    """The report with these measurements, and with the gravest of their verdicts."""
    verdict = next(v for v in _GRAVITY if any(r.verdict is v for r in rows))
    reason = "; ".join(
        f"{r.name} {'no number' if r.value is None else format(r.value, '.4g')} against {r.limit:.4g} {r.unit}: {r.detail}"
        for r in rows
        if r.verdict is verdict
    )
    passed = verdict is Verdict.PASSED
    return msgspec.structs.replace(report, verdict=verdict, measurements=rows, reason="" if passed else reason)


def _row(
    name: str,
    met: bool,
    value: float | None,
    limit: float,
    unit: str,
    detail: str,
    otherwise: Verdict = Verdict.FAILED,
) -> Measurement:
    # NaN compares false with everything, so a figure that is not a number never passes.
    number = float(value) if value is not None and math.isfinite(value) else None
    return Measurement(name, Verdict.PASSED if met else otherwise, number, float(limit), unit, detail)
