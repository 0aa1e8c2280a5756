"""Drift: the same world gives a low figure; a dark, wrongly prepared or frozen one a high one; a handful of pictures gives none."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from edgefleet_agent.runtime.channel import Observed, decode_from_worker, encode
from edgefleet_agent.runtime.drift import DriftMeter
from edgefleet_agent.runtime.observing import MAX_VALUES, Observer
from edgefleet_shared import drift, golden
from edgefleet_shared.drift import MIN_SAMPLES, Drift, Statistics

Array = npt.NDArray[np.float32]
LITTLE, MUCH = 0.1, 0.25  # by custom, see edgefleet_shared.drift
CLASSES = 4
RANDOM = np.random.default_rng(7)
WEIGHTS = RANDOM.normal(size=(CLASSES, 48 * 64 * 3)).astype(np.float32) / 100


def scene() -> npt.NDArray[np.uint8]:
    """A picture as a camera sees one: patches of all brightnesses, some noise."""
    coarse = RANDOM.integers(0, 256, (6, 8, 3))
    fine = np.kron(coarse, np.ones((8, 8, 1))) + RANDOM.normal(0, 6, (48, 64, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


def prepared(picture: Array) -> Array:
    return ((picture.astype(np.float32) - 127.5) / 127.5)[None]


def answer(x: Array) -> Array:
    scores = WEIGHTS @ np.clip(np.nan_to_num(x.reshape(-1)), -10, 10) * 3
    return np.asarray([np.exp(scores) / np.exp(scores).sum()], np.float32)


@pytest.fixture(scope="module")
def normal() -> Statistics:
    shown = np.concatenate([prepared(scene()) for _ in range(24)])
    return golden.statistics({"x": shown}, {"y": np.concatenate([answer(x[None]) for x in shown])}, classification=True)


def seen(normal: Statistics, camera: Callable[[], Array], count: int = 120, steps: float = 0.0) -> Drift:
    """What is said after the camera was looked at so often; ``steps`` is how coarse the compiled model's answers are."""
    observer, meter = Observer(normal), DriftMeter(normal)
    for _ in range(count):
        x = camera()
        y = answer(x)
        observer.look({"x": x}, {"y": np.round(y / steps) * np.float32(steps) if steps else y})
        told = decode_from_worker(encode(observer.observed()))
        assert isinstance(told, Observed)
        meter.add(told)
    return meter.figures()


def test_the_same_world_has_not_moved(normal: Statistics) -> None:
    found = seen(normal, lambda: prepared(scene()))
    assert found.psi is not None
    assert found.psi < LITTLE
    assert found.repeated == 0
    assert found.classes is not None
    assert found.classes < 0.1
    x, y = found.tensors
    assert x.shift is not None
    assert x.shift < 0.7
    assert y.shift is None, "the mean of shares that add up to 1 is always the same"


def test_a_compiled_models_coarser_answers_are_no_drift(normal: Statistics) -> None:
    found = seen(normal, lambda: prepared(scene()), steps=1 / 256)
    assert found.psi is not None
    assert found.psi < LITTLE


def eight_bits(y: Array) -> Array:
    """As a softmax in int8 gives it: in steps of 1/256, and never 1."""
    return np.minimum(np.round(y * 256), 255).astype(np.float32) / 256


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(
    "compiled", [lambda y: y, eight_bits, lambda y: y.astype(np.float16)], ids=["float", "int8", "half"]
)
def test_answers_that_are_sure_are_no_drift_for_being_rounded(classes: int, compiled: Callable[[Array], Array]) -> None:
    """Almost all of a sure classifier's scores are as good as 0 or 1, just where a compiled model has no finer steps."""

    def scores() -> Array:
        sure = np.exp(RANDOM.normal(0, 12, (1, classes)).clip(-40, 40)).astype(np.float32)
        return sure / sure.sum()

    def look() -> Array:
        return RANDOM.normal(size=(1, 64)).astype(np.float32)

    normal = golden.statistics(
        {"x": np.concatenate([look() for _ in range(256)])},
        {"y": np.concatenate([scores() for _ in range(256)])},
        classification=True,
    )
    observer, meter = Observer(normal), DriftMeter(normal)
    for _ in range(300):
        observer.look({"x": look()}, {"y": compiled(scores())})
        meter.add(observer.observed())
    found = meter.figures()
    assert found.psi is not None
    assert found.psi < LITTLE
    assert all(t.shift is None or t.shift < 2 for t in found.tensors)


