"""Stage 2, compile: activations of rounded values. Receives a QDQ network, hands on the same with them in the levels themselves.

Where others read a value as well, the range of its rounding can't stand for an activation: onnxruntime computed that in float, between two roundings. Levels have an
order, so that a Clip of bytes is the activation of what they stand for; and nothing is rounded twice.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .in_float import ACTIVATIONS
from .tidy import readers_of


def clip_levels(model: onnx.ModelProto) -> None:
    """Put Clips of levels in place of activations between two roundings, in place."""
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers, served = readers_of(graph), {output.name for output in graph.output}
    for node in [one for one in graph.node if one.op_type in ACTIVATIONS]:
        rounded, roundings = maker.get(node.input[0]), readers.get(node.output[0], [])
        behind = [one for rounding in roundings for one in readers.get(rounding.output[0], [])]
        if rounded is None or rounded.op_type != "DequantizeLinear" or rounded.input[0] in constants or not behind:
            continue
        if {one.op_type for one in roundings} != {"QuantizeLinear"} or {one.op_type for one in behind} != {
            "DequantizeLinear"
        }:
            continue
        known = {*rounded.input[1:], *filter(None, node.input[1:])} <= constants.keys()
        if not known or len(rounded.input) < 3 or node.output[0] in served or constants[rounded.input[1]].dims:
            continue
        scale, zero = (numpy_helper.to_array(constants[name]) for name in rounded.input[1:])
        ends = [
            numpy_helper.to_array(constants[name]).astype(np.float64) if name else None
            for name in [*node.input[1:], "", ""][:2]
        ]
        if node.op_type == "Relu":
            ends[0] = np.zeros(())
        all_levels = np.iinfo(zero.dtype)
        levels = [
            limit if end is None else np.clip(np.rint(end / scale) + zero, all_levels.min, all_levels.max)
            for end, limit in zip(ends, (all_levels.min, all_levels.max), strict=True)
        ]
        name = f"{node.output[0]}/clipped"
        limits = {f"{name}/low": levels[0], f"{name}/high": levels[1]}
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(level, zero.dtype).reshape(()), key) for key, level in limits.items()
        )
        graph.node.append(helper.make_node("Clip", [rounded.input[0], *limits], [name], name=name))
        for one in behind:
            one.input[:] = [name, *rounded.input[1:]]
