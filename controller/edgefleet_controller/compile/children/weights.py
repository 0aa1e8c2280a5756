"""Stage 2, compile: int8 weights. Pure: receives float weights, hands on a scale per channel, and biases corrected for rounding.

``pairs``: x86 without VNNI multiplies u8 by s8 and adds neighbours in 16 bits, which saturate at 32767. Keeping every weight to 7
bits avoids that and costs 6 dB; it is enough that no two *neighbouring* weights of one sign sum to more than 128, and then most
channels keep nearly 8 bits. Neighbours are input channels at one tap, the order in which MLAS and oneDNN pack them.
Bias correction: Nagel et al. 2019 (Data-Free Quantization), with the input's measured means.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[Any]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PASSIVE = {  # moves values or passes them on: int8 loses nothing beyond what its neighbours lose
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Dropout", "MaxPool", "Split", "Slice", "Gather",
    "Shape", "Cast", "Constant", "Pad", "Relu", "Clip", "Resize", "DepthToSpace", "SpaceToDepth", "Expand", "Tile",
}  # fmt: skip
LEVELS = 255  # of an 8-bit activation
FULL, REDUCED = 127.0, 63.0
PAIR_SUM = 127.0  # 255 * 128 = 32640 is the most that 16 bits hold; rounding may add one half to each of the two
BIAS_LEVELS = 2.0**30  # a bias is stored as int32 in units of input scale times weight scale
AXIS = {"Conv": 0, "ConvTranspose": 1}


def axis_of(node: onnx.NodeProto) -> int:
    """The axis of a weight that counts output channels."""
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    if node.op_type == "ConvTranspose" and groups_of(node) > 1:
        return 0  # input channels: with one output channel for each, as upsampling has it, they count those too
    return AXIS.get(node.op_type, -1)


def own_weights(model: onnx.ModelProto, in_float: Collection[str]) -> None:
    """Give operators that read one weight in unlike ways a copy each, in place: in int8 it has scales along the axis on which an operator counts its
    channels (a decoder's transposed convolution, on another one than the encoder's convolution), in float or where its rows are looked up it has none.

    Args:
        in_float: names of the nodes that stay in float.
    """
    constants = {i.name: i for i in model.graph.initializer}
    copies: dict[str, dict[int | None, str]] = {}
    read: list[tuple[onnx.NodeProto, int, int | None]] = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in constants:
                weight = node.op_type in WEIGHTED and place == 1 and node.name not in in_float
                read.append((node, place, axis_of(node) % max(len(constants[name].dims), 1) if weight else None))
    # Who needs no scales keeps what there was.
    for node, place, axis in sorted(read, key=lambda one: one[2] is not None):
        name = node.input[place]
        known = copies.setdefault(name, {})
        if axis not in known:
            known[axis] = f"{name}/along{axis}" if known else name
            if known[axis] != name:
                values = numpy_helper.to_array(constants[name])
                model.graph.initializer.append(numpy_helper.from_array(values, known[axis]))
        node.input[place] = known[axis]


def scales_of(node: onnx.NodeProto, weight: Array, bits: str, granularity: str = "channel") -> Array:
    """A node's scales: one per output channel; one alone for granularity ``tensor``, and for a transposed convolution in groups of several output channels,
    whose weight has no axis that counts them.

    Returns:
        float32, shape [channels] or [1].
    """
    uncounted = node.op_type == "ConvTranspose" and groups_of(node) > 1 and weight.shape[1] > 1
    if granularity != "channel" or uncounted:
        return np.array([tensor_scale(weight, bits)], np.float32)
    return channel_scales(weight, axis_of(node), bits, groups_of(node))


def channel_scales(weight: Array, axis: int, bits: str, groups: int | None = None) -> Array:
    """One scale per output channel.

    Args:
        bits: ``full`` (8 bits), ``pairs`` (8 bits, no neighbours that overflow), ``reduced`` (7 bits).
        groups: of a convolution; None where the weight's shape has to tell.

    Returns:
        float32, shape [channels]; above 0 also for channels that are all zero.
    """
    rows = _rows(weight, axis)
    largest = np.abs(rows).max(axis=1)
    if bits == "reduced":
        scales = largest / REDUCED
    else:
        scales = largest / FULL
        # A depthwise tap meets one input channel only: kernels multiply it alone. Not so where the input has but one channel (grey
        # pictures): there the taps are neighbours.
        depthwise = weight.ndim >= 3 and weight.shape[1] == 1 and groups != 1
        if bits == "pairs" and rows.shape[1] > 1 and not depthwise:
            scales = np.maximum(scales, _pair_sums(rows) / PAIR_SUM)
    floor = float(largest.max()) * 1e-6 or 1.0
    found: Array = np.maximum(scales, floor).astype(np.float32)
    return found


def groups_of(node: onnx.NodeProto) -> int:
    """A convolution's groups."""
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def tensor_scale(weight: Array, bits: str) -> float:
    """One scale for the whole weight."""
    largest = float(np.abs(weight).max())
    return max(largest / (REDUCED if bits != "full" else FULL), 1e-12)


