"""Stage 4, rollout: where a gate decides. Pure: receives what a wave's boards of one class measured, hands on the verdict.

Verdicts are four different things and only *passed* advances. The gravest row wins: a proven fault outweighs broken figures,
and these a doubt. A row with nothing to measure is neither pass nor fail; the rows on sample and outcomes are always measured, so
a gate over nobody is inconclusive, never passed. Modelled on Argo Rollouts' ``analysis/analysis.go``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

import msgspec
from edgefleet_shared.contract import Verdict
from edgefleet_shared.outcomes import Outcome

from edgefleet_controller.rollout.views import Figures, GateRow, GateSpec

# Fewer requests than this say nothing about a rate: one failure in two would read as 50 %.
MIN_REQUESTS = 20
# When more of a wave's boards fell silent than answered, the silence may be the version's doing: a person should look.
MAX_SILENT_SHARE = 0.5
NAMED_BOARDS = 10  # how many boards a reason names before it says "and n more"

_GRAVITY = (Verdict.FAILED, Verdict.ERROR, Verdict.INCONCLUSIVE)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One board for a gate. ``outcome`` None: no clear answer. Latencies in ms; ``before_p95_ms`` as it was before it changed."""

    device: str
    outcome: Outcome | None = None
    reason: str = ""
    accept_p95_ms: float | None = None
    before_p95_ms: float | None = None
    figures: Figures | None = None


class Report(msgspec.Struct, frozen=True):
    verdict: Verdict
    rows: tuple[GateRow, ...]
    reason: str


def judge(
    gate: GateSpec,
    wave: Sequence[Sample],
    *,
    earlier: Sequence[Sample] = (),
    silent: int = 0,
    baseline: Sequence[Sample] = (),
    share_over_all: bool = False,
) -> Report:
    """Hold a wave of one class against its gate.

    Args:
        wave: the wave's boards of the class, without those that fell silent.
        earlier: the class's boards of earlier waves: they add to the minimum sample and to the figures while serving.
        silent: how many boards fell silent in this wave after they were assigned.
        baseline: reachable boards of the class that serve something else.
        share_over_all: the failed share is taken over ``earlier`` too (the catch-up wave, whose boards trickle in: one
            failure among the first would otherwise be 100 %).

    Returns:
        the report; its reason is empty when it passed.
    """
    answered = [board for board in wave if board.outcome is not None]
    before = [board for board in earlier if board.outcome is not None]
    took = [board for board in (*before, *answered) if board.outcome is Outcome.SUCCEEDED]
    rows = [
        _sample(gate, len(answered), len(before)),
        _outcomes(gate, answered, before if share_over_all else []),
        _silent(silent, len(answered)),
    ]
    if gate.max_latency_ratio is not None:
        rows.append(_accept_ratio(gate.max_latency_ratio, took, baseline))
        rows.append(_serving_ratio(gate.max_latency_ratio, took, baseline))
    if gate.max_error_rate is not None:
        rows.append(_error_rate(gate.max_error_rate, took, baseline))
    if gate.max_drift is not None:
        rows.append(_drift(gate.max_drift, took, baseline))
    rows.append(_crashes(took, baseline))
    verdict = next((v for v in _GRAVITY if any(row.verdict is v for row in rows)), Verdict.PASSED)
    reason = "" if verdict is Verdict.PASSED else "; ".join(row.detail for row in rows if row.verdict is verdict)
    return Report(verdict, tuple(rows), reason)


def fails_for_certain(gate: GateSpec, failed: int, members: int) -> bool:
    """Whether so many failures fail the wave even if every other member takes it."""
    return failed > 0 and failed / members > gate.max_failed_share


def named(boards: Sequence[Sample]) -> str:
    """Boards with their outcome and reason, for a sentence."""
    told = [
        f"{b.device} {b.outcome.value if b.outcome else 'unclear'}{': ' + b.reason if b.reason else ''}"
        for b in boards[:NAMED_BOARDS]
    ]
    more = len(boards) - len(told)
    return ", ".join(told) + (f", and {more} more" if more > 0 else "")


