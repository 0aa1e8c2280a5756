from __future__ import annotations

from typing import Any

import msgspec
import pytest
from edgefleet_controller.compile import pruning, search
from edgefleet_controller.compile.port import Figures
from edgefleet_controller.compile.pruning import Step, Tried
from edgefleet_controller.compile.recipe import FLOAT, Recipe
from edgefleet_controller.compile.search import Candidate
from edgefleet_controller.model_version import PruningPlan
from support.networks import device_class

PLAN = PruningPlan(structured=0.8, unstructured=0.0, steps=4, epochs=2, learning_rate=1e-3, batch=32, seed=0)
LOST = ("agreement with the float model 0.412",)


def tried(step: Step, *misses: str) -> Tried:
    key = f"{step.number}{'again' if step.again else ''}"
    gone = 1 - (1 - step.structured) * (1 - step.unstructured)
    return Tried(step=step, key=key, sparsity=gone, agreement=0.9, accuracy=None, float_accuracy=None, misses=misses)


def taken(plan: PruningPlan, fails: Any) -> list[Tried]:
    """All steps, each judged by ``fails(step)``."""
    done: list[Tried] = []
    while (step := pruning.following(plan, done)) is not None:
        done.append(tried(step, *(LOST if fails(step) else ())))
    return done


def test_the_schedule_is_cubic_takes_most_first_and_ends_at_the_target() -> None:
    shares = [step.structured for step in pruning.schedule(PLAN)]
    assert shares == pytest.approx([0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8 * (1 - 0.25**3), 0.8])
    taken_now = [b - a for a, b in zip([0.0, *shares], shares, strict=False)]
    assert taken_now == sorted(taken_now, reverse=True)


def test_each_step_takes_channels_and_single_weights_of_what_is_left() -> None:
    steps = pruning.schedule(msgspec.structs.replace(PLAN, unstructured=0.5, steps=2))
    assert [(round(s.structured, 3), round(s.unstructured, 4)) for s in steps] == [(0.7, 0.4375), (0.8, 0.5)]
    assert [s.number for s in steps] == [1, 2]


def test_a_network_that_keeps_up_is_pruned_to_the_target() -> None:
    done = taken(PLAN, lambda _: False)
    assert [t.step.number for t in done] == [1, 2, 3, 4]
    assert pruning.ended(done).stopped == ""
    assert pruning.ended(done).good == tuple(done)


def test_a_step_that_lost_too_much_is_tuned_once_more_and_goes_on_when_that_helps() -> None:
    done = taken(PLAN, lambda step: step.number == 3 and not step.again)
    assert [(t.step.number, t.step.again) for t in done] == [(1, False), (2, False), (3, False), (3, True), (4, False)]
    found = pruning.ended(done)
    assert found.stopped == ""
    assert [t.key for t in found.good] == ["1", "2", "3again", "4"]


def test_a_network_that_does_not_come_back_stops_there_and_the_last_good_step_is_kept() -> None:
    done = taken(PLAN, lambda step: step.number >= 3)
    assert [(t.step.number, t.step.again) for t in done] == [(1, False), (2, False), (3, False), (3, True)]
    found = pruning.ended(done)
    assert found.good[-1].key == "2"
    assert (
        "stopped where 79% of the weights were gone: agreement with the float model 0.412, after being tuned twice"
        in found.stopped
    )
    assert "what was good is kept, 70% gone" in found.stopped


def test_a_network_that_collapses_at_once_has_no_good_step() -> None:
    found = pruning.ended(taken(PLAN, lambda _: True))
    assert found.good == ()
    assert "no step was good" in found.stopped


def candidate(recipe: Recipe, agreement: float = 0.95, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "engine": "onnxruntime", "engine_version": "1", "float_bytes": 4_000_000, "compiled_bytes": 1_000_000, "samples": 100,
        "agreement": agreement, "agreement_low": 0.9, "agreement_high": 0.97, "sqnr_db": 20.0, "p50_ms": 5.0, "float_p50_ms": 10.0,
    }  # fmt: skip
    return Candidate(recipe=recipe, figures=Figures(**(fields | changes)), misses=())


def test_the_search_begins_at_the_sparsest_good_network_and_goes_back_until_one_holds_in_int8() -> None:
    spec = device_class(accuracy={"min_agreement": 0.9}).spec
    good = pruning.ended(taken(PLAN, lambda _: False)).good
    best, candidates = (
        Recipe(ranges="mse", in_float=("head",)),
        [candidate(FLOAT), candidate(Recipe(), 0.91, p50_ms=9.0)],
    )
    candidates.append(candidate(best))
    for expected in ("4", "3"):
        recipe = search.pruned(candidates, good, spec)
        assert recipe is not None
        assert (recipe.pruned, recipe.ranges, recipe.in_float) == (expected, "mse", ("head",))
        candidates.append(candidate(recipe, 0.5 if expected == "4" else 0.93))
    assert search.pruned(candidates, good, spec) is None


def test_no_good_network_leaves_nothing_to_try() -> None:
    assert search.pruned([candidate(Recipe())], (), device_class().spec) is None


def test_what_is_pruned_is_told_and_is_not_the_float_model() -> None:
    pruned = msgspec.structs.replace(FLOAT, pruned="4", sparsity=0.8)
    assert pruned.told() == "fp32, 80% pruned"
    assert FLOAT.exact
    assert not pruned.exact
    assert Recipe(pruned="4", sparsity=0.62).told() == "int8, 62% pruned, minmax"


def test_a_faster_pruned_float_network_beats_the_float_model_and_a_slower_one_does_not() -> None:
    spec = device_class(precision="fp32", accuracy={"min_agreement": 0.9}).spec
    exact = candidate(FLOAT, 1.0, p50_ms=10.0)
    for p50, expected in ((5.0, "4"), (9.9, "")):
        faster = candidate(msgspec.structs.replace(FLOAT, pruned="4", sparsity=0.8), p50_ms=p50)
        chosen = search.choose([exact, faster], spec).chosen
        assert chosen is not None
        assert chosen.recipe.pruned == expected


def test_a_class_that_asks_for_transfer_gets_what_is_sent_in_fewest_bytes() -> None:
    dense = candidate(Recipe(), wire_bytes=900_000)
    sparse = candidate(Recipe(pruned="4", sparsity=0.8), wire_bytes=300_000, p50_ms=11.0)
    for prefer, expected in (("transfer", sparse), ("latency", dense)):
        assert search.choose([dense, sparse], device_class(search={"prefer": prefer}).spec).chosen == expected
