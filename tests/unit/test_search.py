from __future__ import annotations

from typing import Any

import msgspec
import pytest
from edgefleet_controller.compile import search
from edgefleet_controller.compile.port import Figures, target_named
from edgefleet_controller.compile.pruning import Step, Tried
from edgefleet_controller.compile.quality import misses
from edgefleet_controller.compile.recipe import CAME, FLOAT, HALF, PLAIN_TENSORFLOW, TENSORFLOW, Recipe
from edgefleet_controller.compile.search import Candidate, LeftOut, Unit
from support.networks import device_class

PLAIN = Recipe()
UNITS = [
    Unit(nodes=("stem",), kind="Conv", noise=0.5, weight_bytes=100),
    Unit(nodes=("middle",), kind="Conv", noise=0.01, weight_bytes=400_000),
    Unit(nodes=("head",), kind="Gemm", noise=0.3, weight_bytes=2_000_000),
    Unit(nodes=("soft1", "soft2"), kind="Softmax", noise=0.2, weight_bytes=0),
]


def candidate(recipe: Recipe = PLAIN, spec: Any = None, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "engine": "onnxruntime", "engine_version": "1", "float_bytes": 4_000_000, "compiled_bytes": 1_000_000, "samples": 100,
        "agreement": 0.95, "agreement_low": 0.9, "agreement_high": 0.97, "sqnr_db": 20.0, "p50_ms": 5.0, "float_p50_ms": 10.0,
    }  # fmt: skip
    figures = Figures(**(fields | changes))
    return Candidate(recipe=recipe, figures=figures, misses=tuple(misses(figures, spec or device_class().spec, recipe)))


def mixed(*nodes: str) -> Recipe:
    return msgspec.structs.replace(PLAIN, in_float=nodes)


def test_the_fastest_that_misses_no_budget_is_chosen_and_near_ties_go_to_the_quieter() -> None:
    fast = candidate(p50_ms=5.0, sqnr_db=15.0)
    near = candidate(mixed("a"), p50_ms=5.2, sqnr_db=25.0)
    slow = candidate(mixed("a", "b"), p50_ms=8.0, sqnr_db=40.0)
    broken = candidate(mixed("c"), p50_ms=1.0, agreement=0.2)
    choice = search.choose([fast, near, slow, broken], device_class().spec)
    assert choice.chosen == near


def test_a_candidate_slower_than_float_is_never_chosen_unless_the_class_asks_for_size() -> None:
    for prefer in ("latency", "accuracy"):
        spec = device_class(search={"prefer": prefer}).spec
        slow = candidate(spec=spec, p50_ms=10.5)
        choice = search.choose([slow, search.float_candidate(slow, spec)], spec)
        assert choice.chosen is not None
        assert choice.chosen.recipe == FLOAT
        assert "slower than float" in choice.why
    spec = device_class(search={"prefer": "size"}).spec
    slow = candidate(spec=spec, p50_ms=10.5)
    assert search.choose([slow, search.float_candidate(slow, spec)], spec).chosen == slow


def test_int8_that_gains_no_time_gives_way_to_float_unless_the_class_asks_for_size() -> None:
    for prefer, precision in (("latency", "fp32"), ("size", "int8")):
        spec = device_class(search={"prefer": prefer}).spec
        even = candidate(spec=spec, p50_ms=9.8)
        chosen = search.choose([even, search.float_candidate(even, spec)], spec).chosen
        assert chosen is not None
        assert chosen.recipe.precision == precision


def test_of_candidates_that_answer_exactly_as_float_does_the_smaller_is_chosen() -> None:
    """Weights that came in half precision lose nothing in it."""
    alike = {"p50_ms": 10.0, "sqnr_db": 200.0}
    whole = candidate(FLOAT, compiled_bytes=4_000_000, **alike)
    half = candidate(HALF, compiled_bytes=2_000_000, **alike)
    assert search.choose([whole, half], device_class().spec).chosen == half
    assert search.choose([whole, candidate(HALF, p50_ms=10.0, sqnr_db=70.0)], device_class().spec).chosen == whole