def _sample(gate: GateSpec, answered: int, before: int) -> GateRow:
    total = answered + before
    if answered == 0:
        detail = "no board of this wave gave a clear answer"
    elif total < gate.min_sample:
        detail = f"{total} boards gave a clear answer, the gate needs {gate.min_sample}"
    else:
        detail = f"{total} boards gave a clear answer, {answered} of them in this wave"
    enough = answered > 0 and total >= gate.min_sample
    return GateRow(
        name="sample", verdict=Verdict.PASSED if enough else Verdict.INCONCLUSIVE, value=total, limit=gate.min_sample,
        unit="boards", detail=detail,
    )  # fmt: skip


def _outcomes(gate: GateSpec, answered: Sequence[Sample], before: Sequence[Sample]) -> GateRow:
    over = [*before, *answered]
    bad = [board for board in over if board.outcome is not Outcome.SUCCEEDED]
    if not over:
        return GateRow(name="outcomes", verdict=Verdict.INCONCLUSIVE, value=None, limit=gate.max_failed_share, unit="share",
                       detail="no outcome to judge")  # fmt: skip
    share = len(bad) / len(over)
    counts = ", ".join(
        f"{n} {o.value}"
        for o, n in sorted(Counter(b.outcome for b in over if b.outcome).items(), key=lambda e: e[0].value)
    )
    verdict = Verdict.PASSED if share <= gate.max_failed_share else Verdict.FAILED
    detail = f"{len(bad)} of {len(over)} boards failed, {share:.1%} against {gate.max_failed_share:.1%} allowed"
    detail += f" ({named(bad)})" if bad else f" ({counts})"
    return GateRow(
        name="outcomes", verdict=verdict, value=share, limit=gate.max_failed_share, unit="share", detail=detail
    )


def _silent(silent: int, answered: int) -> GateRow:
    share = silent / (silent + answered) if silent + answered else 0.0
    verdict = Verdict.PASSED if share <= MAX_SILENT_SHARE else Verdict.INCONCLUSIVE
    return GateRow(
        name="silent", verdict=verdict, value=share, limit=MAX_SILENT_SHARE, unit="share",
        detail=f"{silent} boards fell silent after they were assigned, {answered} answered",
    )  # fmt: skip


def _accept_ratio(limit: float, took: Sequence[Sample], baseline: Sequence[Sample]) -> GateRow:
    return _ratio(
        "acceptance_p95", limit,
        [b.accept_p95_ms for b in took if b.accept_p95_ms is not None],
        [b.accept_p95_ms for b in baseline if b.accept_p95_ms is not None],
        "p95 in acceptance",
    )  # fmt: skip


def _serving_ratio(limit: float, took: Sequence[Sample], baseline: Sequence[Sample]) -> GateRow:
    now = [b.figures.p95_ms for b in took if b.figures is not None and b.figures.p95_ms is not None]
    other = [b.figures.p95_ms for b in baseline if b.figures is not None and b.figures.p95_ms is not None]
    # When the whole class has changed there is no other board to compare with, only the same boards before.
    own = [b.before_p95_ms for b in took if b.before_p95_ms is not None]
    return _ratio("serving_p95", limit, now, other or own, "p95 while serving")


def _ratio(name: str, limit: float, now: list[float], before: list[float], what: str) -> GateRow:
    if not now or not before:
        lacking = "the new version's" if not now else "the baseline's"
        return GateRow(
            name=name, verdict=None, value=None, limit=limit, unit="ratio", detail=f"{what}: {lacking} is not known"
        )
    a, b = median(now), median(before)
    if not (0 <= a < float("inf") and 0 < b < float("inf")):
        return GateRow(name=name, verdict=Verdict.ERROR, value=None, limit=limit, unit="ratio",
                       detail=f"{what}: impossible figures, {a} and {b} ms")  # fmt: skip
    verdict = Verdict.PASSED if a / b <= limit else Verdict.FAILED
    return GateRow(
        name=name, verdict=verdict, value=a / b, limit=limit, unit="ratio",
        detail=f"{what}: median {a:.3g} ms on {len(now)} boards against the baseline's {b:.3g} ms, allowed {limit:.3g} times",
    )  # fmt: skip


