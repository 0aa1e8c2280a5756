"""Heads of detectors: receives a detector's raw outputs, hands on boxes and scores as the application reads them. Pure.

One entry of :data:`HEADS` per decoder: what outputs it takes, and how they become corners and scores. Sources: YOLOv3, Redmon 2018, section 2;
YOLOX, Ge 2021, and its demo's ``demo_postprocess``; YOLOv5, YOLOv8 and end to end (YOLOv10), the outputs that Ultralytics' export writes; SSD, Liu 2016, section 2.2,
with the variances of its Caffe code; linear sides: MediaPipe's ``TensorsToDetectionsCalculator``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from edgefleet_shared.reading import BoxDecoding, Decoder

_T = TypeVar("_T")
Array = npt.NDArray[Any]
Size = tuple[int, int]
"""Rows and columns of the input."""
MOST_CLASSES = 10_000  # that a number in an output can name; beyond it, it names none


class Part(NamedTuple):
    """Values of one meaning within an output: from ``begin`` to ``end`` on ``axis``, counting the batch axis; the rest is other things."""

    title: str
    axis: int
    begin: int
    end: int | None


class Head(NamedTuple):
    """A kind of head.

    Attributes:
        expected: the outputs that it takes, in words.
        fits: whether outputs of these shapes, for an input of this size, are such.
        decode: (N x 4 corners in pixels of the input, N x classes scores) of one picture's outputs, batch axis gone.
        parts: where one output holds values of several scales: hundreds of pixels would drown the noise of scores below 1.
        suppressed: whether the network itself drops the lesser of boxes that overlap.
    """

    expected: Callable[[BoxDecoding], str]
    fits: Callable[[list[tuple[int, ...]], BoxDecoding, Size], bool]
    decode: Callable[[Sequence[Array], BoxDecoding, Size], tuple[Array, Array]]
    parts: tuple[Part, ...] = ()
    suppressed: bool = False


def decoded(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    """(N x 4 corners, left, top, right, bottom, in pixels of the input; N x classes scores) of one picture.

    Args:
        outputs: in the network's order, without their batch axis; float64, finite.
    """
    corners, scores = HEADS[told.decoder].decode(outputs, told, size)
    return (corners * (size[1], size[0], size[1], size[0]) if told.relative else corners), scores


def misfit(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> str:
    """What outputs the decoder takes, where these are others; empty where they fit.

    Args:
        shapes: of the outputs, with their batch axis.
    """
    head = HEADS[told.decoder]
    return "" if head.fits(shapes, told, size) else head.expected(told)


# --- YOLOv3: one output per scale, a grid of logits


def _yolov3_fits(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> bool:
    return len(shapes) == len(told.masks) and all(
        len(shape) == 4 and shape[1] % len(mask) == 0 and shape[1] // len(mask) >= 6
        for shape, mask in zip(shapes, told.masks, strict=True)
    )


def _yolov3(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    corners, scores = [], []
    for output, mask in zip(outputs, told.masks, strict=True):
        rows, columns = output.shape[1:]
        head = output.reshape(len(mask), -1, rows, columns)
        y, x = np.mgrid[:rows, :columns]
        anchors = np.array([told.anchors[number] for number in mask])
        cx = (_sigmoid(head[:, 0]) + x) / columns * size[1]
        cy = (_sigmoid(head[:, 1]) + y) / rows * size[0]
        w, h = (np.exp(np.clip(head[:, 2 + i], -10, 10)) * anchors[:, i, None, None] for i in (0, 1))
        corners.append(_corners(np.stack([cx, cy, w, h], axis=-1).reshape(-1, 4)))
        likely = _sigmoid(head[:, 4:5]) * _sigmoid(head[:, 5:])
        scores.append(likely.transpose(0, 2, 3, 1).reshape(-1, head.shape[1] - 5))
    return np.concatenate(corners), np.concatenate(scores)


# --- one output, a row per candidate


def _rows_fit(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> bool:
    return len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][2] >= 6


def _yolov5(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    rows = outputs[0]
    return _corners(rows[:, :4]), rows[:, 4:5] * rows[:, 5:]


def _yolov8_fits(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> bool:
    # There are far more candidates than classes: an output the other way round is one that was transposed.
    return len(shapes) == 1 and len(shapes[0]) == 3 and 5 <= shapes[0][1] < shapes[0][2]


def _yolov8(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    rows = outputs[0].T
    return _corners(rows[:, :4]), rows[:, 4:]


def _yolox_fits(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> bool:
    cells = sum((size[0] // stride) * (size[1] // stride) for stride in told.strides)
    return _rows_fit(shapes, told, size) and shapes[0][1] == cells


def _yolox(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    rows, cells, strides = outputs[0], [], []
    for stride in told.strides:
        y, x = np.mgrid[: size[0] // stride, : size[1] // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((x.size, 1), stride))
    grid, scale = np.concatenate(cells), np.concatenate(strides)
    middle, sides = (rows[:, :2] + grid) * scale, np.exp(np.clip(rows[:, 2:4], -10, 10)) * scale
    return _corners(np.concatenate([middle, sides], axis=1)), rows[:, 4:5] * rows[:, 5:]


# --- one output, a row per box that the application reports, the best first


def _end_to_end_fits(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> bool:
    return len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][2] == 6


def _end_to_end(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    corners, score, kinds = outputs[0][:, :4], outputs[0][:, 4], np.rint(outputs[0][:, 5])
    real = (kinds >= 0) & (kinds < MOST_CLASSES)
    scores = np.full((len(corners), int(kinds[real].max(initial=0)) + 1), -np.inf)
    scores[real, kinds[real].astype(int)] = score[real]
    return corners, scores


# --- two outputs: boxes, decoded already or relative to priors, and scores


def _boxes_fit(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> bool:
    if [len(shape) for shape in shapes] != [3, 3]:
        return False
    boxes, scores = _boxes_first(shapes, shapes)
    classed = told.background is None or told.background < scores[2]
    return classed and boxes[1] == scores[1] and boxes[2] == 4


def _boxes(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    boxes, scores = _boxes_first(outputs, [output.shape for output in outputs])
    return boxes, _likely(scores, told)


def _ssd_fits(shapes: list[tuple[int, ...]], told: BoxDecoding, size: Size) -> bool:
    assert told.priors is not None
    if [len(shape) for shape in shapes] != [3, 3]:
        return False
    boxes, scores = _boxes_first(shapes, shapes)
    classed = told.background is None or told.background < scores[2]
    return classed and boxes[1] == scores[1] == told.priors.count and boxes[2] >= 4


def _ssd(outputs: Sequence[Array], told: BoxDecoding, size: Size) -> tuple[Array, Array]:
    boxes, scores = _boxes_first(outputs, [output.shape for output in outputs])
    assert told.priors is not None
    priors = np.frombuffer(told.priors.boxes, "<f4").reshape(-1, 4).astype(np.float64)
    moved = boxes[:, [1, 0, 3, 2] if told.priors.order == "yx" else [0, 1, 2, 3]] * told.priors.variances
    middle = priors[:, :2] + moved[:, :2] * priors[:, 2:]
    grown = moved[:, 2:] if told.priors.sides == "linear" else np.exp(np.clip(moved[:, 2:], -10, 10))
    corners = _corners(np.concatenate([middle, grown * priors[:, 2:]], axis=1))
    return corners * (size[1], size[0], size[1], size[0]), _likely(scores, told)


def _boxes_first(outputs: Sequence[_T], shapes: Sequence[tuple[int, ...]]) -> tuple[_T, _T]:
    """(boxes, scores): those with four columns are the boxes, whichever comes first; where that does not tell, the first."""
    first, second = outputs
    return (second, first) if shapes[1][-1] == 4 != shapes[0][-1] else (first, second)


def _likely(scores: Array, told: BoxDecoding) -> Array:
    """Shares, with nothing in the place of the background."""
    if told.scores == "sigmoid":
        scores = _sigmoid(scores)
    elif told.scores == "softmax":
        likely = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = likely / likely.sum(axis=1, keepdims=True)
    if told.background is not None:
        scores = scores.copy()
        scores[:, told.background] = -np.inf
    return scores


_ROWS = (Part("boxes", 2, 0, 4), Part("objectness", 2, 4, 5), Part("scores", 2, 5, None))
HEADS: dict[Decoder, Head] = {
    "yolov3": Head(
        lambda told: (
            "one output per mask, batch x anchors * (5 + classes) x rows x columns; here "
            + ", ".join(f"{len(mask)} anchors" for mask in told.masks)
        ),
        _yolov3_fits,
        _yolov3,
    ),
    "yolov5": Head(lambda told: "one output, batch x N x (5 + classes)", _rows_fit, _yolov5, _ROWS),
    "yolov8": Head(
        lambda told: "one output, batch x (4 + classes) x N, N the larger one (more columns than rows)",
        _yolov8_fits,
        _yolov8,
        (Part("boxes", 1, 0, 4), Part("scores", 1, 4, None)),
    ),
    "yolox": Head(
        lambda told: (
            f"one output, batch x N x (5 + classes), with N the cells of the strides {', '.join(map(str, told.strides))}"
        ),
        _yolox_fits,
        _yolox,
        _ROWS,
    ),
    "end_to_end": Head(
        lambda told: "one output, batch x N x 6",
        _end_to_end_fits,
        _end_to_end,
        (Part("boxes", 2, 0, 4), Part("scores", 2, 4, 5), Part("classes", 2, 5, 6)),
        suppressed=True,
    ),
    "ssd": Head(
        lambda told: (
            f"two outputs, boxes, batch x {told.priors.count if told.priors else 0} (as there are priors) x 4 or more, and scores, batch x as many x classes"
            + _with_background(told)
        ),
        _ssd_fits,
        _ssd,
    ),
    "boxes": Head(
        lambda told: "two outputs, boxes, batch x N x 4, and scores, batch x N x classes" + _with_background(told),
        _boxes_fit,
        _boxes,
    ),
}


def _with_background(told: BoxDecoding) -> str:
    return "" if told.background is None else f", class {told.background}, the background, among them"


def _corners(boxes: Array) -> Array:
    """N x 4 of centre and sides (x, y, width, height) as left, top, right, bottom."""
    found: Array = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    return found


def _sigmoid(x: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-np.clip(x, -50, 50)))
    return found
