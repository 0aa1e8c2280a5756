"""The rounds of the quality search: what is told apart on some held-out samples must hold on all of them before the search stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from edgefleet_controller.compile import quality, search
from edgefleet_controller.compile.evaluator import Measured
from edgefleet_controller.compile.finder import Finder
from edgefleet_controller.compile.port import Figures, target_named
from edgefleet_controller.compile.recipe import AS_IS, FLOAT, HALF, Recipe
from edgefleet_controller.compile.search import Candidate, Unit
from edgefleet_controller.compile.watching import Cancelled
from edgefleet_controller.manifests import DeviceClass
from edgefleet_shared.errors import ModelError, ToolchainError
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
        return Measured(Candidate(recipe=recipe, figures=figures, misses=misses), {}, ())


def searched(steps: Lucky, monkeypatch: Any) -> search.Choice:
    monkeypatch.setattr(Finder, "_unlike", lambda self: "")
    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES))
    own = Finder(cast(Any, steps), cast(Any, steps), version, CLASS, target_named("onnxruntime"), {})
    return own._unpruned(Recipe())


def test_a_rung_that_was_lucky_on_a_rounds_samples_does_not_end_the_ladder(monkeypatch: Any) -> None:
    chosen = searched(Lucky(needed=9), monkeypatch).chosen
    assert chosen is not None
    assert chosen.recipe.precision == "int8"
    assert len(chosen.recipe.in_float) >= 9


def test_samples_that_are_to_blame_are_told_also_where_the_network_came_quantized(monkeypatch: Any) -> None:
    monkeypatch.setattr(Finder, "_unlike", lambda self: "the calibration samples are not like the held-out ones")
    version: Any = SimpleNamespace(
        as_is="a digest",
        as_is_engine="onnxruntime",
        holdout=SimpleNamespace(count=SAMPLES),
        original=None,
        pruning=None,
    )
    steps: Any = Lucky(needed=99)
    choice = Finder(steps, steps, version, CLASS, target_named("onnxruntime"), {})._search(Recipe())
    assert choice.chosen is None
    assert choice.why == "the calibration samples are not like the held-out ones"


def test_where_no_rung_holds_on_all_samples_half_precision_is_tried(monkeypatch: Any) -> None:
    chosen = searched(Lucky(needed=17), monkeypatch).chosen
    assert chosen is not None
    assert chosen.recipe.precision == "fp16"


class Fixed:
    """Steps in which every int8 candidate has these figures."""

    has_builder = False

    def __init__(self, spec: Any, **figures: Any) -> None:
        self.spec, self.figures = spec, figures
        self.ranked = False

    def compile(self, recipes: Sequence[Recipe]) -> list[tuple[Path, bool]]:
        for recipe in recipes:
            if reason := self.refuses(recipe):
                raise reason
        return [(Path("compiled"), False) for _ in recipes]

    def refuses(self, recipe: Recipe) -> Exception | None:
        """Why a recipe can't be made, if so."""
        return None

    def rank(self, recipe: Recipe) -> list[Unit]:
        self.ranked = True
        return UNITS

    def measure(self, made: Sequence[tuple[Recipe, Path]]) -> list[Measured]:
        fields: dict[str, Any] = {
            "engine": "tflite", "engine_version": "1", "float_bytes": 2_000_000, "compiled_bytes": 1_000_000, "samples": SAMPLES, "agreement": 0.97,
            "agreement_low": 0.9, "agreement_high": 0.99, "sqnr_db": 20.0, "p50_ms": 1.0, "float_p50_ms": 2.0, "peak_memory_bytes": 1,
        }  # fmt: skip
        figures = Figures(**(fields | self.figures))
        return [
            Measured(Candidate(recipe=r, figures=figures, misses=tuple(quality.misses(figures, self.spec, r))), {}, ())
            for r, _ in made
        ]


class Noisy(Fixed):
    """Steps in which int8 looks fast among others, on a busy machine, and takes as long as float when it is measured alone."""

    def __init__(self, spec: Any, alone_ms: float) -> None:
        super().__init__(spec)
        self.alone_ms = alone_ms

    def measure(self, made: Sequence[tuple[Recipe, Path]]) -> list[Measured]:
        alone = len(made) == 1
        self.figures = {"p50_ms": self.alone_ms if alone else 1.6, "peak_memory_bytes": 1 if alone else None}
        if made[0][0] == FLOAT:
            self.figures |= {"p50_ms": 2.0, "agreement": 1.0, "sqnr_db": quality.EXACT_DB, "compiled_bytes": 2_000_000}
        return super().measure(made)


