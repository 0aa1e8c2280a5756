"""Answers as the application gives them: boxes, lines, classes."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
import pytest
from edgefleet_controller.compile.packing import contract
from edgefleet_controller.compile.port import target_named
from edgefleet_controller.compile.quality import compare, unlike
from edgefleet_controller.compile.telling import caution, untold_on_boards, vacuous
from edgefleet_controller.model_version import AcceptanceLimits, ModelVersion, Split
from edgefleet_shared import answers
from edgefleet_shared.contract import AcceptanceContract, TensorSpec
from edgefleet_shared.reading import BoxDecoding, MaskReading, TextReading
from support.networks import device_class

SPLIT = Split("sha256:" + "0" * 64, 2)
ALPHABET = ("a", "b", " ")


def version(kind: Any, *outputs: TensorSpec, **more: Any) -> ModelVersion:
    limits = AcceptanceLimits(min_agreement=0.9, min_cosine=0.8, tolerance_abs=0.1, tolerance_rel=0.0, min_golden=8)
    return ModelVersion(
        schema=1, model="m", version="1", network=SPLIT.digest, inputs=(TensorSpec("x", "FP32", (1, 3, 64, 64)),),
        outputs=outputs, output_kind=kind, encoding=None, labels=(), calibration=SPLIT, calibration_method="minmax",
        holdout=SPLIT, golden=SPLIT, acceptance=limits, **more,
    )  # fmt: skip


YOLO = BoxDecoding(decoder="yolov3", anchors=((16.0, 8.0),), masks=((0,),), threshold=0.5, nms_iou=0.45, match_iou=0.5)
HEAD = version("detection", TensorSpec("head", "FP32", (1, 7, 4, 4)), detection=YOLO)


def head(*cells: tuple[int, int, int, float], count: int = 1) -> Any:
    """One anchor, two classes on a 4 x 4 grid of 16 pixels; (row, column, class, score logit) per object."""
    found = np.full((count, 7, 4, 4), -20.0, np.float32)
    found[:, :4] = 0.0
    for row, column, kind, logit in cells:
        found[:, 4, row, column] = logit
        found[:, 5 + kind, row, column] = 20.0
    return found


def test_a_yolo_head_decodes_to_corners_in_the_inputs_pixels() -> None:
    ((box,),) = answers.boxes({"head": head((1, 2, 1, 20.0))}, HEAD.reading)
    assert box[:4] == pytest.approx((40 - 8, 24 - 4, 40 + 8, 24 + 4))
    assert (round(box.score, 3), box.kind) == (1.0, 1)


def test_boxes_below_the_applications_threshold_are_not_there() -> None:
    assert answers.boxes({"head": head((1, 2, 1, -0.1))}, HEAD.reading) == [[]]
    assert len(answers.boxes({"head": head((1, 2, 1, 0.1))}, HEAD.reading)[0]) == 1


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 3, 96, 64), (96, 64)), ((1, 96, 64, 3), (96, 64)), ((1, 1, 96, 3), (96, 3))]
)
def test_a_picture_that_comes_as_a_tensor_has_its_channels_where_there_are_few(
    shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    taken = msgspec.structs.replace(HEAD, inputs=(TensorSpec("x", "FP32", shape),))
    assert taken.reading.size == size


def test_of_two_boxes_on_one_thing_the_better_stays() -> None:
    told = BoxDecoding(decoder="boxes", anchors=(), masks=(), threshold=0.5, nms_iou=0.45, match_iou=0.5)
    outputs = {
        "boxes": np.array([[[0, 0, 10, 10], [1, 1, 11, 11], [30, 30, 40, 40]]], np.float32),
        "scores": np.array([[[0.7, 0.1], [0.9, 0.1], [0.8, 0.1]]], np.float32),
    }
    specs = (TensorSpec("boxes", "FP32", (1, 3, 4)), TensorSpec("scores", "FP32", (1, 3, 2)))
    (found,) = answers.boxes(outputs, version("detection", *specs, detection=told).reading)
    assert [(b.left, round(b.score, 2)) for b in found] == [(1.0, 0.9), (30.0, 0.8)]


def test_a_detector_is_judged_by_recall_and_precision_of_boxes() -> None:
    want = head((0, 0, 0, 5.0), (3, 3, 1, 5.0))
    missing = compare({"head": head((0, 0, 0, 5.0))}, {"head": want}, HEAD)
    assert (missing.figures["shares"]["box_recall"].value, missing.figures["shares"]["box_precision"].value) == (
        0.5,
        1.0,
    )
    assert missing.figures["agreement"] == 0.5
    assert missing.changed == (0,)
    more = compare({"head": want}, {"head": head((0, 0, 0, 5.0))}, HEAD).figures["shares"]
    assert (more["box_recall"].value, more["box_precision"].value) == (1.0, 0.5)
    assert more["box_precision"].low < 0.5 < more["box_precision"].high
    other = compare({"head": head((0, 0, 1, 5.0))}, {"head": head((0, 0, 0, 5.0))}, HEAD)
    assert other.figures["agreement"] == 0.0, "the same box of another class is no match"


def test_a_detector_that_sees_boxes_everywhere_is_soon_judged() -> None:
    rng = np.random.default_rng(0)
    corners = np.tile(rng.uniform(0, 600, (80_000, 2)), 2) + np.array([0, 0, 4, 4])
    outputs = {
        "boxes": corners[None].astype(np.float32),
        "scores": rng.uniform(0.6, 1, (1, 80_000, 2)).astype(np.float32),
    }
    specs = (TensorSpec("boxes", "FP32", (1, 80_000, 4)), TensorSpec("scores", "FP32", (1, 80_000, 2)))
    told = BoxDecoding(decoder="boxes", threshold=0.5, nms_iou=0.45, match_iou=0.5)
    began = time.process_time()
    (found,) = answers.boxes(outputs, version("detection", *specs, detection=told).reading)
    assert time.process_time() - began < 10
    assert 1000 < len(found) <= answers.MOST_PLACES
    assert found[0].score == pytest.approx(outputs["scores"].max())


def test_a_box_can_stand_for_one_other_only() -> None:
    box = answers.Box(0, 0, 10, 10, 0.9, 0)
    assert answers.matched([box, box], [box], 0.5) == 1


def steps(*numbers: int) -> Any:
    return np.eye(4, dtype=np.float32)[list(numbers)][None]


def test_lines_keep_their_spaces_and_lose_repeats_and_blanks() -> None:
    # a a blank a space b b -> "aa b"
    assert version("text", TensorSpec("y", "FP32", (1, 7, 4)), characters=ALPHABET).lines(
        steps(1, 1, 0, 1, 3, 2, 2)
    ) == ["aa b"]


def test_a_lost_space_is_another_line() -> None:
    spec = version("text", TensorSpec("y", "FP32", (1, 3, 4)), characters=ALPHABET, truth=("a b",))
    found = compare({"y": steps(1, 0, 2)}, {"y": steps(1, 3, 2)}, spec).figures
    assert found["agreement"] == 0.0
    assert found["shares"]["float_accuracy"].value == 1.0
    assert found["shares"]["accuracy"].value == 0.0


def test_a_class_that_is_not_a_number_is_no_class() -> None:
    assert answers.classes(np.array([[1.0, np.nan], [0.0, 2.0]])).tolist() == [[-1], [1]]


def test_a_segmented_picture_agrees_when_nearly_all_its_pixels_do() -> None:
    want = np.zeros((2, 2, 10, 10), np.float32)
    want[:, 0] = 1.0
    have = want.copy()
    have[1, 1, 0] = 2.0  # a tenth of the second picture
    have[0, 1, 0, 0] = 2.0
    spec = version("segmentation", TensorSpec("y", "FP32", (1, 2, 10, 10)))
    assert compare({"y": have}, {"y": want}, spec).changed == (1,)


def masks(*outputs: TensorSpec, threshold: float | None = None, layout: Any = "NCHW") -> ModelVersion:
    return version("segmentation", *outputs, masks=MaskReading(threshold=threshold, layout=layout))


def test_a_mask_of_one_channel_is_read_at_its_threshold() -> None:
    want = np.zeros((3, 1, 20, 20), np.float32)
    want[:, 0, :10, :8] = 0.9
    have = want.copy()
    have[1] = 0.0  # nothing is found any more
    have[2] = 0.31  # all is found
    found = compare({"y": have}, {"y": want}, masks(TensorSpec("y", "FP32", (1, 1, 20, 20)), threshold=0.3))
    assert found.changed == (1, 2)


def test_what_is_small_in_a_picture_may_not_vanish_from_its_mask() -> None:
    want = np.zeros((2, 1, 100, 100), np.float32)
    want[:, 0, 50:55, 20:60] = 1.0  # a line of text: 2 of 100 pixels
    have = want.copy()
    have[1] = 0.0
    assert np.mean((have > 0.5) == (want > 0.5)) > answers.SAME_PIXELS
    found = compare({"y": have}, {"y": want}, masks(TensorSpec("y", "FP32", (1, 1, 100, 100)), threshold=0.5))
    assert found.changed == (1,)


def test_scores_whose_classes_lie_last_are_read_along_them() -> None:
    want = np.zeros((2, 10, 10, 3), np.float32)
    want[..., 0] = 1.0
    have = want.copy()
    have[1, :5, :, 2] = 2.0
    spec = TensorSpec("y", "FP32", (1, 10, 10, 3))
    assert compare({"y": have}, {"y": want}, masks(spec, layout="NHWC")).changed == (1,)


def test_whole_numbers_are_classes_already() -> None:
    want = np.zeros((2, 1, 10, 10), np.float32)
    have = want.copy()
    have[1, 0, :5] = 7.0
    assert compare({"y": have}, {"y": want}, masks(TensorSpec("y", "INT64", (1, 1, 10, 10)))).changed == (1,)


def test_every_output_of_a_segmentation_is_judged() -> None:
    one, two = TensorSpec("one", "FP32", (1, 2, 10, 10)), TensorSpec("two", "FP32", (1, 2, 10, 10))
    want = np.zeros((2, 2, 10, 10), np.float32)
    want[:, 0] = 1.0
    assert compare({"one": want, "two": -want}, {"one": want, "two": want}, masks(one, two)).changed == (0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_pixel_that_is_not_a_number_has_no_class(bad: float) -> None:
    want = np.zeros((1, 1, 10, 10), np.float32)
    want[..., :4] = 1.0
    have = np.where(want > 0, np.float32(bad), want)
    spec = masks(TensorSpec("y", "FP32", (1, 1, 10, 10)), threshold=0.5)
    assert compare({"y": have}, {"y": want}, spec).changed == (0,)


def test_held_out_samples_in_which_the_float_model_segments_nothing_tell_nothing() -> None:
    spec = masks(TensorSpec("y", "FP32", (1, 1, 10, 10)), threshold=0.5)
    empty = np.full((4, 1, 10, 10), 0.1, np.float32)
    assert "one and the same class" in vacuous({"y": empty}, spec)
    empty[2, 0, 3:6] = 0.7
    assert vacuous({"y": empty}, spec) == ""


def test_labelled_samples_give_the_accuracy_of_both_models() -> None:
    spec = version("classification", TensorSpec("y", "FP32", (1, 2)), truth=("0", "1"))
    want, have = np.array([[1, 0], [1, 0]], np.float32), np.array([[1, 0], [0, 1]], np.float32)
    shares = compare({"y": have}, {"y": want}, spec).figures["shares"]
    assert (shares["accuracy"].value, shares["float_accuracy"].value) == (1.0, 0.5)
    assert msgspec.to_builtins(shares["accuracy"])["of"] == 2


def test_held_out_samples_that_could_not_tell_damage_are_named() -> None:
    one = {"y": np.array([[1, 0], [1, 0.5]], np.float32)}
    plain = version("classification", TensorSpec("y", "FP32", (1, 2)))
    assert "one and the same answer" in vacuous(one, plain)
    assert vacuous({"y": np.array([[1, 0], [0, 1]], np.float32)}, plain) == ""
    assert "no box in any of 3" in vacuous({"head": head(count=3)}, HEAD)
    assert "in 7 held-out pictures is 7 of 8 boxes" in vacuous({"head": head((0, 0, 0, 5.0), count=7)}, HEAD)
    assert vacuous({"head": head((0, 0, 0, 5.0), count=8)}, HEAD) == ""


def test_golden_samples_that_could_tell_boards_nothing_are_named() -> None:
    def told(answered: Any, judged: ModelVersion, **changes: Any) -> str:
        limits = msgspec.structs.replace(judged.acceptance, tolerance_abs=0.0, **changes)
        judged = msgspec.structs.replace(judged, acceptance=limits)
        asked = contract(judged, device_class(), target_named("onnxruntime"))
        return untold_on_boards({judged.outputs[0].name: answered}, judged, asked)

    assert "finds no box in any of the 3 golden" in told(head(count=3), HEAD)
    assert told(head((0, 0, 0, 5.0)), HEAD) == ""
    assert told(head(count=3), HEAD, tolerance_rel=0.1) == "", "a board then compares values"
    text = version("text", TensorSpec("y", "FP32", (1, 3, 4)), characters=ALPHABET)
    assert "reads nothing in any" in told(steps(0, 3, 0), text)
    assert told(steps(0, 1, 0), text) == ""
    mask = masks(TensorSpec("y", "FP32", (1, 1, 10, 10)), threshold=0.5)
    assert "one and the same class to every pixel" in told(np.zeros((4, 1, 10, 10), np.float32), mask)


def test_samples_that_prove_less_than_their_number_seems_to_are_cautioned_of() -> None:
    rng = np.random.default_rng(0)
    plain = version("classification", TensorSpec("y", "FP32", (1, 3)))
    answered = {"y": np.eye(3, dtype=np.float32)[[0, 1, 0, 2, 0, 1, 0, 2]]}
    different = rng.integers(0, 256, (8, 24, 24, 3)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    assert caution("golden", answered, different, plain) == ""
    assert caution("golden", answered, None, plain) == "", "tensors may be alike and mean other things"
    of_one = caution("golden", {"y": answered["y"][[0] * 8]}, None, plain)
    assert of_one == "golden samples: the float model gives all 8 one and the same answer, as a damaged one may"
    frames = np.clip(different[[0, 0, 0, 0, 0, 0, 0, 1]] + rng.normal(0, 4, (8, 96, 96, 3)), 0, 255).astype(np.uint8)
    told = caution("held-out", {"y": answered["y"][[0] * 7 + [1]]}, frames, plain)
    assert told.startswith("held-out samples: 8 pictures are 2 but for noise")
    assert caution("held-out", answered, frames, plain) == "", "each of three answers to what is nearly one picture"
    assert "pictures are 2 but" in caution("golden", {"head": head((0, 0, 0, 5.0), count=8)}, frames, HEAD)
    moving = {"head": np.concatenate([head((0, row % 2, row // 2, 5.0)) for row in range(4)] * 2)}
    assert caution("golden", moving, frames, HEAD) == "", "what is found moves, which small averages may not show"


def test_boards_read_answers_unless_a_tolerance_has_them_compare_values() -> None:
    def asked(judged: ModelVersion, **limits: float) -> AcceptanceContract:
        limits = {"tolerance_abs": 0.0} | limits
        judged = msgspec.structs.replace(judged, acceptance=msgspec.structs.replace(judged.acceptance, **limits))
        found = contract(judged, device_class(), target_named("onnxruntime"))
        found.check()
        return found

    assert (asked(HEAD).kind, asked(HEAD).detection, asked(HEAD).min_cosine) == ("detection", YOLO, 0.8)
    assert (asked(HEAD, tolerance_abs=0.1).kind, asked(HEAD, tolerance_abs=0.1).detection) == ("raw", None)
    spaced = version("text", TensorSpec("y", "FP32", (1, 3, 4)), characters=ALPHABET)
    assert (asked(spaced).kind, asked(spaced).text) == ("text", TextReading(spaces=(3,)))
    rows = msgspec.structs.replace(YOLO, decoder="end_to_end")
    unordered = version("detection", TensorSpec("y", "FP32", (1, 5, 6)), detection=rows)
    assert asked(unordered).min_cosine == 0.0, "rows that change places have another cosine"


def test_a_float_model_that_answers_with_no_numbers_is_not_int8s_fault() -> None:
    spec = version("raw", TensorSpec("y", "FP32", (1, 2)))
    answered = np.array([[1, 0], [0, np.nan], [-np.inf, 1]], np.float32)
    assert "'y' holds NaN or infinity for 2 of 3 held-out samples" in vacuous({"y": answered}, spec)
    answered[1] = 2.0
    assert vacuous({"y": answered}, spec) == ""


def test_a_float_model_that_answers_by_chance_points_at_colours_layout_and_labels() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 10)).astype(np.float32)
    guessed = version("classification", TensorSpec("y", "FP32", (1, 10)), truth=tuple(str(i % 10) for i in range(200)))
    assert "is the colour order" in vacuous({"y": scores}, guessed)
    known = version(
        "classification", TensorSpec("y", "FP32", (1, 10)), truth=tuple(str(i) for i in scores.argmax(axis=1))
    )
    assert vacuous({"y": scores}, known) == ""


def test_calibration_of_another_spread_than_the_held_out_samples_is_told() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0.1, 1.0, (16, 3, 8, 8)).astype(np.float32)
    assert unlike({"x": x}, {"x": x + 0.2}) == ""
    for other in (x / 128 - 1, x * 10, x + 9):
        assert "are not like the held-out ones" in unlike({"x": other}, {"x": x})
