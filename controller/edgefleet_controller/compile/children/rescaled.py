"""Stage 2, compile: factors and summands of rounded values. Receives a network, hands on the same with one number for all values in scales and zero points.

Who reads a rounded value reads it by a scale and a zero point. Another scale is a factor, and another zero point a summand where that is a whole number of levels: neither
takes any time, where onnxruntime goes to float and back for the summand that is left before a convolution with a frame of zeros (a sixth of PP-OCR's reader).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from .folded import Affine, affine_of, numbers_of
from .in_float import ACTIVATIONS
from .tidy import readers_of
from .weights import LEVELS, WEIGHTED

IN_INT8 = (*WEIGHTED, "AveragePool", "GlobalAveragePool")  # operators that what they read is rounded for
SLACK, LEVEL_SLACK = 1e-3, 0.02  # of a scale and of a level, that a reading may be off by
# Times that a range may become as wide, so that a summand is a whole number of its levels: a second rounding costs more.
STRETCH = (0.98, 1.2)


class Reading(NamedTuple):
    """``node``: the first of those that make of ``affine.value`` what is read, by name."""

    node: str
    affine: Affine


def settle_ranges(
    model: onnx.ModelProto, in_float: Collection[str], ranges: dict[str, list[float]]
) -> dict[str, Reading]:
    """Give values, and what factors and summands make of them for int8 operators, ranges with the same levels, in place.

    Args:
        in_float: names of nodes that stay in float.
        ranges: of tensors.
    Returns:
        By the name of what is read how it comes from another value.
    """
    readers, numbers = readers_of(model.graph), numbers_of(model.graph)
    served = {output.name for output in model.graph.output}
    maker = {name: node for node in model.graph.node for name in node.output}

    inferred = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    axes = {i.name: len(i.dims) for i in model.graph.initializer}
    axes |= {value.name: len(value.type.tensor_type.shape.dim) for value in inferred}

    def step_of(node: onnx.NodeProto | None) -> Affine | None:
        step = affine_of(node, numbers) if node is not None else None
        if node is None or step is None or step.value not in ranges:
            return None
        # A number of more axes than its value has adds some.
        return step if all(axes[name] <= axes.get(step.value, 1) for name in node.input if name in numbers) else None

    def only_reader(name: str) -> bool:
        return len(readers.get(name, [])) == 1 and name not in served

    found: dict[str, Reading] = {}
    for node in model.graph.node:
        read = node.input[0] if node.op_type in IN_INT8 and node.name not in in_float else ""
        first, affine = "", Affine(read, 1.0, 0.0)
        made = maker.get(read)
        while made is not None and (step := step_of(made)) is not None:
            summed = affine.summand + affine.factor * step.summand
            first, affine = made.name, Affine(step.value, affine.factor * step.factor, summed)
            made = maker.get(step.value)
            if not only_reader(step.value):
                break
        if not first or read in found or read not in ranges or affine.factor <= 0 or not only_reader(affine.value):
            continue
        operator, becomes_zero = made.op_type if made is not None else "", -affine.summand / affine.factor
        # The QDQ writer takes an activation away where a range stands for it: only a Relu's may be wider, and only above.
        stands = operator in ACTIVATIONS and (operator != "Relu" or becomes_zero < 0)
        levels = None if stands else _levels(ranges[affine.value], becomes_zero)
        if levels is not None:
            scale, zero, steps = levels
            ranges[affine.value] = [-zero * scale, (LEVELS - zero) * scale]
            ranges[read] = [affine.factor * scale * end for end in (-(zero + steps), LEVELS - (zero + steps))]
            found[read] = Reading(first, affine)
    return found


def _levels(within: Sequence[float], becomes_zero: float) -> tuple[float, int, int] | None:
    """(scale, zero point, how many levels above it the number lies that becomes zero) of the range that is most like one, and holds both; None where none is much
    like it."""
    low, high = (float(end(limit, becomes_zero, 0.0)) for end, limit in zip((min, max), within, strict=True))
    scale = (high - low) / LEVELS
    if scale <= 0:
        return None
    exact = becomes_zero / scale
    for steps in (round(exact), math.trunc(exact)):
        wider = exact / steps if steps else float(exact == 0)
        if STRETCH[0] <= wider <= STRETCH[1]:
            zero = min(max(round(-low / (scale * wider)), 0, -steps), LEVELS, LEVELS - steps)
            return scale * wider, zero, steps
    return None


def by_readings(model: onnx.ModelProto, readings: dict[str, Reading]) -> None:
    """Let who reads a value that was rounded behind factors and summands read it as it is rounded before them, in place."""
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers = readers_of(graph)
    nodes = {node.name: node for node in graph.node}

    def levels(node: onnx.NodeProto) -> tuple[float, int] | None:
        scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:])
        return (float(scale), int(zero)) if scale.ndim == 0 and zero.dtype == np.uint8 else None

    for name, (first, (value, factor, summand)) in readings.items():
        if first not in nodes:
            continue
        read = next((one for one in nodes[first].input if one == value or _rounds_anew(maker.get(one), constants)), "")
        for rounding in [one for one in readers.get(name, []) if one.op_type == "QuantizeLinear"]:
            after = levels(rounding)
            if not read or after is None:
                continue
            scale, zero = after[0] / factor, after[1] + summand / after[0]
            if read == value:
                if abs(zero - round(zero)) > LEVEL_SLACK or not 0 <= round(zero) <= LEVELS:
                    continue
                told = {f"{name}/before/scale": np.float32(scale), f"{name}/before/zero": np.uint8(round(zero))}
                graph.initializer.extend(numpy_helper.from_array(np.asarray(n), key) for key, n in told.items())
                rounding.input[:] = [value, *told]
                continue
            before = levels(maker[read])
            if before is None or abs(before[0] / scale - 1) > SLACK or abs(before[1] - zero) > LEVEL_SLACK:
                continue
            for one in readers.get(rounding.output[0], []):
                one.input[0] = maker[read].input[0]


def _rounds_anew(node: onnx.NodeProto | None, constants: Collection[str]) -> bool:
    """Whether a node makes a rounded value that is no constant."""
    return node is not None and node.op_type == "DequantizeLinear" and node.input[0] not in constants