def test_nothing_is_chosen_when_nothing_fits_and_the_nearest_is_named() -> None:
    spec = device_class(budgets={"latency_p95_ms": 1.0, "memory_bytes": 1 << 30, "size_bytes": 900_000}).spec
    bad, nearer = candidate(spec=spec, agreement=0.3), candidate(mixed("a"), spec=spec, agreement=0.96)
    choice = search.choose([bad, nearer, search.float_candidate(bad, spec)], spec)
    assert (choice.chosen, choice.nearest) == (None, nearer)
    assert nearer.misses == ("size 1000000 bytes, budget 900000",)


def test_of_accurate_candidates_that_are_all_too_large_the_smallest_comes_closest() -> None:
    spec = device_class(budgets={"latency_p95_ms": 100.0, "memory_bytes": 1 << 30, "size_bytes": 500_000}).spec
    large = candidate(mixed("a"), spec=spec, compiled_bytes=900_000, agreement=0.99)
    small = candidate(spec=spec, compiled_bytes=600_000)
    wrong = candidate(mixed("b"), spec=spec, compiled_bytes=550_000, agreement=0.3)
    assert search.choose([large, wrong, small], spec).nearest == small


def test_of_accurate_candidates_that_are_all_too_slow_the_fastest_comes_closest() -> None:
    spec = device_class(budgets={"latency_p95_ms": 2.0, "memory_bytes": 1 << 30}).spec
    fast = candidate(spec=spec, timed_on="host", p50_ms=4.0)
    quiet = candidate(mixed("a"), spec=spec, timed_on="host", p50_ms=8.0, sqnr_db=40.0)
    wrong = candidate(mixed("b"), spec=spec, timed_on="host", p50_ms=1.0, agreement=0.3)
    choice = search.choose([quiet, wrong, fast, search.float_candidate(fast, spec)], spec)
    assert (choice.chosen, choice.nearest) == (None, fast)
    assert fast.misses == ("latency p50 4.00 ms on this host, budget 2 for p95",)


def test_what_fell_when_it_was_measured_alone_is_told_with_why() -> None:
    best, next_best = candidate(compiled_bytes=500_000), candidate(mixed("a"), compiled_bytes=900_000)
    spec = device_class(search={"prefer": "size"}).spec
    choice = search.choose([best, next_best], spec)
    fallen = {best.recipe: msgspec.structs.replace(best, misses=("boards would refuse it: 0.875",))}
    told = search.told_of(search.without(choice, [best.recipe], spec), choice.candidates, fallen)
    assert told.chosen == next_best
    assert told.why.endswith("; not int8, minmax, which fits but for this: boards would refuse it: 0.875")
    assert [t.misses for t in told.candidates] == [("boards would refuse it: 0.875",), ()]


def test_what_fell_at_last_is_not_told_as_what_can_not_be_made() -> None:
    spec = device_class().spec
    int8 = candidate()
    exact = search.float_candidate(int8, spec)
    left = search.without(search.choose([int8, exact], spec), [int8.recipe], spec)
    assert left.chosen == exact
    assert left.why == "fp32 is shipped, because no int8 candidate held at last"
    assert search.choose([exact], spec).why == "fp32 is shipped, because int8 can't be made"


@pytest.mark.parametrize("prefer", ["latency", "size", "transfer", "accuracy"])
@pytest.mark.parametrize("compiled_bytes", [4_000_000, 4_000_100])
def test_int8_in_which_nothing_is_rounded_is_told_as_float(prefer: str, compiled_bytes: int) -> None:
    """A network of operators that no engine has in int8 is the float model under another name."""
    spec = device_class(search={"prefer": prefer}).spec
    named = candidate(
        spec=spec,
        compiled_bytes=compiled_bytes,
        wire_bytes=1,
        float_wire_bytes=2,
        sqnr_db=200.0,
        agreement=1.0,
        p50_ms=9.0,
    )
    chosen = search.choose([named, search.float_candidate(named, spec)], spec).chosen
    assert chosen is not None
    assert chosen.recipe == FLOAT
    smaller = candidate(spec=spec, sqnr_db=200.0, agreement=1.0, p50_ms=9.0)
    assert search.choose([smaller, search.float_candidate(smaller, spec)], spec).chosen == smaller


