"""The acceptance verdict travels: what a board judges, the controller can read."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from edgefleet_agent.accept import Broke, Stage, report_on
from edgefleet_agent.runtime.protocol import OutputTensor
from edgefleet_agent.runtime.shadow import agree
from edgefleet_agent.sandbox import Ended
from edgefleet_shared import golden
from edgefleet_shared.answers import Reading
from edgefleet_shared.contract import (
    AcceptanceContract,
    AcceptanceFigures,
    AcceptanceReport,
    BuildBudget,
    OutputTolerance,
    ShadowFigures,
    ShadowPlan,
    TensorSpec,
    Verdict,
    judge,
    judge_shadow,
)
from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.reading import MaskReading, TextReading
from edgefleet_shared.results import MAX_REASON


@pytest.mark.parametrize("cosine", [math.nan, None, 0.1])
def test_a_model_whose_output_is_no_number_fails_in_a_report_that_can_be_read_back(cosine: float | None) -> None:
    contract = AcceptanceContract(
        kind="classification", min_agreement=0.9, latency_p95_ms=10.0, peak_memory_bytes=1 << 30, allowed_providers=("CPU",),
        min_cosine=0.9, max_celsius=80.0,
    )  # fmt: skip
    figures = AcceptanceFigures(
        golden_count=16, agreement=1.0, cosine=cosine, load_ms=1, first_ms=1, p50_ms=1, p95_ms=1, peak_memory_bytes=1,
        providers=("CPU",),
    )  # fmt: skip
    report = judge(contract, figures)
    read = msgspec.json.decode(msgspec.json.encode(report), type=AcceptanceReport)
    assert read.verdict is Verdict.FAILED
    assert read.reason.startswith("cosine ")
    assert read.measurements == report.measurements
    assert next(row.verdict for row in read.measurements if row.name == "temperature") is Verdict.INCONCLUSIVE


CONTRACT = AcceptanceContract(
    kind="classification", min_agreement=0.9, latency_p95_ms=10.0, peak_memory_bytes=1 << 30, allowed_providers=("CPU",),
    max_watts=3.5,
)  # fmt: skip
GOOD = AcceptanceFigures(
    golden_count=16, agreement=1.0, cosine=1.0, load_ms=1, first_ms=1, p50_ms=1, p95_ms=1, peak_memory_bytes=1,
    providers=("CPU",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("watts", "scope", "verdict"),
    [
        (3.4, "board", Verdict.PASSED),
        (3.6, "board", Verdict.FAILED),
        (math.nan, "board", Verdict.FAILED),
        (9.0, "package", Verdict.PASSED),
        (None, None, Verdict.PASSED),
    ],
)
def test_a_power_budget_is_held_where_the_board_is_measured_and_else_told_as_unmeasured(watts, scope, verdict) -> None:
    report = judge(CONTRACT, msgspec.structs.replace(GOOD, watts=watts, power_scope=scope))
    judged = [row for row in report.measurements if row.name == "power"]
    assert report.verdict is verdict
    assert bool(judged) is (scope == "board")
    assert bool(report.unmeasured) is (scope != "board")
    assert msgspec.json.decode(msgspec.json.encode(report), type=AcceptanceReport).verdict is verdict


def test_a_power_budget_of_nothing_is_no_contract() -> None:
    with pytest.raises(ArtifactError, match="max_watts"):
        msgspec.structs.replace(CONTRACT, max_watts=0.0).check()


@pytest.mark.parametrize(
    ("waited_share", "cpu_share", "verdict"),
    [
        (0.02, 0.05, Verdict.FAILED),  # on an accelerator: the processor has nothing to do, and nobody took it
        (0.02, 1.0, Verdict.FAILED),
        (0.4, 0.6, Verdict.INCONCLUSIVE),
        (0.4, 0.05, Verdict.INCONCLUSIVE),
        (None, 0.6, Verdict.INCONCLUSIVE),  # a kernel that does not tell how long a thread waited
        (None, 0.9, Verdict.FAILED),
        (None, None, Verdict.FAILED),
    ],
)
def test_a_slow_model_fails_unless_it_waited_for_a_core(waited_share, cpu_share, verdict) -> None:
    slow = msgspec.structs.replace(GOOD, p95_ms=50.0, waited_share=waited_share, cpu_share=cpu_share, watts=None)
    report = judge(CONTRACT, slow)
    assert report.verdict is verdict
    assert ("busy" in report.reason) is (verdict is Verdict.INCONCLUSIVE)


@pytest.mark.parametrize("nothing", ["time_limit_s", "memory_bytes", "disk_bytes"])
def test_a_budget_for_building_of_nothing_is_no_contract(nothing: str) -> None:
    with pytest.raises(ArtifactError, match=rf"build\.{nothing}"):
        msgspec.structs.replace(CONTRACT, build=BuildBudget(**{nothing: 0})).check()


def test_a_build_that_could_hold_a_board_for_ever_is_no_contract() -> None:
    with pytest.raises(ArtifactError, match=r"build\.time_limit_s"):
        msgspec.structs.replace(CONTRACT, build=BuildBudget(time_limit_s=1e9)).check()


PLAN = ShadowPlan(requests=100, min_agreement=0.95, max_latency_ratio=1.5)
ACCEPTED = judge(CONTRACT, GOOD)


@pytest.mark.parametrize(
    ("seen", "verdict", "words"),
    [
        ({"compared": 100, "agreed": 96, "p50_ms": 1.0, "serving_p50_ms": 1.0}, Verdict.PASSED, ""),
        ({"compared": 100, "agreed": 90}, Verdict.FAILED, "shadow_agreement 0.9"),
        ({"compared": 90, "agreed": 90, "failed": 10}, Verdict.FAILED, "shadow_agreement 0.9"),
        ({"compared": 100, "agreed": 100, "p50_ms": 3.2, "serving_p50_ms": 2.0}, Verdict.FAILED, "shadow_latency 1.6"),
        ({"compared": 99, "agreed": 99}, Verdict.INCONCLUSIVE, "shadow_requests 99"),
        ({}, Verdict.INCONCLUSIVE, "shadow_requests 0"),
        ({"compared": 5, "agreed": 0}, Verdict.INCONCLUSIVE, "shadow_requests 5"),
    ],
)
def test_only_enough_live_requests_that_agree_in_time_pass(seen: dict, verdict: Verdict, words: str) -> None:
    report = judge_shadow(PLAN, ShadowFigures(manifest="m", **seen), ACCEPTED)
    assert report.verdict is verdict
    assert words in report.reason
    assert report.measurements[: len(ACCEPTED.measurements)] == ACCEPTED.measurements
    assert msgspec.json.decode(msgspec.json.encode(report), type=AcceptanceReport).shadow == report.shadow


@pytest.mark.parametrize(
    "plan", [ShadowPlan(requests=10), ShadowPlan(requests=10, min_agreement=1.1), ShadowPlan(requests=-1),
             ShadowPlan(requests=10, min_agreement=0.9, max_latency_ratio=0.0)],
)  # fmt: skip
def test_a_shadow_that_could_not_fail_is_no_contract(plan: ShadowPlan) -> None:
    with pytest.raises(ArtifactError, match="shadow"):
        msgspec.structs.replace(CONTRACT, shadow=plan).check()


@pytest.mark.parametrize("kind", ["classification", "raw"])
@pytest.mark.parametrize(
    ("answer", "reference", "words"),
    [
        pytest.param({}, np.ones((1, 3)), "gave no output y", id="an output is missing"),
        pytest.param({"y": np.ones((1, 0))}, np.ones((1, 0)), "no values", id="nothing to compare"),
        pytest.param({"y": np.ones((1, 2))}, np.ones((1, 3)), "2 values", id="another size"),
    ],
)
def test_an_answer_that_can_not_be_compared_is_the_models_fault(kind, answer, reference, words: str) -> None:
    contract = msgspec.structs.replace(CONTRACT, kind=kind, tolerance_abs=0.1)
    with pytest.raises(ArtifactError, match=words):
        compare(contract, [answer], {"y": reference.astype(np.float32)})


@pytest.mark.parametrize("time_limit_s", [0.0, -1.0, 1e9])
def test_an_acceptance_that_could_hold_a_board_for_ever_is_no_contract(time_limit_s: float) -> None:
    with pytest.raises(ArtifactError, match="time_limit_s"):
        msgspec.structs.replace(CONTRACT, time_limit_s=time_limit_s).check()


@pytest.mark.parametrize(
    ("out_of_time", "throttled", "waited_share", "verdict"),
    [
        (True, False, 0.02, Verdict.FAILED),  # it hangs
        (True, None, None, Verdict.FAILED),
        (True, False, 0.6, Verdict.INCONCLUSIVE),
        (True, True, 0.02, Verdict.INCONCLUSIVE),
        (False, True, None, Verdict.FAILED),  # over its memory limit, which no other process has a part in
    ],
)
def test_time_that_ran_out_on_a_busy_board_is_no_fault_of_the_model(
    out_of_time: bool, throttled: bool | None, waited_share: float | None, verdict: Verdict
) -> None:
    stage = msgspec.json.encode(Stage("timing inferences"))
    ended = Ended(
        problem="over its limit", signal=0, over_limit=True, reports=(stage,), output="", peak_memory_bytes=1, seconds=2.0,
        out_of_time=out_of_time, waited_share=waited_share,
    )  # fmt: skip
    report = report_on(CONTRACT, ended, throttled=throttled)
    assert report.verdict is verdict
    assert report.reason.startswith("over its limit while timing inferences")


@pytest.mark.parametrize("doing", ["starting", "loading"])
@pytest.mark.parametrize(("starved", "verdict"), [(True, Verdict.INCONCLUSIVE), (False, Verdict.ERROR)])
def test_a_board_that_is_out_of_memory_says_nothing_of_the_model(doing: str, starved: bool, verdict: Verdict) -> None:
    ended = Ended(
        problem="killed by SIGKILL", signal=9, over_limit=False, reports=(msgspec.json.encode(Stage(doing)),), output="",
        peak_memory_bytes=1, seconds=2.0, starved=starved,
    )  # fmt: skip
    report = report_on(CONTRACT, ended, throttled=False)
    assert report.verdict is verdict
    assert ("the board is out of memory" in report.reason) is starved


@pytest.mark.parametrize("said", [Broke("model", "x" * 1_000_000), Stage("x" * 1_000_000)])
def test_a_child_that_says_too_much_is_heard_as_far_as_anybody_reads(said: Broke | Stage) -> None:
    """It would be written to the board's disk with each state, and to its log."""
    ended = Ended(
        problem="killed by SIGSEGV", signal=11, over_limit=False, reports=(msgspec.json.encode(said),), output="",
        peak_memory_bytes=1, seconds=2.0,
    )  # fmt: skip
    report = report_on(CONTRACT, ended, throttled=False)
    assert report.verdict is Verdict.FAILED
    assert 1000 < len(report.reason) <= MAX_REASON


