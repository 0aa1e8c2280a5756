"""Where a gate decides: one table of cases, and the properties that no figure may break."""

from __future__ import annotations

import math

import pytest
from edgefleet_controller.rollout.gates import MIN_REQUESTS, Report, Sample, judge
from edgefleet_controller.rollout.views import Figures, GateSpec
from edgefleet_shared.contract import Verdict
from edgefleet_shared.outcomes import Outcome
from hypothesis import given
from hypothesis import strategies as st

TOOK, BACK = Outcome.SUCCEEDED, Outcome.FAILED_ROLLED_BACK


def boards(*outcomes: Outcome | None, name: str = "c", **fields: object) -> list[Sample]:
    return [Sample(device=f"{name}{n}", outcome=o, reason="why", **fields) for n, o in enumerate(outcomes)]  # type: ignore[arg-type]


def figures(
    requests: int = 1000, failed: int = 0, crashes: int = 0, p95_ms: float | None = None, drift: float | None = None
) -> Figures:
    return Figures(
        model="m", version="2", requests=requests, failed=failed, crashes=crashes, p95_ms=p95_ms, drift=drift
    )


def row(report: Report, name: str) -> Verdict | None:
    return next(r.verdict for r in report.rows if r.name == name)


ALL = GateSpec(max_error_rate=0.01, max_latency_ratio=1.5)
DRIFT = GateSpec(max_drift=0.3)