def test_what_came_in_int8_is_told_as_such_though_it_answers_as_it_came() -> None:
    spec = device_class(search={"prefer": "size"}).spec
    came = candidate(CAME, spec, compiled_bytes=4_000_000, sqnr_db=200.0, agreement=1.0)
    assert search.choose([came, search.float_candidate(came, spec)], spec).chosen == came


def test_rounds_timed_in_busy_and_quiet_moments_compare_by_their_share_of_float() -> None:
    busy = candidate(p50_ms=10.0, float_p50_ms=30.0, sqnr_db=10.0)
    quiet = candidate(mixed("a"), p50_ms=8.0, float_p50_ms=10.0, sqnr_db=30.0)
    assert search.choose([busy, quiet], device_class().spec).chosen == busy


def test_a_class_that_can_not_run_here_is_chosen_for_by_bytes() -> None:
    spec = device_class(arch="armv7l").spec
    small = candidate(spec=spec, p50_ms=None, float_p50_ms=None, sqnr_db=10.0)
    large = candidate(mixed("a"), spec=spec, p50_ms=None, float_p50_ms=None, compiled_bytes=1_200_000, sqnr_db=50.0)
    assert search.choose([large, small], spec).chosen == small


def test_the_ladder_leaves_the_noisiest_in_float_and_kinds_together_within_the_bytes() -> None:
    rungs = search.by_layers(candidate(), UNITS, search.MOST_BYTES)
    # The head holds 2 MB: three quarters of that do not fit into 0.3 MB. Softmax goes as a kind, the stem first.
    assert rungs[0].in_float == ("soft1", "soft2", "stem") or rungs[0].in_float == ("stem",)
    assert all("head" not in rung.in_float for rung in rungs)
    assert set(rungs[-1].in_float) >= {"stem", "soft1", "soft2"}
    assert any("head" in rung.in_float for rung in search.by_layers(candidate(), UNITS, 10.0))


def test_weights_that_stay_in_half_precision_cost_a_third_of_the_room() -> None:
    wide = Unit(nodes=("wide",), kind="Conv", noise=1.0, weight_bytes=1_000_000)
    units = [wide, Unit(nodes=("wider",), kind="Conv", noise=0.0, weight_bytes=9_000_000)]
    assert search.by_layers(candidate(), units, search.MOST_BYTES) == []
    (rung,) = search.by_layers(candidate(), units, search.MOST_BYTES, search.HALF_WEIGHT_COST)
    assert rung.in_float == ("wide",)


def test_a_unit_that_drowns_the_others_does_not_end_the_ladder() -> None:
    loud = [Unit(nodes=("join",), kind="Concat", noise=1.0, weight_bytes=0)]
    quiet = [Unit(nodes=(f"conv{i}",), kind="Conv", noise=0.01 / 2**i, weight_bytes=1000) for i in range(8)]
    rungs = search.by_layers(candidate(), [*quiet, *loud], search.MOST_BYTES)
    assert rungs[0].in_float == ("join",)
    assert rungs[1].in_float == ("conv0", "join")
    assert len(rungs) == len({rung.in_float for rung in rungs}) >= 4
    assert len(rungs[-1].in_float) >= 5


def test_the_last_rungs_leave_less_noise_than_any_before() -> None:
    units = [Unit(nodes=(f"conv{i}",), kind="Conv", noise=2.0**-i, weight_bytes=1000) for i in range(16)]
    ladder = search.by_layers(candidate(), units, search.MOST_BYTES)
    at_last = search.by_layers(candidate(), units, search.MOST_BYTES_AT_LAST, shares=search.RUNGS_AT_LAST)
    assert at_last[: len(ladder)] == ladder
    assert len(at_last) > len(ladder)