@pytest.mark.parametrize(("alone_ms", "shipped"), [(1.6, "int8"), (1.99, "int8"), (2.02, "fp32")])
def test_what_is_no_faster_than_float_when_it_is_measured_alone_gives_way_to_it(alone_ms: float, shipped: str) -> None:
    kind = device_class("tflite", search={"effort": "full"})
    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES))
    noisy: Any = Noisy(kind.spec, alone_ms)
    own = Finder(noisy, noisy, version, kind, target_named("tflite"), {})
    first = own._unpruned(Recipe())
    assert first.chosen is not None
    assert first.chosen.recipe.precision == "int8"
    choice, final, _ = own.final(first)
    assert final.candidate.recipe.precision == shipped
    assert choice.chosen == final.candidate, "the report tells of it what was measured last"
    assert final.candidate in choice.candidates
    if shipped == "fp32":
        assert "no faster than float when it is measured alone: p50 2.02 ms, float 2.00" in choice.why


def found(kind: DeviceClass, plain: Recipe, **figures: Any) -> tuple[search.Choice, bool]:
    """(what the search ends in, whether it looked at single layers)."""
    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES))
    steps = Fixed(kind.spec, **figures)
    choice = Finder(cast(Any, steps), cast(Any, steps), version, kind, target_named("tflite"), {})._unpruned(plain)
    return choice, steps.ranked


def test_what_came_quantized_gives_way_to_float_where_that_is_faster() -> None:
    as_it_came = Recipe(quantizer=AS_IS, correct_bias=False)
    kind = device_class("tflite", search={"effort": "full"})
    choice, _ = found(kind, as_it_came, p50_ms=2.2)
    assert choice.chosen is not None
    assert choice.chosen.recipe == FLOAT
    assert "int8, as it came: slower than float" in choice.why
    faster, _ = found(kind, as_it_came)
    assert faster.chosen is not None
    assert faster.chosen.recipe == as_it_came
    fixed, _ = found(device_class("tflite", search={"effort": "fixed"}), as_it_came, p50_ms=2.2)
    assert fixed.chosen is None, "fixed tries nothing else"


def test_a_quick_search_ends_in_float_where_the_plain_recipe_fits_and_gains_nothing() -> None:
    for prefer, figures in (
        ("latency", {"p50_ms": 1.99}),
        ("size", {"compiled_bytes": 2_400_000}),
        ("transfer", {"wire_bytes": 900_000, "float_wire_bytes": 800_000}),
    ):
        choice, ranked = found(
            device_class("tflite", search={"effort": "quick", "prefer": prefer}), Recipe(), **figures
        )
        assert choice.chosen is not None
        assert choice.chosen.recipe == FLOAT, prefer
        assert choice.why.startswith("fp32 is shipped")
        assert not ranked, "what fits ends a quick search"
        choice, _ = found(
            device_class("tflite", search={"effort": "quick", "prefer": prefer}),
            Recipe(),
            wire_bytes=400_000,
            float_wire_bytes=800_000,
        )
        assert choice.chosen is not None
        assert choice.chosen.recipe == Recipe(), prefer


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_half_precision_that_is_no_faster_gives_way_to_float_as_int8_does(effort: str) -> None:
    half = {"precision": "fp16", "search": {"effort": effort}}
    choice, _ = found(device_class("tflite", **half), HALF, p50_ms=2.2)
    assert choice.chosen is not None
    assert choice.chosen.recipe == FLOAT
    assert choice.why.startswith("fp32 is shipped, because no fp16 candidate is better here (fp16: slower than float")
    fits, _ = found(device_class("tflite", **half), HALF, p50_ms=2.01)
    assert fits.chosen is not None
    assert fits.chosen.recipe == HALF, "half the bytes in as much time"
    fixed, _ = found(device_class("tflite", precision="fp16", search={"effort": "fixed"}), HALF, p50_ms=2.2)
    assert fixed.chosen is None, "fixed tries nothing else"


def test_half_precision_that_is_slower_only_when_it_is_measured_alone_gives_way_to_float() -> None:
    kind = device_class("tflite", precision="fp16", search={"effort": "quick"})
    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES))
    steps: Any = Fixed(kind.spec)
    own = Finder(steps, steps, version, kind, target_named("tflite"), {})
    first = own._unpruned(HALF)
    steps.figures = {"p50_ms": 2.2, "sqnr_db": 75.0}
    own._fresh.clear()
    choice, final, _ = own.final(first)
    assert final.candidate.recipe == FLOAT
    assert "not fp16, which fits but for this: slower than float" in choice.why


class Halved(Fixed):
    """Steps of a network whose weights came in half precision: int8 fits and gains nothing; as fp16 it is float but for the order of sums."""

    def measure(self, made: Sequence[tuple[Recipe, Path]]) -> list[Measured]:
        self.figures = {"p50_ms": 2.0, "float_p50_ms": 2.0}
        if made[0][0].precision == "fp16":
            self.figures |= {"p50_ms": 2.01, "sqnr_db": 121.0, "agreement": 1.0}
        return super().measure(made)


