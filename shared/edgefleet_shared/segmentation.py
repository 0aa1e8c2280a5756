"""Stage 1 and 2: what a segmentation's outputs mean. Pure: receives an output's values, hands on the class of every pixel.

Three kinds of output are common: scores of each class on an axis of their own (the largest is the answer), one mask (a pixel is in it above a threshold),
and classes as whole numbers, where the network ends in an ArgMax. Reading one as another finds all pictures alike, whatever a compiler did to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.reading import MaskReading

Array = npt.NDArray[Any]
NO_CLASS = -1
WHOLE = ("UINT8", "INT8", "INT32", "INT64", "BOOL")


def class_axis(output: TensorSpec, reading: MaskReading) -> int | None:
    """The axis of an output that counts classes, None where it holds one answer for each pixel."""
    axis = 1 if reading.layout == "NCHW" else 3
    scores = output.datatype not in WHOLE and len(output.shape) == 4 and output.shape[axis] != 1
    return axis if scores else None


def misfit(outputs: Sequence[TensorSpec], reading: MaskReading, size: tuple[int, int]) -> str:
    """Why outputs can't be read so, in words; empty where they can.

    Args:
        size: rows and columns of the picture that goes in.
    """
    for output in outputs:
        told = f"{output.name} {output.shape}"
        if output.datatype not in WHOLE and len(output.shape) not in (3, 4):
            return f"{told} is no picture of classes, nor a mask"
        if len(output.shape) == 4:
            other = "NHWC" if reading.layout == "NCHW" else "NCHW"
            places = {"NCHW": output.shape[2:], "NHWC": output.shape[1:3]}
            if _pictures(places[other], size) and not _pictures(places[reading.layout], size):
                return f"{told} has its rows and columns where layout {other} has them: give output.segmentation.layout"
        one = output.datatype not in WHOLE and class_axis(output, reading) is None
        if one and reading.threshold is None:
            return f"{told} has one channel, whose largest is always the same: give output.segmentation.threshold"
    if reading.threshold is not None and all(class_axis(output, reading) is not None for output in outputs):
        return "every output has scores of several classes, the largest of which is the answer: leave output.segmentation.threshold away"
    return ""


def _pictures(place: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether rows and columns are those of a picture of that size, whole or in its proportions: many networks answer at a quarter of it."""
    return min(size) > 0 and min(place) > 1 and place[0] * size[1] == place[1] * size[0]


def pixels(values: Array, output: TensorSpec, reading: MaskReading) -> Array:
    """The class of every pixel: integers, samples x pixels; :data:`NO_CLASS` where a value is not a number.

    Args:
        values: samples x the output's axes.
    """
    axis = class_axis(output, reading)
    if axis is not None:
        finite = np.isfinite(values).all(axis=axis)
        found: Array = np.argmax(np.nan_to_num(values), axis=axis)
    else:
        finite = np.isfinite(values)
        known = np.nan_to_num(values)
        found = (
            np.rint(known).astype(np.int64)
            if reading.threshold is None or output.datatype in WHOLE
            else known > reading.threshold
        )
    classes: Array = np.where(finite, found, NO_CLASS)
    return classes.reshape(len(values), -1)