@pytest.mark.parametrize("scope", ["all", "weighted"])
def test_the_ladder_ends_before_nothing_is_left_in_int8(scope: Any) -> None:
    """It would be the float model, called int8."""
    units = [Unit(nodes=(f"conv{i}",), kind="Conv", noise=2.0**-i, weight_bytes=1000) for i in range(4)]
    units += [Unit(nodes=("sum",), kind="Add", noise=0.0, weight_bytes=0)] if scope == "weighted" else []
    rungs = search.by_layers(candidate(msgspec.structs.replace(PLAIN, scope=scope)), units, 10.0)
    assert rungs
    assert all(len([node for node in rung.in_float if node != "sum"]) < 4 for rung in rungs)


def test_a_ladder_with_nothing_to_leave_in_float_has_no_rungs() -> None:
    assert search.by_layers(candidate(), [], search.MOST_BYTES) == []
    assert search.leading(candidate(), []) == []


def test_leading_layers_are_taken_in_order_while_their_weights_are_few() -> None:
    assert [rung.in_float for rung in search.leading(candidate(), UNITS)] == [("stem",)]


def test_the_first_layer_is_left_in_float_alone_too() -> None:
    """Where engines are slowest in int8: a first layer reads three channels."""
    units = [
        Unit(nodes=(f"conv{i}",), kind="Conv", noise=0.1, weight_bytes=size)
        for i, size in enumerate((30, 40, 70, 5_000))
    ]
    rungs = [rung.in_float for rung in search.leading(candidate(), units)]
    assert rungs == [("conv0",), ("conv0", "conv1", "conv2")]
    heavy = [Unit(nodes=(f"dense{i}",), kind="Gemm", noise=0.1, weight_bytes=1000) for i in range(2)]
    assert search.leading(candidate(), heavy) == []


def test_leading_layers_in_float_end_where_fewest_values_pass() -> None:
    passing = (900, 400, 100, 400, 100, 300)
    units = [
        Unit(nodes=(f"conv{i}",), kind="Conv", noise=0.1, weight_bytes=10, passing=values)
        for i, values in enumerate(passing)
    ]
    units.append(Unit(nodes=("dense",), kind="Gemm", noise=0.1, weight_bytes=1_000_000))
    rungs = [rung.in_float for rung in search.leading(candidate(), units)]
    assert rungs == [("conv0",), tuple(f"conv{i}" for i in range(5))]


def test_the_ladder_starts_where_fewest_answers_change_among_the_quietest() -> None:
    quietest = candidate(msgspec.structs.replace(PLAIN, ranges="percentile"), sqnr_db=27.5, agreement=0.91)
    steadier = candidate(msgspec.structs.replace(PLAIN, ranges="mse"), sqnr_db=27.3, agreement=0.94)
    louder = candidate(msgspec.structs.replace(PLAIN, ranges="entropy"), sqnr_db=24.0, agreement=0.96)
    assert search.base_of_ladder([quietest, steadier, louder]) == steadier


def test_full_effort_tries_methods_scope_and_the_toolchains_own_quantizer_and_quick_the_plain_one() -> None:
    openvino = target_named("openvino")
    full = search.first(PLAIN, openvino, "full")
    assert full[0] == PLAIN
    assert {r.ranges for r in full} == {"minmax", "percentile", "mse", "entropy"}
    assert {r.scope for r in full} == {"all", "weighted"}
    assert {r.quantizer for r in full} == {"edgefleet", "nncf"}
    assert search.first(PLAIN, openvino, "quick") == search.first(PLAIN, openvino, "fixed") == [PLAIN]
    assert search.first(FLOAT, openvino, "full") == [FLOAT]
    # An Edge TPU has no float: operators without weights stay in int8, too.
    assert {r.scope for r in search.first(PLAIN, target_named("coral"), "full")} == {"all"}


def test_a_candidate_that_fell_when_measured_alone_gives_way_to_the_next() -> None:
    spec = device_class().spec
    first, second = candidate(p50_ms=4.0), candidate(mixed("a"), p50_ms=6.0)
    choice = search.choose([first, second], spec)
    assert choice.chosen == first
    assert search.without(choice, [first.recipe], spec).chosen == second


