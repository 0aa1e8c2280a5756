"""Stage 2, compile: convolutions for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table.

Signals of one dimension are computed as pictures of height 1. A transposed convolution that TFLite's own can't express (groups,
dilations) is a convolution over an input with zeros between its elements (Dumoulin & Visin, arXiv:1603.07285, section 4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from .graph import Array
from .layout import Shape, Value, channels_last
from .node import Node
from .window import Window, padded, window_of
from .writer import Operator, Writer

SAME, VALID = int(schema.Padding.SAME), int(schema.Padding.VALID)


def _flat(writer: Writer, node: Node) -> tuple[Value, Array]:
    """(input as a picture with its channels last, weight in four dimensions)."""
    weight, rank = node.fixed(1), len(writer.value(node.inputs[0]).shape)
    if rank not in (3, 4) or weight.ndim != rank:
        raise node.refused(f"in {rank - 2} dimensions")
    if not np.isfinite(weight).all():
        raise node.refused("with weights that are not finite")
    x = writer.value(node.inputs[0])
    if rank == 3:
        x = writer.reshape(f"{node.output}/picture", x, (x.shape[0], x.shape[1], 1, x.shape[2]))
        weight = weight[:, :, None, :]
    return writer.laid(x, channels_last(4)), weight


def _bias(node: Node, channels: int) -> Array:
    bias = node.optional(2)
    if bias is not None and bias.size != channels:
        raise node.refused(f"with {bias.size} biases for {channels} channels")
    return np.zeros(channels, np.float32) if bias is None else bias.reshape(channels)


def _fits(node: Node, channels: int, weight: Array, groups: int, axis: int) -> None:
    """The channel counts that ONNX's inference doesn't compare."""
    wanted = channels if axis == 0 else channels // max(groups, 1)
    if groups < 1 or channels % groups or weight.shape[axis] != wanted or weight.shape[0] % groups:
        raise node.refused(f"with weights {list(weight.shape)} for {channels} channels in {groups} groups")


def _convolve(
    writer: Writer, name: str, x: Value, weight: Array, bias: Array, groups: int, window: Window, padding: int, fused: int,
    weight_name: str,
) -> None:  # fmt: skip
    """A convolution of a picture by weights out x in / groups x height x width."""
    outputs, each, *kernel = weight.shape
    size = (x.shape[2], x.shape[3]) if padding == VALID else None
    out = window.unpadded(size) if size else window.same_size((x.shape[2], x.shape[3]))
    shape = (x.shape[0], outputs, *out)
    b = writer.constant(f"{name}/bias", bias)
    common: dict[str, Any] = {
        "order": channels_last(4), "padding": padding, "strideH": window.strides[0], "strideW": window.strides[1],
        "dilationHFactor": window.dilations[0], "dilationWFactor": window.dilations[1], "fusedActivationFunction": fused,
    }  # fmt: skip
    if groups == x.shape[1] > 1 and each == 1:
        w = writer.constant(weight_name, weight.reshape(outputs, *kernel).transpose(1, 2, 0)[None])
        multiplier = outputs // groups
        writer.emit(
            name, "DEPTHWISE_CONV_2D", [x, w, b], shape, "DepthwiseConv2DOptions", depthMultiplier=multiplier, **common
        )
    else:  # TFLite sees groups in the weights' number of channels
        w = writer.constant(weight_name, weight.transpose(0, 2, 3, 1))
        writer.emit(name, "CONV_2D", [x, w, b], shape, "Conv2DOptions", **common)


def _conv(writer: Writer, node: Node) -> None:
    x, weight = _flat(writer, node)
    groups = node.get("group", 1)
    _fits(node, x.shape[1], weight, groups, 1)
    window = window_of(node, weight.shape[2:], (x.shape[2], x.shape[3]))
    x, padding = padded(writer, node, x, window)
    fused, name = writer.activation(node)
    made = name if len(node.shape) == 4 else f"{name}/line"
    _convolve(writer, made, x, weight, _bias(node, weight.shape[0]), groups, window, padding, fused, node.inputs[1])
    if made != name:
        writer.reshape(name, writer.value(made), node.shape)


# --- transposed -------------------------------------------------------------------------------------------------------


class _Spread(NamedTuple):
    """A transposed convolution of a picture: what comes out is cut to ``size`` after ``before`` was cut off (top, left)."""

    name: str
    x: Value
    weight: Array  # in x out / groups x height x width
    bias: Array
    groups: int
    window: Window
    before: tuple[int, int]
    size: tuple[int, ...]


def _transposed(writer: Writer, node: Node) -> None:
    x, weight = _flat(writer, node)
    groups = node.get("group", 1)
    _fits(node, x.shape[1], weight, groups, 0)
    window = window_of(node, weight.shape[2:], (x.shape[2], x.shape[3]), moved=False)
    line = len(node.shape) == 3
    size = (1, *node.shape[2:]) if line else node.shape[2:]
    before = _cut(node, window, (x.shape[2], x.shape[3]), size)
    name = f"{node.output}/line" if line else node.output
    spread = _Spread(name, x, weight, _bias(node, weight.shape[1] * groups), groups, window, before, size)
    if groups == 1 and window.dilations == (1, 1):
        _scatter(writer, node, spread)
    else:
        _stretch(writer, node, spread)
    if line:
        writer.reshape(node.output, writer.value(name), node.shape)


def _cut(node: Node, window: Window, size: Shape, wanted: Shape) -> tuple[int, int]:
    """How much of the whole result is cut off before (top, left); ``output_shape`` wins over ``pads`` (ONNX, ConvTranspose)."""
    auto = node.get("auto_pad", "NOTSET")
    if node.get("output_shape") is None and auto in {"NOTSET", "VALID"}:
        return window.pads[:2]
    extra = tuple(node.get("output_padding", [0] * len(node.shape[2:])))
    extra = extra if len(extra) == 2 else (0, *extra)
    totals = [max(window.strides[i] * (size[i] - 1) + extra[i] + window.span(i) - wanted[i], 0) for i in (0, 1)]
    top, left = (total // 2 if auto == "SAME_UPPER" else total - total // 2 for total in totals)
    return top, left


def _whole(window: Window, x: Value) -> tuple[int, ...]:
    """What comes out before anything is cut off."""
    return tuple((x.shape[2 + i] - 1) * window.strides[i] + window.span(i) for i in (0, 1))


def _scatter(writer: Writer, node: Node, spread: _Spread) -> None:
    """TFLite's own: it cuts evenly (SAME) or not at all (VALID); the rest is cut afterwards."""
    name, x, weight, window, before, size = (
        spread.name, spread.x, spread.weight, spread.window, spread.before, spread.size,
    )  # fmt: skip
    whole = _whole(window, x)
    if any(before[i] + size[i] > whole[i] for i in (0, 1)):  # output_padding: past the end is nothing but bias
        last = [int(before[i] + size[i] > whole[i]) for i in (0, 1)]
        x = _around(writer, f"{node.output}/longer", x, [0, 0], last)
        whole = _whole(window, x)
        if any(before[i] + size[i] > whole[i] for i in (0, 1)):
            raise node.refused(f"with an output of {list(size)} from {list(spread.x.shape[2:])}")
    inputs = (x.shape[2], x.shape[3])
    exact = before == (0, 0) and size == whole
    same = window.same_size(size) == inputs and all(
        whole[i] >= size[i] and (whole[i] - size[i]) // 2 == before[i] for i in (0, 1)
    )
    made = size if same or exact else whole
    w = writer.constant(node.inputs[1], weight.transpose(1, 2, 3, 0))
    form = writer.integers(f"{name}/size", (x.shape[0], *made, weight.shape[1]))
    b = writer.constant(f"{name}/bias", spread.bias)
    result = writer.emit(
        name if made == size else f"{name}/whole", "TRANSPOSE_CONV", [form, w, x, b], (x.shape[0], weight.shape[1], *made),
        "TransposeConvOptions", order=channels_last(4), padding=SAME if same and not exact else VALID,
        strideH=window.strides[0], strideW=window.strides[1],
    )  # fmt: skip
    if made != size:
        _crop(writer, name, result, before, size)


