"""Stage 2, compile: float weights in half precision. Receives an ONNX network, hands on one with the same arithmetic and smaller constants.

Large float constants become float16 with a Cast behind them, which engines fold back when they load the network: nothing is computed in float16,
for which processors without such arithmetic only pay. A constant that float16 can't hold closely stays as it is.
Source: IEEE 754-2019, binary16 (11 bits of precision, largest 65504, smallest normal 6.1e-5).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from . import job
from .weights import Array

MIN_ELEMENTS = 256  # a Cast costs a hundred bytes
MOST_ERROR = 1e-3  # of a channel's own root mean square
DEAD = 2.0**-16  # a channel below that share of the loudest one is what training has switched off
QUANTIZED = ("QuantizeLinear", "DequantizeLinear")  # their scales stay exact


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with its large float constants in half precision."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    kept = {name for node in own.graph.node if node.op_type in QUANTIZED for name in node.input}
    kept |= {value.name for value in (*own.graph.input, *own.graph.output)}
    casts, constants = [], []
    for tensor in own.graph.initializer:
        half = None if tensor.name in kept else _half(tensor)
        if half is None:
            constants.append(tensor)
            continue
        constants.append(numpy_helper.from_array(half, f"{tensor.name}/half"))
        cast = helper.make_node(
            "Cast", [f"{tensor.name}/half"], [tensor.name], name=f"{tensor.name}/float", to=onnx.TensorProto.FLOAT
        )
        casts.append(cast)
    nodes = list(own.graph.node)
    for field, values in (("initializer", constants), ("node", [*casts, *nodes])):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        own.graph.ClearField(field)
        getattr(own.graph, field).extend(copies)
    return own


def _half(tensor: onnx.TensorProto) -> Array | None:
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return None
    value = numpy_helper.to_array(tensor)
    return in_half(value, channels=tuple(range(min(2, value.ndim))))


def in_half(value: Array, *, channels: tuple[int, ...]) -> Array | None:
    """A float32 constant in float16; None where it is too small to be worth it, or float16 can't hold it closely.

    Args:
        channels: the axes that may count channels. Each is judged by itself: what comes behind may make a faint one as loud as the others.
    """
    if value.size < MIN_ELEMENTS:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        half = value.astype(np.float16)
        error = half.astype(np.float64) - value  # infinite, or not a number, where it does not fit
    return half if all(_close(value, error, axis) for axis in channels) else None


def _close(value: Array, error: Array, axis: int) -> bool:
    power, lost = (_powers(one, axis) for one in (value, error))
    dead = power <= DEAD**2 * power.max()
    return bool(np.all((lost <= MOST_ERROR**2 * power) | (dead & np.isfinite(lost))))


def _powers(value: Array, axis: int) -> Array:
    """Sum of squares of each slice along ``axis``."""
    rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1).astype(np.float64)
    return np.asarray(np.square(rows).sum(axis=1))


def write(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``jobs`` (each ``network`` and ``halved``, the file to write)."""
    for number, one in enumerate(request["jobs"]):
        progress("halving weights", number, len(request["jobs"]))
        onnx.save(halve(onnx.load(one["network"])), one["halved"])
    progress("halving weights", len(request["jobs"]), len(request["jobs"]))
    return {}
