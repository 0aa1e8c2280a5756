"""The rounds of the quality search: what is told apart on some held-out samples must hold on all of them before the search stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from edgefleet_controller.compile import quality, search
from edgefleet_controller.compile.pipeline import _Search
from edgefleet_controller.compile.port import Figures, target_named
from edgefleet_controller.compile.recipe import Recipe
from edgefleet_controller.compile.search import Trial, Unit
from edgefleet_controller.compile.steps import Measured
from support.networks import device_class

SAMPLES, OF_A_ROUND = 160, 100
CLASS = device_class(accuracy={"min_agreement": 0.95}, search={"effort": "quick", "prefer": "size"})
UNITS = [Unit(nodes=(f"conv{i}",), kind="Conv", noise=2.0**-i, weight_bytes=1000) for i in range(16)]


class Lucky:
    """Steps in which five nodes in float do for a round's samples, and ``needed`` for all samples."""

    has_builder = False

    def __init__(self, needed: int) -> None:
        self._needed = needed

    def compile(self, recipes: Sequence[Recipe]) -> list[tuple[Path, bool]]:
        return [(Path("compiled"), False) for _ in recipes]

    def rank(self, recipe: Recipe) -> list[Unit]:
        return UNITS

    def measure(self, made: Sequence[tuple[Recipe, Path]]) -> list[Measured]:
        return [self._measured(recipe, SAMPLES if len(made) == 1 else OF_A_ROUND) for recipe, _ in made]

    def _measured(self, recipe: Recipe, samples: int) -> Measured:
        enough = recipe.precision != "int8" or len(recipe.in_float) >= (5 if samples < SAMPLES else self._needed)
        size = 1_000_000 if recipe.precision == "int8" else 1_990_000
        figures = Figures(
            engine="onnxruntime", engine_version="1", float_bytes=4_000_000, compiled_bytes=size + 1000 * len(recipe.in_float),
            samples=samples, agreement=0.97 if enough else 0.9, agreement_low=0.8, agreement_high=0.99, sqnr_db=10.0 + len(recipe.in_float), p50_ms=1.0, float_p50_ms=2.0,
            peak_memory_bytes=1 if samples == SAMPLES else None,
        )  # fmt: skip
        misses = tuple(quality.misses(figures, CLASS.spec, recipe))
        return Measured(Trial(recipe=recipe, figures=figures, misses=misses), {}, ())


def searched(steps: Lucky, monkeypatch: Any) -> search.Choice:
    monkeypatch.setattr(_Search, "_unlike", lambda self: "")
    version: Any = SimpleNamespace(holdout=SimpleNamespace(count=SAMPLES))
    own = _Search(cast(Any, steps), version, CLASS, target_named("onnxruntime"), {})
    return own._unpruned(Recipe())


def test_a_rung_that_was_lucky_on_a_rounds_samples_does_not_end_the_ladder(monkeypatch: Any) -> None:
    chosen = searched(Lucky(needed=9), monkeypatch).chosen
    assert chosen is not None
    assert chosen.recipe.precision == "int8"
    assert len(chosen.recipe.in_float) >= 9


def test_where_no_rung_holds_on_all_samples_half_precision_is_tried(monkeypatch: Any) -> None:
    chosen = searched(Lucky(needed=17), monkeypatch).chosen
    assert chosen is not None
    assert chosen.recipe.precision == "fp16"