def test_a_child_that_says_what_is_no_text_is_not_believed_and_ends_nobody() -> None:
    said = msgspec.json.encode(Stage("x")).replace(b'"x"', b'"\xff"')
    ended = Ended(
        problem="", signal=0, over_limit=False, reports=(said,), output="", peak_memory_bytes=1, seconds=2.0
    )  # fmt: skip
    report = report_on(CONTRACT, ended, throttled=False)
    assert report.verdict is Verdict.ERROR
    assert "nonsense" in report.reason


def compare(
    contract: AcceptanceContract, answers: list[dict[str, np.ndarray]], wanted: dict[str, np.ndarray]
) -> tuple[float, float]:
    outputs = tuple(TensorSpec(name, "FP32", values.shape) for name, values in wanted.items())
    return golden.compare(contract, Reading(contract.kind, outputs), answers, wanted)


RAW = msgspec.structs.replace(CONTRACT, kind="raw", tolerance_abs=5.0)


def test_a_score_that_is_wrong_is_not_drowned_by_the_map_beside_it() -> None:
    wanted = {"map": np.zeros((4, 1000), np.float32), "score": np.full((4, 1), 10.0, np.float32)}
    answers = [{"map": np.zeros((1, 1000)), "score": np.full((1, 1), 3.0)} for _ in range(4)]
    agreement, _ = compare(RAW, answers, wanted)
    assert agreement == 0.0


