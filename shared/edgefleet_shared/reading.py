"""Stages 1, 2 and 7: how an application reads a model's outputs. Pure data: written by the model's manifest, part of the artifact's acceptance contract, so
that compiler and boards judge the same answers. How outputs become those is in :mod:`edgefleet_shared.answers`, which needs numpy; this doesn't.
"""

from __future__ import annotations

from typing import Literal

import msgspec

AnswerKind = Literal["classification", "detection", "text", "segmentation", "raw"]
Decoder = Literal["yolov3", "yolov5", "yolov8", "yolox", "ssd", "boxes", "end_to_end"]


class PriorBoxes(msgspec.Struct, frozen=True, kw_only=True):
    """What an SSD's outputs are relative to. ``boxes``: N x 4 of little-endian float32, centre and sides in shares of the input; ``variances``: of
    x, y, width, height."""

    boxes: bytes
    variances: tuple[float, ...]
    order: Literal["xy", "yx"]
    sides: Literal["exponential", "linear"]

    @property
    def count(self) -> int:
        return len(self.boxes) // 16


class BoxDecoding(msgspec.Struct, frozen=True, kw_only=True):
    """How the outputs become boxes (see the Model manifest's ``output.detection``)."""

    decoder: Decoder
    anchors: tuple[tuple[float, float], ...] = ()
    masks: tuple[tuple[int, ...], ...] = ()
    strides: tuple[int, ...] = ()
    scores: Literal["as_is", "sigmoid", "softmax"] = "as_is"
    background: int | None = None
    priors: PriorBoxes | None = None
    relative: bool = False
    threshold: float
    nms_iou: float
    match_iou: float


class MaskReading(msgspec.Struct, frozen=True, kw_only=True):
    """``layout`` of outputs with four axes; ``threshold`` above which a pixel is in a mask of one channel, None where there is none."""

    layout: Literal["NCHW", "NHWC"] = "NCHW"
    threshold: float | None = None


class TextReading(msgspec.Struct, frozen=True, kw_only=True):
    """``blank``: the class that stands for no character; ``spaces``: those that are white space, which says nothing at the ends of a line."""

    blank: int = 0
    spaces: tuple[int, ...] = ()