CASES = {
    "nobody at all": (GateSpec(), [], [], Verdict.INCONCLUSIVE),
    "nobody gave a clear answer": (GateSpec(), boards(None, None), [], Verdict.INCONCLUSIVE),
    "one took it": (GateSpec(), boards(TOOK), [], Verdict.PASSED),
    "one took it, two are needed": (GateSpec(min_sample=2), boards(TOOK), [], Verdict.INCONCLUSIVE),
    "one failed, two are needed": (GateSpec(min_sample=2), boards(BACK), [], Verdict.FAILED),
    "one of ten failed, none may": (GateSpec(), boards(*[TOOK] * 9, BACK), [], Verdict.FAILED),
    "one of ten failed, one of ten may": (GateSpec(max_failed_share=0.1), boards(*[TOOK] * 9, BACK), [], Verdict.PASSED),
    "unclear ones are in no denominator": (
        GateSpec(max_failed_share=0.4), boards(TOOK, BACK, None, None), [], Verdict.FAILED),
    "timed out is a failure": (GateSpec(), boards(TOOK, Outcome.TIMED_OUT), [], Verdict.FAILED),
    "late regression is a failure": (GateSpec(), boards(TOOK, Outcome.LATE_REGRESSION), [], Verdict.FAILED),
    "rejected is a failure": (GateSpec(), boards(Outcome.REJECTED), [], Verdict.FAILED),
    "requests fail": (ALL, boards(TOOK, figures=figures(failed=11)), [], Verdict.FAILED),
    "as many requests fail as may": (ALL, boards(TOOK, figures=figures(failed=10)), [], Verdict.PASSED),
    "requests fail, but on the baseline too": (
        ALL, boards(TOOK, figures=figures(failed=500)), boards(None, name="b", figures=figures(failed=600)), Verdict.INCONCLUSIVE),
    "more requests failed than were made": (ALL, boards(TOOK, figures=figures(requests=100, failed=101)), [], Verdict.ERROR),
    "too few requests to tell": (ALL, boards(TOOK, figures=figures(requests=2, failed=1)), [], Verdict.PASSED),
    "slower while serving": (
        ALL, boards(TOOK, figures=figures(p95_ms=16)), boards(None, name="b", figures=figures(p95_ms=10)), Verdict.FAILED),
    "a little slower while serving": (
        ALL, boards(TOOK, figures=figures(p95_ms=15)), boards(None, name="b", figures=figures(p95_ms=10)), Verdict.PASSED),
    "slower than the same board was, with no other left": (
        ALL, boards(TOOK, figures=figures(p95_ms=16), before_p95_ms=10.0), [], Verdict.FAILED),
    "slower in acceptance": (
        ALL, boards(TOOK, accept_p95_ms=16.0), boards(None, name="b", accept_p95_ms=10.0), Verdict.FAILED),
    "a latency that is no number": (
        ALL, boards(TOOK, accept_p95_ms=math.nan), boards(None, name="b", accept_p95_ms=10.0), Verdict.ERROR),
    "drifted more than it may": (DRIFT, boards(TOOK, figures=figures(drift=0.31)), [], Verdict.FAILED),
    "drifted as much as it may": (DRIFT, boards(TOOK, figures=figures(drift=0.3)), [], Verdict.PASSED),
    "drift that nobody asks about": (GateSpec(), boards(TOOK, figures=figures(drift=9.0)), [], Verdict.PASSED),
    "drift that can't be told yet": (DRIFT, boards(TOOK, figures=figures(drift=None)), [], Verdict.PASSED),
    "the world has drifted for the old version too": (
        DRIFT, boards(TOOK, figures=figures(drift=0.9)), boards(None, name="b", figures=figures(drift=0.8)), Verdict.INCONCLUSIVE),
    "a drift that is no number": (DRIFT, boards(TOOK, figures=figures(drift=math.nan)), [], Verdict.ERROR),
    "a drift below nothing": (DRIFT, boards(TOOK, figures=figures(drift=-1.0)), [], Verdict.ERROR),
    "crashes": (GateSpec(), boards(TOOK, figures=figures(crashes=1)), [], Verdict.FAILED),
    "crashes no more than the baseline": (
        GateSpec(), boards(TOOK, figures=figures(crashes=1)), boards(None, name="b", figures=figures(crashes=1)), Verdict.PASSED),
    "a proven failure outweighs broken figures": (
        ALL, boards(BACK, TOOK, figures=figures(requests=100, failed=101)), [], Verdict.FAILED),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gate(case: str) -> None:
    gate, wave, baseline, verdict = CASES[case]
    report = judge(gate, wave, baseline=baseline)
    assert report.verdict is verdict
    assert bool(report.reason) is (verdict is not Verdict.PASSED)


def test_a_reason_names_the_boards_with_their_own_reasons() -> None:
    assert "c1 failed_rolled_back: why" in judge(GateSpec(), boards(TOOK, BACK)).reason
    many = judge(GateSpec(), boards(*[BACK] * 25)).reason
    assert "and 15 more" in many


def test_figures_that_are_missing_are_shown_as_not_measured_never_as_passed() -> None:
    report = judge(ALL, boards(TOOK))
    assert report.verdict is Verdict.PASSED, "the outcomes were measured"
    for name in ("acceptance_p95", "serving_p95", "error_rate", "crashes"):
        assert row(report, name) is None
    few = judge(ALL, boards(TOOK, figures=figures(requests=MIN_REQUESTS - 1, failed=5)))
    assert row(few, "error_rate") is None


def test_earlier_waves_add_to_the_sample_but_a_wave_that_measured_nothing_does_not_pass() -> None:
    gate = GateSpec(min_sample=3)
    assert judge(gate, boards(TOOK), earlier=boards(TOOK, TOOK, name="e")).verdict is Verdict.PASSED
    assert judge(gate, boards(None), earlier=boards(TOOK, TOOK, TOOK, name="e")).verdict is Verdict.INCONCLUSIVE


def test_a_wave_that_mostly_fell_silent_is_inconclusive() -> None:
    assert judge(GateSpec(), boards(TOOK, TOOK), silent=2).verdict is Verdict.PASSED
    assert judge(GateSpec(), boards(TOOK, TOOK), silent=3).verdict is Verdict.INCONCLUSIVE


def test_the_share_of_the_catch_up_is_taken_over_all_boards_of_the_class() -> None:
    gate = GateSpec(max_failed_share=0.1)
    earlier = boards(*[TOOK] * 19, name="e")
    assert judge(gate, boards(BACK), earlier=earlier).verdict is Verdict.FAILED
    assert judge(gate, boards(BACK), earlier=earlier, share_over_all=True).verdict is Verdict.PASSED


_NUMBER = st.none() | st.floats() | st.sampled_from([0.0, -1.0, math.nan, math.inf])


@given(
    st.lists(
        st.builds(
            Sample,
            device=st.just("c"),
            outcome=st.sampled_from([None, *Outcome]),
            accept_p95_ms=_NUMBER,
            before_p95_ms=_NUMBER,
            figures=st.none()
            | st.builds(
                Figures,
                requests=st.integers(-5, 10**6),
                failed=st.integers(-5, 10**6),
                crashes=st.integers(0, 3),
                p95_ms=_NUMBER,
            ),
        ),
        max_size=8,
    ),
    st.integers(1, 4),
    st.floats(0, 0.9),
)
def test_no_figures_however_broken_make_a_pass_of_too_few_or_too_bad_outcomes(
    wave: list[Sample], min_sample: int, share: float
) -> None:
    gate = GateSpec(min_sample=min_sample, max_failed_share=share, max_error_rate=0.1, max_latency_ratio=2.0)
    report = judge(gate, wave, baseline=wave)
    answered = [b for b in wave if b.outcome is not None]
    failed = [b for b in answered if b.outcome is not Outcome.SUCCEEDED]
    if report.verdict is Verdict.PASSED:
        assert len(answered) >= min_sample
        assert len(failed) <= share * len(answered)
