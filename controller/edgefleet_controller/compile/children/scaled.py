"""Stage 2, compile: one number for each channel, for onnxruntime. Receives a network, hands on the same with such factors and summands as convolutions.

What no convolution stands before, or an activation between, keeps its normalisation: DenseNet's, ResNetV2's, and networks that normalise what they have activated. onnxruntime
has no int8 for it, and went to float and back. A depthwise convolution of one tap is the same, takes the activation behind it, and is in int8: networks of such blocks take .7 to
.8 of the time, and no longer in float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from .names import Names
from .tidy import readers_of
from .weights import WEIGHTED

Array = npt.NDArray[Any]
RANKS = (3, 4, 5)  # of what convolutions read: along up to three axes


def scale_by_convolutions(model: onnx.ModelProto) -> bool:
    """Replace normalisations, and products and sums with one number for each channel, behind the first weighted operator, in place. Before it they are a picture's, which
    is better not rounded twice. Returns: whether there were any.

    Args:
        model: with shapes inferred; values without are left as they are.
    """
    graph = model.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }  # fmt: skip
    readers, served = readers_of(graph), {output.name for output in graph.output}
    computed, names = _computed(graph), Names(graph)
    new: dict[str, onnx.NodeProto | None] = {}
    for node in graph.node:
        read = next((name for name in node.input if name not in constants), "")
        shape = shapes.get(read, [])
        if node.name in new or read not in computed or len(shape) not in RANKS:
            continue
        step = _step(node, constants, shape)
        if step is None:
            continue
        (factors, summands), last = step, node
        behind = readers.get(node.output[0], [])
        if len(behind) == 1 and node.output[0] not in served and node.output[0] in behind[0].input:
            more = _step(behind[0], constants, shape)
            if more is not None:
                last, new[node.name] = behind[0], None
                factors, summands = factors * more[0], summands * more[0] + more[1]
        weight, bias = names.free(f"{last.name}/factors"), names.free(f"{last.name}/summands")
        ones = [1] * (len(shape) - 2)
        graph.initializer.append(numpy_helper.from_array(factors.astype(np.float32).reshape(-1, 1, *ones), weight))
        graph.initializer.append(numpy_helper.from_array(summands.astype(np.float32), bias))
        new[last.name] = helper.make_node(
            "Conv", [read, weight, bias], [last.output[0]], name=last.name, group=len(factors), kernel_shape=ones
        )
    nodes = [one for node in graph.node if (one := new.get(node.name, node)) is not None]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(copies)
    return bool(new)


def _computed(graph: onnx.GraphProto) -> set[str]:
    """What weighted operators make, or what is made of that."""
    found = set[str]()
    for node in graph.node:
        if node.op_type in WEIGHTED or not found.isdisjoint(node.input):
            found |= set(node.output)
    return found


def _step(node: onnx.NodeProto, constants: dict[str, Array], shape: list[int]) -> tuple[Array, Array] | None:
    """(factors, summands), one each for each channel of what a node reads, a value of that shape; None for what else it does."""
    channels = shape[1]
    if node.op_type == "BatchNormalization":
        if (
            len(node.output) > 1
            or not {*node.input[1:]} <= constants.keys()
            or any(a.name == "training_mode" and a.i for a in node.attribute)
        ):
            return None
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale, shift, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:])
        factors = scale / np.sqrt(variance + epsilon)
        return _finite(factors, shift - mean * factors)
    if node.op_type not in ("Mul", "Add", "Div", "Sub"):
        return None
    first, second = node.input
    swapped = first in constants
    if (swapped and node.op_type in ("Div", "Sub")) or {first, second}.isdisjoint(constants):
        return None
    numbers = _by_channel(constants[first if swapped else second], channels, len(shape))
    if numbers is None or (node.op_type == "Div" and not numbers.all()):
        return None
    match node.op_type:
        case "Mul" | "Div":
            return _finite(numbers if node.op_type == "Mul" else 1 / numbers, np.zeros(channels))
        case _:
            return _finite(np.ones(channels), numbers if node.op_type == "Add" else -numbers)


def _finite(factors: Array, summands: Array) -> tuple[Array, Array] | None:
    return (factors, summands) if np.isfinite(factors).all() and np.isfinite(summands).all() else None


def _by_channel(values: Array, channels: int, rank: int) -> Array | None:
    """One number for each channel, where that is what a constant means to a value of that rank."""
    axis = values.ndim - (rank - 1)
    right = axis in (0, 1) and values.size == values.shape[axis] == channels > 1
    return values.reshape(-1).astype(np.float64) if right else None