def test_every_place_of_a_classifier_must_answer_alike() -> None:
    """Four letters of a plate: the surest one alone would say nothing of the others."""
    wanted = np.eye(5, dtype=np.float32)[[0, 1, 2, 3]][None] * np.array([[9], [1], [1], [1]], np.float32)
    others = np.eye(5, dtype=np.float32)[[0, 4, 4, 4]][None] * np.array([[9], [1], [1], [1]], np.float32)
    assert compare(CONTRACT, [{"letters": wanted}], {"letters": wanted})[0] == 1.0
    assert compare(CONTRACT, [{"letters": others}], {"letters": wanted})[0] == 0.0


def test_each_output_is_held_against_its_own_tolerance() -> None:
    wanted = {"pixels": np.full((4, 2), 100.0, np.float32), "score": np.full((4, 1), 0.9, np.float32)}
    answers = [{"pixels": np.full((1, 2), 104.0), "score": np.full((1, 1), 0.1)} for _ in range(4)]
    assert compare(RAW, answers, wanted)[0] == 1.0
    own = msgspec.structs.replace(RAW, tolerances=(OutputTolerance("score", 0.05, 0.0),))
    assert compare(own, answers, wanted)[0] == 0.0
    assert (own.tolerance("score"), own.tolerance("pixels")) == ((0.05, 0.0), (5.0, 0.0))
    near = [{"pixels": np.full((1, 2), 104.0), "score": np.full((1, 1), 0.87)} for _ in range(4)]
    assert compare(own, near, wanted)[0] == 1.0