def test_where_int8_gains_nothing_half_precision_that_answers_as_float_is_shipped() -> None:
    kind = device_class("tflite", search={"effort": "quick"})
    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES))
    steps: Any = Halved(kind.spec)
    choice = Finder(steps, steps, version, kind, target_named("tflite"), {})._unpruned(Recipe())
    assert choice.chosen is not None
    assert (choice.chosen.recipe.precision, choice.chosen.figures.compiled_bytes) == ("fp16", 1_000_000)


def test_half_precision_that_can_not_be_made_leaves_float_and_is_told() -> None:
    kind = device_class("tflite", search={"effort": "quick"})
    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES))
    steps: Any = Halved(kind.spec)
    steps.refuses = lambda recipe: ModelError("no half here") if recipe == HALF else None
    choice = Finder(steps, steps, version, kind, target_named("tflite"), {})._unpruned(Recipe())
    assert choice.chosen is not None
    assert choice.chosen.recipe == FLOAT
    assert [(one.recipe, one.reason) for one in choice.left_out] == [(HALF, "no half here")]


NOTHING_TO_QUANTIZE = ModelError(
    "no operator of this network can be quantized for tflite", hint="ask for precision fp32"
)


def after(refuses: Callable[[Recipe], Exception | None], target: str = "tflite", **spec: Any) -> search.Choice:
    """What a whole search ends in where some recipes can't be made."""
    kind = device_class(target, **spec)
    steps = Fixed(kind.spec)
    steps.refuses = refuses  # type: ignore[method-assign]
    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES), original=None, pruning=None)
    return Finder(cast(Any, steps), cast(Any, steps), version, kind, target_named(target), {})._search(Recipe())


def no_int8(recipe: Recipe) -> Exception | None:
    return NOTHING_TO_QUANTIZE if recipe.precision == "int8" else None


def test_a_network_of_which_nothing_can_be_quantized_is_shipped_in_float_and_says_why() -> None:
    for effort in ("quick", "full"):
        choice = after(no_int8, search={"effort": effort})
        assert choice.chosen is not None
        assert choice.chosen.recipe == FLOAT
        assert choice.why.startswith(
            "fp32 is shipped, because int8 can't be made: no operator of this network can be quantized"
        )
        assert [(one.recipe, one.lasting) for one in choice.left_out] == [(Recipe(), True)]
    with pytest.raises(ModelError, match="no operator of this network can be quantized"):
        after(no_int8, search={"effort": "fixed"})


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_where_the_engine_breaks_over_int8_the_float_model_is_tried(effort: str) -> None:
    """Nothing was timed beside it, so that it is made and measured by itself."""
    kind = device_class("tflite", search={"effort": effort})

    class Breaking(Fixed):
        def measure(self, made: Sequence[tuple[Recipe, Path]]) -> list[Measured]:
            broke = {"died": True, "misses": ("engine failed: no such kernel",)}
            return [
                one._replace(candidate=msgspec.structs.replace(one.candidate, **broke))
                if one.candidate.recipe.precision == "int8"
                else one
                for one in super().measure(made)
            ]

    version: Any = SimpleNamespace(as_is="", holdout=SimpleNamespace(count=SAMPLES), original=None, pruning=None)
    breaking: Any = Breaking(kind.spec, p50_ms=2.0)
    choice = Finder(breaking, breaking, version, kind, target_named("tflite"), {})._search(Recipe())
    assert choice.chosen is not None
    assert choice.chosen.recipe == FLOAT
    assert "engine failed: no such kernel" in choice.why


def test_a_network_that_the_engine_can_not_run_in_float_either_is_refused_for_what_it_lacks() -> None:
    def lacks(recipe: Recipe) -> Exception:
        return ModelError(
            "tflite has no operator " + ("Round, which int8 added" if recipe.precision == "int8" else "Hardmax")
        )

    with pytest.raises(ModelError, match="no operator Hardmax"):
        after(lacks, search={"effort": "full"})


def test_another_quantizer_that_breaks_over_a_network_costs_its_candidate_alone() -> None:
    def nncf_breaks(recipe: Recipe) -> Exception | None:
        return ToolchainError("openvino compile failed: KeyError") if recipe.quantizer == "nncf" else None

    choice = after(nncf_breaks, "openvino", search={"effort": "full", "prefer": "size"})
    assert choice.chosen is not None
    assert choice.chosen.recipe.precision == "int8"
    assert [(one.recipe.quantizer, one.reason, one.lasting) for one in choice.left_out] == [
        ("nncf", "openvino compile failed: KeyError", False)
    ]


def test_a_cancelled_job_tries_nothing_else() -> None:
    with pytest.raises(Cancelled):
        after(
            lambda recipe: Cancelled("enough") if recipe.quantizer == "nncf" else None,
            "openvino",
            search={"effort": "full"},
        )