@pytest.mark.parametrize("prefer", ["latency", "size", "accuracy"])
def test_no_preference_ships_what_misses_its_accuracy_budget(prefer: str) -> None:
    spec = device_class(search={"prefer": prefer}).spec
    wrong = candidate(spec=spec, agreement=0.69, compiled_bytes=1, p50_ms=0.1)
    assert search.choose([wrong], spec).chosen is None
    assert not search.accurate(wrong, spec)


def test_tensorflows_converter_is_asked_at_full_effort_or_where_the_plain_recipe_misses() -> None:
    def asked(first: Candidate, effort: str, **spec: Any) -> Recipe | None:
        wanted = device_class("tflite", search={"effort": effort}, **spec).spec
        return search.by_tensorflow(search.choose([first], wanted), wanted)

    good, bad = candidate(), candidate(agreement=0.1)
    assert asked(good, "full") == PLAIN_TENSORFLOW
    assert asked(candidate(FLOAT), "full", precision="fp32") == msgspec.structs.replace(
        PLAIN_TENSORFLOW, precision="fp32"
    )
    assert asked(bad, "quick") == PLAIN_TENSORFLOW
    assert asked(good, "quick") is asked(good, "fixed") is asked(bad, "fixed") is None
    spec = device_class("tflite", search={"effort": "full"}).spec
    blamed = msgspec.structs.replace(search.choose([bad], spec), why="calibration samples are unlike the held-out ones")
    assert search.by_tensorflow(blamed, spec) is None


def test_what_tensorflow_made_has_no_layers_to_leave_in_float_and_no_onnx_to_prune() -> None:
    spec = device_class("tflite").spec
    own, other = candidate(sqnr_db=20.0), candidate(PLAIN_TENSORFLOW, sqnr_db=30.0, p50_ms=2.0)
    assert search.choose([own, other], spec).chosen == other
    assert search.base_of_ladder([own, other]) == own
    step = Tried(
        step=Step(number=1, structured=0.5, unstructured=0.0), key="k", sparsity=0.5, agreement=1.0, accuracy=None, float_accuracy=None, misses=(),
    )  # fmt: skip
    pruned = search.pruned([own, other], [step], spec)
    assert pruned is not None
    assert (pruned.quantizer, pruned.pruned) == ("edgefleet", "k")
    tried = candidate(pruned, sqnr_db=20.0)
    by_tfmot = search.pruned([own, other, tried], [msgspec.structs.replace(step, key="t")], spec, by=TENSORFLOW)
    assert by_tfmot is not None
    assert (by_tfmot.quantizer, by_tfmot.pruned) == ("tensorflow", "t")
    assert {r.quantizer for r in search.first(PLAIN, target_named("tflite"), "full")} == {"edgefleet"}


def test_networks_that_tfmot_pruned_are_tried_from_the_sparsest_back() -> None:
    spec = device_class("tflite").spec
    whole = candidate(PLAIN_TENSORFLOW)
    steps = [
        Tried(
            step=Step(number=n, structured=0.0, unstructured=0.3 * n), key=f"k{n}", sparsity=0.3 * n, agreement=1.0, accuracy=None,
            float_accuracy=None, misses=(),
        )
        for n in (1, 2)
    ]  # fmt: skip
    first = search.pruned([candidate(), whole], steps, spec, by=TENSORFLOW)
    assert first is not None
    assert (first.pruned, first.sparsity) == ("k2", 0.6)
    second = search.pruned([candidate(), whole, candidate(first, agreement=0.1)], steps, spec, by=TENSORFLOW)
    assert second is not None
    assert second.pruned == "k1"
    assert search.pruned([candidate(), whole, candidate(first)], steps, spec, by=TENSORFLOW) is None


def test_what_was_left_out_stays_told_when_the_chosen_one_falls() -> None:
    spec = device_class().spec
    choice = search.choose([candidate(), candidate(mixed("a"), p50_ms=6.0)], spec)
    left = LeftOut(recipe=PLAIN_TENSORFLOW, reason="why", lasting=True)
    choice = msgspec.structs.replace(choice, left_out=(left,))
    assert search.without(choice, [PLAIN], spec).left_out == (left,)
