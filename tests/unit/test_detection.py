"""Heads of detectors: what their outputs mean, and which outputs they take."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from edgefleet_shared import answers, detection
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.reading import BoxDecoding, Decoder, PriorBoxes

SIZE = (64, 32)  # rows, columns
CORNERS = [10.0, 20.0, 16.0, 28.0]
CENTRE = [13.0, 24.0, 6.0, 8.0]


def told(decoder: Any, **more: Any) -> BoxDecoding:
    more = {"threshold": 0.25, "nms_iou": 0.45, "match_iou": 0.5} | more
    return BoxDecoding(decoder=decoder, **more)


def test_every_decoder_of_a_manifest_is_there() -> None:
    assert detection.HEADS.keys() == set(get_args(Decoder))


@pytest.mark.parametrize(
    ("head", "output"),
    [
        (told("yolov5"), [[*CENTRE, 0.5, 0.2, 0.8]]),
        (told("yolov8"), np.transpose([[*CENTRE, 0.1, 0.4]])),
        (told("yolov5", relative=True), [[*np.divide(CENTRE, [32, 64, 32, 64]), 0.5, 0.2, 0.8]]),
        (told("yolov8", relative=True), np.transpose([[*np.divide(CENTRE, [32, 64, 32, 64]), 0.1, 0.4]])),
    ],
)
def test_one_row_for_each_candidate(head: BoxDecoding, output: Any) -> None:
    corners, scores = detection.decoded([np.array(output)], head, SIZE)
    assert corners == pytest.approx(np.array([CORNERS]))
    assert scores == pytest.approx(np.array([[0.1, 0.4]]))


def test_yolox_counts_in_cells_of_its_grids_one_stride_after_the_other() -> None:
    head = told("yolox", strides=(16, 32))
    rows = np.zeros((4 * 2 + 2 * 1, 7))
    rows[:, 4:] = [0.5, 0.2, 0.8]
    rows[5, :4] = [0.25, 0.5, np.log(2), np.log(3)]  # stride 16, row 2, column 1
    rows[9, :4] = [0.5, 0.5, 0, 0]  # stride 32, row 1, column 0
    corners, scores = detection.decoded([rows], head, SIZE)
    assert corners[5] == pytest.approx([20 - 16, 40 - 24, 20 + 16, 40 + 24])
    assert corners[9] == pytest.approx([0, 32, 32, 64])
    assert scores == pytest.approx(np.tile([0.1, 0.4], (10, 1)))


def test_boxes_in_shares_of_the_inputs_sides() -> None:
    boxes, scores = np.array([[0.5, 0.25, 1.0, 0.5]]), np.array([[0.9]])
    corners, kept = detection.decoded([boxes, scores], told("boxes", relative=True), SIZE)
    assert corners.tolist() == [[16, 16, 32, 32]]
    assert kept is scores


def priors(*boxes: list[float], **more: Any) -> PriorBoxes:
    more = {"variances": (0.1, 0.1, 0.2, 0.2), "order": "xy", "sides": "exponential"} | more
    return PriorBoxes(boxes=np.array(boxes, "<f4").tobytes(), **more)


# The box of CORNERS as what a network answers relative to a prior in the middle of half the picture's sides.
PRIOR = [0.5, 0.5, 0.5, 0.5]
MOVED = [(13 / 32 - 0.5) / 0.5 / 0.1, (24 / 64 - 0.5) / 0.5 / 0.1]
GROWN = [np.log(6 / 32 / 0.5) / 0.2, np.log(8 / 64 / 0.5) / 0.2]


@pytest.mark.parametrize(
    ("prior", "answer"),
    [
        (priors(PRIOR), [*MOVED, *GROWN]),
        (priors(PRIOR), [*MOVED, *GROWN, 7.0, 7.0]),  # key points behind it
        (priors(PRIOR, order="yx"), [*MOVED[::-1], *GROWN[::-1]]),
        (
            priors([0.5, 0.5, 1, 1], sides="linear", variances=(1 / 128,) * 4),
            [(13 / 32 - 0.5) * 128, (24 / 64 - 0.5) * 128, 6 / 32 * 128, 8 / 64 * 128],
        ),
    ],
)
def test_ssds_boxes_are_relative_to_priors(prior: PriorBoxes, answer: list[float]) -> None:
    head = told("ssd", priors=prior, scores="sigmoid")
    corners, scores = detection.decoded([np.array([answer]), np.array([[0.0]])], head, SIZE)
    assert corners == pytest.approx(np.array([CORNERS]), rel=1e-5)
    assert scores.tolist() == [[0.5]]


def test_boxes_and_scores_come_in_any_order_and_the_background_is_no_class() -> None:
    boxes, logits = np.array([CORNERS]), np.log([[0.7, 0.1, 0.2]])
    for outputs in ([boxes, logits], [logits, boxes]):
        corners, scores = detection.decoded(outputs, told("boxes", scores="softmax", background=0), SIZE)
        assert corners is boxes
        assert scores[0, 0] == -np.inf
        assert scores[0, 1:] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("head", "shapes", "words"),
    [
        (told("yolov5"), [(1, 25200, 85)], ""),
        (told("yolov5"), [(1, 85, 25200), (1, 85)], "batch x N x (5 + classes)"),
        (told("yolov8"), [(1, 84, 8400)], ""),
        (told("yolov8"), [(1, 8400, 84)], "more columns than rows"),
        (told("yolov8"), [(1, 84, 80, 80), (1, 84, 40, 40)], "one output"),
        (told("yolox", strides=(8, 16, 32)), [(1, 32 + 8 + 2, 6)], ""),
        (told("yolox", strides=(8, 16)), [(1, 32 + 8 + 2, 6)], "the strides 8, 16"),
        (told("boxes"), [(1, 100, 4), (1, 100, 3)], ""),
        (told("boxes"), [(1, 100, 4), (1, 99, 3)], "two outputs"),
        (told("boxes"), [(1, 100, 3), (1, 100, 4)], ""),
        (told("boxes", background=3), [(1, 100, 4), (1, 100, 3)], "class 3, the background, among them"),
        (told("ssd", priors=priors(PRIOR, PRIOR)), [(1, 2, 4), (1, 2, 1)], ""),
        (told("ssd", priors=priors(PRIOR, PRIOR)), [(1, 2, 16), (1, 2, 1)], ""),
        (told("ssd", priors=priors(PRIOR)), [(1, 2, 4), (1, 2, 1)], "boxes, batch x 1 (as there are priors)"),
        (told("ssd", priors=priors(PRIOR)), [(1, 4, 1, 1), (1, 1, 1)], "two outputs"),
        (told("yolov3", masks=((0,),), anchors=((1.0, 1.0),)), [(1, 7, 4, 4)], ""),
        (told("yolov3", masks=((0, 1),), anchors=((1.0, 1.0),) * 2), [(1, 9, 4, 4)], "here 2 anchors"),
    ],
)
def test_other_outputs_are_told_from_those_that_a_head_takes(head: BoxDecoding, shapes: Any, words: str) -> None:
    found = detection.misfit(shapes, head, SIZE)
    assert words in found
    assert bool(words) == bool(found)


def test_rows_end_to_end_hold_their_class_as_a_number() -> None:
    rows = [[*CORNERS, 0.5, 2.2], [*CORNERS, 0.9, 0], [*CORNERS, 0.8, -1], [*CORNERS, 0.7, 1e9]]
    corners, scores = detection.decoded([np.array(rows)], told("end_to_end"), SIZE)
    assert corners.tolist() == [CORNERS] * 4
    assert scores.argmax(axis=1)[:2].tolist() == [2, 0]
    assert scores.max(axis=1).tolist() == [0.5, 0.9, -np.inf, -np.inf], "there are no such classes"
    assert detection.misfit([(1, 300, 7)], told("end_to_end"), SIZE) == "one output, batch x N x 6"


def test_boxes_end_to_end_are_not_dropped_a_second_time() -> None:
    rows = np.array([[[*CORNERS, 0.9, 0], [*CORNERS, 0.8, 0]]], np.float32)
    reading = answers.Reading("detection", (TensorSpec("y", "FP32", (1, 2, 6)),), SIZE, told("end_to_end"))
    assert len(answers.boxes({"y": rows}, reading)[0]) == 2