def test_boxes_can_not_be_compared_without_a_word_on_how_they_are_read() -> None:
    with pytest.raises(ArtifactError, match="how boxes are read"):
        msgspec.structs.replace(CONTRACT, kind="detection").check()


LINE = np.eye(4, dtype=np.float32)[[1, 0, 1, 2, 3]]  # a a b, then a space
MASK = np.kron(np.eye(2, dtype=np.float32), np.ones((10, 10), np.float32))


@pytest.mark.parametrize(
    ("reading", "wanted", "alike", "other"),
    [
        (Reading("text", (), text=TextReading(spaces=(3,))), LINE, LINE[[0, 1, 2, 3, 1]], LINE[[0, 1, 3, 3, 4]]),
        (Reading("segmentation", (), masks=MaskReading(threshold=0.5)), MASK[None], MASK[None] * 0.6, MASK[None] * 0.4),
    ],
    ids=["a line of text, but for a space at its end", "a mask, but for how sure it is"],
)
def test_an_answer_is_what_the_application_reads(
    reading: Reading, wanted: np.ndarray, alike: np.ndarray, other: np.ndarray
) -> None:
    contract = msgspec.structs.replace(CONTRACT, kind=reading.kind)
    reading = reading._replace(outputs=(TensorSpec("y", "FP32", (1, *wanted.shape)),))
    given = [{"y": alike[None]}, {"y": other[None]}, {"y": wanted[None]}, {"y": np.full_like(wanted, np.nan)[None]}]
    assert golden.compare(contract, reading, given, {"y": np.stack([wanted] * 4)})[0] == 0.5


def agreed(contract: AcceptanceContract, given: list[OutputTensor], wanted: list[OutputTensor]) -> bool:
    steps = agree(contract, given, wanted)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bool(end.value)


def test_live_answers_are_held_against_the_tolerance_of_their_output() -> None:
    def tensor(name: str, value: float) -> OutputTensor:
        return OutputTensor(name, "FP32", (1,), np.array([value], np.float32).tobytes())

    own = msgspec.structs.replace(RAW, tolerances=(OutputTolerance("score", 0.05, 0.0),))
    serving = [tensor("pixels", 100.0), tensor("score", 0.9)]
    assert agreed(own, [tensor("pixels", 104.0), tensor("score", 0.87)], serving)
    assert not agreed(own, [tensor("pixels", 104.0), tensor("score", 0.1)], serving)
    assert agreed(RAW, [tensor("pixels", 104.0), tensor("score", 0.1)], serving)


def output(values: np.ndarray) -> list[OutputTensor]:
    return [OutputTensor("y", "FP32", values.shape, values.astype(np.float32).tobytes())]


@pytest.mark.parametrize("place", [0, 54_321, 99_999])
def test_long_live_answers_are_compared_to_the_last_value(place: int) -> None:
    want = np.tile(np.eye(5)[[2]], (20_000, 1))
    have = want.copy()
    assert agreed(CONTRACT, output(have), output(want))
    assert agreed(RAW, output(have), output(want))
    have.flat[place] = 7.0
    assert not agreed(RAW, output(have), output(want))
    # The place of the class that was right anyway is no other class.
    assert agreed(CONTRACT, output(have), output(want)) is (place % 5 == 2)
    have.flat[place] = np.nan
    assert not agreed(CONTRACT, output(have), output(want))
    for nothing in (np.zeros((0, 5)), np.zeros((3, 0))):
        assert agreed(CONTRACT, output(nothing), output(nothing))
    assert agreed(CONTRACT, output(np.array(1.0)), output(np.array(2.0)))  # one value is the largest of its kind


@pytest.mark.parametrize("limits", [(0.0, 0.0), (-1.0, 2.0)])
def test_an_outputs_tolerance_of_nothing_is_no_contract(limits: tuple[float, float]) -> None:
    with pytest.raises(ArtifactError, match="tolerance of an output"):
        msgspec.structs.replace(RAW, tolerances=(OutputTolerance("score", *limits),)).check()