@pytest.mark.parametrize("value", [0.12345678, -3000.1, 0.0])
def test_an_output_that_is_always_the_same_is_no_drift_for_being_rounded(value: float) -> None:
    shown = RANDOM.normal(size=(16, 64))
    normal = golden.statistics({"x": shown}, {"y": np.full((16, 3), value, np.float32)}, classification=False)
    observer, meter = Observer(normal), DriftMeter(normal)
    for _ in range(MIN_SAMPLES):
        observer.look({"x": RANDOM.normal(size=(1, 64))}, {"y": np.full((1, 3), value, np.float16)})
        meter.add(observer.observed())
    found = next(t for t in meter.figures().tensors if t.kind == "output")
    assert found.psi < LITTLE
    other = DriftMeter(normal)
    for _ in range(MIN_SAMPLES):
        observer.look({"x": RANDOM.normal(size=(1, 64))}, {"y": np.full((1, 3), value + 1 + abs(value), np.float16)})
        other.add(observer.observed())
    assert next(t for t in other.figures().tensors if t.kind == "output").psi > 2 * MUCH


@pytest.mark.parametrize(
    "camera",
    [
        lambda: prepared(scene() * 0.35),
        lambda: scene()[None].astype(np.float32),
        lambda: scene()[None].astype(np.float32) / 255,
        lambda: prepared(np.zeros((48, 64, 3))),
        lambda: prepared(255 - scene() // 8),
    ],
    ids=["dark", "not normalised", "normalised otherwise", "lens cap", "overexposed"],
)
def test_another_world_has_moved_much(normal: Statistics, camera: Callable[[], Array]) -> None:
    found = seen(normal, camera)
    assert found.psi is not None
    assert found.psi > 2 * MUCH


def test_a_frozen_camera_repeats_itself(normal: Statistics) -> None:
    frame = prepared(scene())
    found = seen(normal, lambda: frame)
    assert found.repeated is not None
    assert found.repeated > 0.95
    assert found.psi is not None
    assert found.psi > LITTLE
    assert found.classes is not None
    assert found.classes > 0.2, "it says one class only"


def test_too_few_samples_give_no_figure(normal: Statistics) -> None:
    found = seen(normal, lambda: prepared(np.zeros((48, 64, 3))), count=MIN_SAMPLES - 1)
    assert found.psi is None
    assert found.note == f"not enough: {MIN_SAMPLES - 1} of {MIN_SAMPLES} requests looked at"


def test_an_artifact_from_before_says_nothing() -> None:
    assert DriftMeter(None).figures().psi is None
    assert not Observer(None).is_due()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_counted_and_spoil_nothing_else(normal: Statistics, value: float) -> None:
    def broken() -> Array:
        x = prepared(scene())
        x[0, :12] = value
        return x

    found = seen(normal, broken)
    x = next(t for t in found.tensors if t.name == "x")
    assert 0.2 < x.non_finite < 0.3
    assert x.psi < LITTLE
    everything = seen(normal, lambda: np.full((1, 48, 64, 3), value, np.float32))
    assert all(np.isfinite(t.psi) for t in everything.tensors)
    x = next(t for t in everything.tensors if t.name == "x")
    assert (x.non_finite, x.shift) == (1.0, None)


def answering(normal: Statistics, answers: Callable[[Array], Array]) -> Drift:
    """The world as it was, seen by a model that answers so."""
    observer, meter = Observer(normal), DriftMeter(normal)
    for _ in range(120):
        x = prepared(scene())
        observer.look({"x": x}, {"y": answers(answer(x))})
        meter.add(observer.observed())
    return meter.figures()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_model_whose_answers_are_no_numbers_has_moved_much(normal: Statistics, value: float, share: float) -> None:
    def broken(y: Array) -> Array:
        return np.full_like(y, value) if RANDOM.random() < share else y

    found = answering(normal, broken)
    assert found.psi is not None
    assert found.psi > 2 * MUCH
    assert next(t for t in found.tensors if t.name == "y").non_finite > share - 0.2


def test_an_answer_that_is_no_number_is_of_no_class(normal: Statistics) -> None:
    found = answering(normal, lambda y: np.full_like(y, np.nan))
    assert found.classes is None


def test_a_model_that_always_answers_the_same_has_moved_much(normal: Statistics) -> None:
    found = answering(normal, lambda y: np.full_like(y, 1 / CLASSES))
    assert found.psi is not None
    assert found.psi > 2 * MUCH


def test_a_model_that_masks_by_infinity_has_not_moved_when_it_goes_on_to() -> None:
    def masked(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.concatenate([x[:, :4], np.full((len(x), 4), -np.inf)], axis=1)

    shown = RANDOM.normal(size=(24, 40))
    normal = golden.statistics({"x": shown}, {"y": masked(shown)}, classification=False)

    def figures(answers: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Drift:
        observer, meter = Observer(normal), DriftMeter(normal)
        for _ in range(120):
            x = RANDOM.normal(size=(1, 40))
            observer.look({"x": x}, {"y": answers(x)})
            meter.add(observer.observed())
        return meter.figures()

    assert 0 < (figures(masked).psi or 0) < LITTLE
    for other in (lambda x: np.full((1, 8), -np.inf), lambda x: RANDOM.normal(size=(1, 8))):
        moved = figures(other)
        assert moved.psi is not None
        assert moved.psi > MUCH


def brick_wall() -> npt.NDArray[np.uint8]:
    """A scene that has a colour: its red is its brightest, its blue its darkest channel."""
    return np.clip(scene() * np.array([1.0, 0.75, 0.5]), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("first", [False, True], ids=["NHWC", "NCHW"])
def test_a_camera_that_swaps_red_and_blue_has_moved_much_and_says_which_channels(first: bool) -> None:
    def taken(swapped: bool = False) -> Array:
        x = prepared(brick_wall()[..., ::-1] if swapped else brick_wall())
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if first else x

    shown = np.concatenate([taken() for _ in range(24)])
    wall = golden.statistics({"x": shown}, {"y": np.concatenate([answer(x[None]) for x in shown])}, classification=True)
    same, swapped = (seen(wall, lambda swapped=swapped: taken(swapped)) for swapped in (False, True))
    for found in (same, swapped):
        assert found.tensors[0].psi < LITTLE, "all channels together hold what they always held"
    assert same.psi is not None
    assert max(channel.psi for channel in same.tensors[0].channels) < LITTLE
    red, green, blue = swapped.tensors[0].channels
    assert min(red.psi, blue.psi) > MUCH > LITTLE > green.psi
    assert min(red.shift or 0, blue.shift or 0) > 1
    assert swapped.psi is not None
    assert swapped.psi >= max(red.psi, blue.psi)


def test_channels_are_told_of_pictures_alone() -> None:
    shapes = {"picture": (8, 8, 3), "row": (3, 64), "either": (3, 8, 3), "film": (4, 8, 8, 3), "grey": (8, 8, 1)}
    tensors = {name: RANDOM.normal(size=(16, *shape)) for name, shape in shapes.items()}
    found = golden.statistics(tensors, {}, classification=False)
    assert {t.name: len(t.channels) for t in found.inputs if t.channels} == {"picture": 3}


def test_a_board_reads_the_statistics_of_an_artifact_from_before_channels() -> None:
    normal = golden.statistics(
        {"x": RANDOM.normal(size=(16, 8, 8, 3))}, {"y": RANDOM.normal(size=(16, 8))}, classification=False
    )
    told = msgspec.to_builtins(normal)
    for tensor in (*told["inputs"], *told["outputs"]):
        for field in ("axis", "channels", "non_finite"):
            del tensor[field]
    before = msgspec.convert(told, Statistics, strict=False)
    meter, observer = DriftMeter(before), Observer(before)
    for _ in range(MIN_SAMPLES):
        observer.look({"x": RANDOM.normal(size=(1, 8, 8, 3))}, {"y": RANDOM.normal(size=(1, 8))})
        meter.add(observer.observed())
    assert meter.figures().psi is not None
    assert meter.figures().tensors[0].channels == ()


def test_what_was_never_a_number_in_the_golden_set_is_no_drift() -> None:
    shown = RANDOM.normal(size=(8, 10))
    normal = golden.statistics({"x": shown}, {"y": np.full((8, 2), np.inf)}, classification=False)
    observer, meter = Observer(normal), DriftMeter(normal)
    for _ in range(MIN_SAMPLES):
        observer.look({"x": RANDOM.normal(size=(1, 10))}, {"y": np.full((1, 2), np.inf)})
        meter.add(observer.observed())
    found = meter.figures()
    assert found.psi is not None
    assert found.psi < 2 * MUCH


@pytest.mark.parametrize("seed", range(4))
def test_a_handful_of_golden_values_says_nothing_of_what_is_normal(seed: int) -> None:
    """A regression of a few measurements: each of eight golden answers is one number, and chance alone moves such a histogram."""
    random = np.random.default_rng(seed)
    shown = random.normal(size=(8, 16))
    normal = golden.statistics({"x": shown}, {"y": shown.sum(axis=1, keepdims=True)}, classification=False)
    observer, meter = Observer(normal), DriftMeter(normal)
    for _ in range(300):
        x = random.normal(size=(1, 16))
        observer.look({"x": x}, {"y": x.sum(axis=1, keepdims=True)})
        meter.add(observer.observed())
    found = meter.figures()
    assert [t.name for t in found.tensors] == ["x"]
    assert found.psi is not None
    assert found.psi < LITTLE
    little = golden.statistics({"x": shown[:, :1]}, {}, classification=False)
    observer, meter = Observer(little), DriftMeter(little)
    for _ in range(MIN_SAMPLES):
        observer.look({"x": random.normal(size=(1, 1))}, {})
        meter.add(observer.observed())
    assert meter.figures().psi is None
    assert "golden" in meter.figures().note


def test_numbers_too_large_to_add_up_break_nothing() -> None:
    normal = golden.statistics(
        {"x": RANDOM.normal(size=(16, 10))}, {"y": RANDOM.normal(size=(16, 2))}, classification=False
    )
    observer, meter = Observer(normal), DriftMeter(normal)
    for _ in range(MIN_SAMPLES):
        observer.look({"x": np.full((1, 10), 1.7e308)}, {"y": np.zeros((1, 2))})
        meter.add(observer.observed())
    assert [t.name for t in meter.figures().tensors] == ["y"]


def test_it_recovers_once_the_world_is_as_it_was(normal: Statistics) -> None:
    observer, meter = Observer(normal), DriftMeter(normal)
    for number in range(1000):
        x = prepared(scene() * (0.2 if number < 200 else 1.0))
        observer.look({"x": x}, {"y": answer(x)})
        meter.add(observer.observed())
    found = meter.figures()
    assert found.psi is not None
    assert found.psi < LITTLE


@pytest.mark.parametrize(
    "told",
    [
        Observed([], -1, 0),
        Observed([([1], 0, 0.0)] * 5, -1, 0),
        Observed([([-1] * 12, 0, 0.0)] * 5, -1, 0),
        Observed([([1] * 12, -5, 0.0)] * 5, -1, 0),
        Observed([([1] * 12, 0, float("nan"))] * 5, -1, 0),
    ],
    ids=["no tensors", "few bins", "negative", "negative count of none", "no number"],
)
def test_a_worker_that_tells_nonsense_is_not_believed(normal: Statistics, told: Observed) -> None:
    meter = DriftMeter(normal)
    with pytest.raises(ValueError, match="observation"):
        meter.add(told)
    assert meter.figures().samples == 0


def test_a_class_that_is_none_is_passed_over(normal: Statistics) -> None:
    meter = DriftMeter(normal)
    bins = [len(part.shares) for t in (*normal.inputs, *normal.outputs) for part in (t, *t.channels)]
    for _ in range(MIN_SAMPLES):
        meter.add(Observed([([1] * count, 0, 0.0) for count in bins], 10**9, 0))
    assert meter.figures().classes is None


def test_the_statistics_are_the_same_each_time_and_small() -> None:
    shown = {"x": RANDOM.normal(size=(16, 400, 100)).astype(np.float32)}
    answers = {"y": RANDOM.normal(size=(16, 1000)).astype(np.float32)}
    one = golden.statistics(shown, answers, classification=True)
    assert one == golden.statistics(shown, answers, classification=True)
    assert one.classes == (), "sixteen answers say nothing about a thousand classes"
    assert all(sum(t.shares) == pytest.approx(1, abs=1e-3) for t in (*one.inputs, *one.outputs))


def test_a_large_picture_is_looked_at_in_a_few_thousand_places_that_stay() -> None:
    normal = golden.statistics(
        {"x": RANDOM.normal(size=(4, 300, 300, 3))}, {"y": np.zeros((4, 2))}, classification=False
    )
    observer = Observer(normal)
    x = RANDOM.normal(size=(1, 300, 300, 3)).astype(np.float32)
    found = []
    for _ in range(2):
        observer.look({"x": x}, {"y": np.zeros((1, 2))})
        found.append(observer.observed())
    assert found[0] == found[1]
    assert sum(found[0].tensors[0][0]) == MAX_VALUES


def test_psi_of_the_same_shares_is_nothing_and_of_others_never_negative() -> None:
    assert drift.psi((0.25, 0.75), (1, 3)) == pytest.approx(0)
    assert drift.psi((0.0, 1.0), (5, 0)) > 1
    assert drift.divergence((0.5, 0.5), (0, 7)) == pytest.approx(0.311, abs=0.01)
    assert drift.divergence((1.0, 0.0), (0, 7)) == pytest.approx(1)