def _stretch(writer: Writer, node: Node, spread: _Spread) -> None:
    """Zeros between the elements, then a convolution by the mirrored weights."""
    x, window, groups = spread.x, spread.window, spread.groups
    for i, axis in enumerate((2, 3)):
        if window.strides[i] > 1:
            x = _apart(writer, f"{node.output}/apart", x, axis, window.strides[i])
    around = [window.span(i) - 1 for i in (0, 1)]
    first = [around[i] - spread.before[i] for i in (0, 1)]
    last = [spread.size[i] + around[i] - first[i] - x.shape[2 + i] for i in (0, 1)]
    x = _around(writer, f"{node.output}/around", x, first, last)
    ins, each, *kernel = spread.weight.shape
    mirrored = spread.weight[:, :, ::-1, ::-1].reshape(groups, ins // groups, each, *kernel).swapaxes(1, 2)
    mirrored = mirrored.reshape(groups * each, ins // groups, *kernel)
    moved = window._replace(strides=(1, 1), pads=(0, 0, 0, 0))
    _convolve(writer, spread.name, x, mirrored, spread.bias, groups, moved, VALID, 0, node.inputs[1])


def _apart(writer: Writer, name: str, x: Value, axis: int, stride: int) -> Value:
    """``stride - 1`` zeros after each element of an axis."""
    stored = list(x.stored)
    place = x.place(axis)
    outer, inner = int(np.prod(stored[: place + 1])), int(np.prod(stored[place + 1 :]))
    column = writer.reshaped(f"{name}/column", x, (outer, 1, inner))
    pads = writer.constant(f"{name}/pads", np.array([[0, 0], [0, stride - 1], [0, 0]], np.int32))
    longer = writer.emit(f"{name}/zeros", "PAD", [column, pads], (outer, stride, inner), "PadOptions")
    stored[place] *= stride
    flat = writer.reshaped(f"{name}/flat", longer, tuple(stored))
    shape = tuple(n * stride if a == axis else n for a, n in enumerate(x.shape))
    return x._replace(tensor=flat.tensor, shape=shape)


def _around(writer: Writer, name: str, x: Value, first: list[int], last: list[int]) -> Value:
    """Zeros around a picture; less than none cuts."""
    if min(*first, *last) < 0:
        before = tuple(max(-n, 0) for n in first)
        size = tuple(x.shape[2 + i] - before[i] - max(-last[i], 0) for i in (0, 1))
        x = _crop(writer, f"{name}/cut", x, before, size)
    first, last = [max(n, 0) for n in first], [max(n, 0) for n in last]
    if not any((*first, *last)):
        return x
    pads = np.array([[0, 0], [first[0], last[0]], [first[1], last[1]], [0, 0]], np.int32)
    shape = (*x.shape[:2], x.shape[2] + first[0] + last[0], x.shape[3] + first[1] + last[1])
    return writer.emit(name, "PAD", [x, writer.constant(f"{name}/pads", pads)], shape, "PadOptions", order=x.order)


def _crop(writer: Writer, name: str, x: Value, before: Shape, size: Shape) -> Value:
    shape = (*x.shape[:2], *size)
    start = writer.integers(f"{name}/start", (0, *before, 0))
    extent = writer.integers(f"{name}/extent", (shape[0], *size, shape[1]))
    return writer.emit(name, "SLICE", [x, start, extent], shape, "SliceOptions", order=x.order)


_LIMITS = "3 and more dimensions beside batch and channels; computed weights"

TABLE = {
    "Conv": Operator(_conv, ("CONV_2D", "DEPTHWISE_CONV_2D", "PAD"), limits=_LIMITS),
    "ConvTranspose": Operator(
        _transposed, ("TRANSPOSE_CONV", "CONV_2D", "DEPTHWISE_CONV_2D", "PAD", "SLICE"), limits=_LIMITS
    ),
}