def _error_rate(limit: float, took: Sequence[Sample], baseline: Sequence[Sample]) -> GateRow:
    requests, failed = _requests(took)
    base_requests, base_failed = _requests(baseline)
    if failed > requests or failed < 0:
        return GateRow(name="error_rate", verdict=Verdict.ERROR, value=None, limit=limit, unit="share",
                       detail=f"impossible figures: {failed} of {requests} requests failed")  # fmt: skip
    if requests < MIN_REQUESTS:
        return GateRow(name="error_rate", verdict=None, value=None, limit=limit, unit="share",
                       detail=f"{requests} requests seen, {MIN_REQUESTS} needed for a rate")  # fmt: skip
    rate = failed / requests
    known = base_requests >= MIN_REQUESTS
    base_rate = base_failed / base_requests if known else None
    verdict = Verdict.PASSED
    detail = f"{failed} of {requests} requests failed, {rate:.2%} against {limit:.2%} allowed"
    if base_rate is not None:
        detail += f"; baseline {base_rate:.2%}"
    if rate > limit:
        # If the untouched boards fail as often, the new version is not shown to be at fault, nor to be sound.
        verdict = Verdict.INCONCLUSIVE if base_rate is not None and rate <= base_rate else Verdict.FAILED
    return GateRow(name="error_rate", verdict=verdict, value=rate, limit=limit, unit="share", detail=detail)


def _drift(limit: float, took: Sequence[Sample], baseline: Sequence[Sample]) -> GateRow:
    """The new version on pictures that it was not made for, or answering as it did for none of its golden ones."""
    seen = {b.device: b.figures.drift for b in took if b.figures is not None and b.figures.drift is not None}
    if not seen:
        return GateRow(name="drift", verdict=None, value=None, limit=limit, unit="psi",
                       detail="no board can tell its drift yet; what it lacks is in fleet device show")  # fmt: skip
    if not all(0 <= drift < float("inf") for drift in seen.values()):
        return GateRow(name="drift", verdict=Verdict.ERROR, value=None, limit=limit, unit="psi",
                       detail=f"impossible figures: {sorted(seen.values())}")  # fmt: skip
    device, worst = max(seen.items(), key=lambda entry: entry[1])
    other = [b.figures.drift for b in baseline if b.figures is not None and b.figures.drift is not None]
    detail = f"{device} has drifted by {worst:.2f} from its golden set, {limit:.2f} allowed"
    verdict = Verdict.PASSED
    if worst > limit:
        # Where the boards with the old version see as strange a world, it is the world, and the new version is not shown to be at fault.
        verdict = Verdict.INCONCLUSIVE if other and median(other) > limit else Verdict.FAILED
        detail += f"; baseline {median(other):.2f}" if other else ""
    return GateRow(name="drift", verdict=verdict, value=worst, limit=limit, unit="psi", detail=detail)


def _requests(boards: Sequence[Sample]) -> tuple[int, int]:
    figures = [b.figures for b in boards if b.figures is not None]
    return sum(f.requests for f in figures), sum(f.failed for f in figures)


def _crashes(took: Sequence[Sample], baseline: Sequence[Sample]) -> GateRow:
    counts = [b.figures.crashes for b in took if b.figures is not None]
    if not counts:
        return GateRow(name="crashes", verdict=None, value=None, limit=None, unit="crashes per board",
                       detail="no health figures yet")  # fmt: skip
    allowed = max((b.figures.crashes for b in baseline if b.figures is not None), default=0)
    worst = max(counts)
    return GateRow(
        name="crashes", verdict=Verdict.PASSED if worst <= allowed else Verdict.FAILED, value=worst, limit=allowed,
        unit="crashes per board", detail=f"the engine crashed {worst} times on one board, at most {allowed} on the baseline",
    )  # fmt: skip