def wide_enough(scales: Array, bias: Array | None, input_scale: float) -> Array:
    """Scales raised where a channel's bias would not fit its int32, as it happens to channels whose weights are all but zero."""
    if bias is None:
        return scales
    least = np.abs(bias.reshape(-1)) / (input_scale * BIAS_LEVELS)
    found: Array = np.maximum(scales, least if scales.size > 1 else np.max(least)).astype(np.float32)
    return found


def rounded(weight: Array, scales: Array, axis: int) -> Array:
    """The weight as int8 with these scales holds it."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    by = scales.reshape(shape)
    found: Array = np.clip(np.round(weight / by), -128, 127) * by
    return found


def bias_shift(node: onnx.NodeProto, lost: Array, means: Array) -> Array | None:
    """What rounding takes from a node's mean output, per output channel.

    Args:
        lost: float weight minus rounded weight.
        means: of the node's input, per channel.

    Returns:
        float64, shape [channels]; None where the shapes don't meet (an input that is flattened in between).
    """
    groups = groups_of(node)
    match node.op_type:
        case "Conv":
            taps = lost.reshape(*lost.shape[:2], -1).sum(axis=2)  # out, in per group
        case "Gemm" | "MatMul" if lost.ndim == 2:
            taps = lost if axis_of(node) == 0 else lost.T
            groups = 1
        case _:
            return None
    if means.size != taps.shape[1] * groups:
        return None
    group_of = np.repeat(np.arange(groups), taps.shape[0] // groups)
    shift: Array = (taps * means.reshape(groups, -1)[group_of]).sum(axis=1)
    return shift


def correct_biases(model: onnx.ModelProto, means: dict[str, list[float]], lost: dict[str, Array]) -> None:
    """Add to each bias, in place, what rounding the weights takes from the mean output.

    Args:
        means: of tensors, per channel.
        lost: per weight, what rounding takes from it.
    """
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if len(node.input) < 2 or node.input[1] not in lost:
            continue
        shift = correction(node, lost[node.input[1]], means, constants)
        if shift is None:
            continue
        own = f"{node.output[0]}/corrected_bias"  # its own: two nodes may share one bias
        model.graph.initializer.append(numpy_helper.from_array(shift, own))
        del node.input[2:]
        node.input.append(own)


def correction(
    node: onnx.NodeProto, lost: Array, means: dict[str, list[float]], constants: dict[str, onnx.TensorProto]
) -> Array | None:
    """The bias that makes up for what rounding takes; None where there is no place for one, or the mean of what is read is not known.

    Returns:
        float32, in the shape that the bias has, or else [channels].
    """
    scaled = any(a.name in ("alpha", "beta") and a.f != 1.0 for a in node.attribute if node.op_type == "Gemm")
    if node.op_type == "MatMul" or scaled or node.input[0] not in means:
        return None
    shift = bias_shift(node, lost, np.asarray(means[node.input[0]]))
    name = node.input[2] if len(node.input) > 2 else ""
    if shift is None or not name:
        return None if shift is None else shift.astype(np.float32)
    bias = numpy_helper.to_array(constants[name]) if name in constants else np.empty(0)
    if bias.size != shift.size:
        return None
    found: Array = (bias.reshape(-1) + shift).astype(np.float32).reshape(bias.shape)
    return found


def _rows(weight: Array, axis: int) -> Array:
    """Output channels x everything else, input channels innermost."""
    moved = np.moveaxis(weight, axis, 0)
    if axis >= 0 and moved.ndim > 2:  # a convolution's, over a line, a picture or a volume
        moved = np.moveaxis(moved, 1, -1)
    rows: Array = moved.reshape(moved.shape[0], -1)
    return rows


def _pair_sums(rows: Array) -> Array:
    left, right = rows[:, :-1], rows[:, 1:]
    same = left * right > 0
    found: Array = np.where(same, np.abs(left + right), 0.0).max(axis=1)
    return found
