"""Stage 2, compile: gates that int8 has no operator for. Receives a network, hands on the same with them in pieces that it has.

onnxruntime has no HardSigmoid in int8, so that every HardSwish of a MobileNetV3 is computed in float, between two roundings. A sum has one, and int8 saturates
where its range ends: clip(a * x + b, 0, 1) is a * (x + b / a) within the range from 0 to 1 / a. The factor costs nothing: who reads the rounded sum reads it by another
scale. A Sigmoid it has, but the QDQ writer rounds what weighted operators read, and leaves a SiLU's two pieces in float between two roundings.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .in_float import ACTIVATIONS
from .tidy import read_by

PIECES = ("Add", "Mul", "Sigmoid")  # operators that gates become or are, and that multiply by them
GATES = ("HardSigmoid", "HardSwish")
DEFAULTS = {"HardSigmoid": (0.2, 0.5), "HardSwish": (1 / 6, 0.5)}  # alpha and beta


class Pieces(NamedTuple):
    """``factors``: per sum the factor that its readers are still to read it by (:func:`read_by_factor`). ``others``: names of nodes of the same operators that
    have nothing to do with gates. ``any``: whether there are gates that are to be rounded."""

    factors: dict[str, float]
    others: set[str]
    any: bool


def in_pieces(model: onnx.ModelProto, in_float: Collection[str], ranges: dict[str, list[float]]) -> Pieces:
    """Replace gates, in place, and give their sums a range.

    Args:
        in_float: names of nodes that stay in float; what those read, and branches, stays as it is.
        ranges: of tensors; those of the sums are added.
    """
    graph, factors = model.graph, dict[str, float]()
    served = {output.name for output in graph.output}
    float_reads = {name for node in graph.node if node.name in in_float for name in node.input}
    # A branch of an If reads what is there, not what is rounded.
    float_reads |= {name for node in graph.node for name in read_by(node) - {*node.input}}
    # The QDQ writer takes an activation away where a range stands for it, and its name for what is before it: the factor would be lost.
    active = {node.input[0] for node in graph.node if node.op_type in ACTIVATIONS}
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in read_by(node):
            readers.setdefault(name, []).append(node)
    sigmoids = {
        node.output[0] for node in nodes
        if node.op_type == "Sigmoid" and node.name not in in_float and {node.input[0], node.output[0]} <= ranges.keys()
        and node.output[0] not in served | float_reads and all(one.op_type == "Mul" for one in readers.get(node.output[0], []))
    }  # fmt: skip
    graph.ClearField("node")
    for node in nodes:
        alpha, beta = _factors(node)
        whole = node.op_type not in GATES or node.name in in_float or node.input[0] not in ranges or alpha <= 0
        if whole or node.output[0] in served | float_reads | active:
            graph.node.append(node)
            continue
        x, y = node.input[0], node.output[0]
        swish = node.op_type == "HardSwish"
        total, summand = (f"{y}/gate" if swish else y), f"{y}/summand"
        graph.initializer.append(numpy_helper.from_array(np.float32(beta / alpha), summand))
        graph.node.append(helper.make_node("Add", [x, summand], [total], name=f"{node.name}/sum"))
        if swish:
            graph.node.append(helper.make_node("Mul", [x, total], [y], name=node.name))
        ranges[total] = [0.0, 1 / alpha]
        factors[total] = alpha
    gates = factors.keys() | sigmoids
    others = {
        node.name for node in graph.node
        if node.op_type in PIECES and gates.isdisjoint(node.output) and not (node.op_type == "Mul" and gates & {*node.input} and served.isdisjoint(node.output))
    }  # fmt: skip
    return Pieces(factors, others, bool(gates))


def _factors(node: onnx.NodeProto) -> tuple[float, float]:
    alpha, beta = DEFAULTS.get(node.op_type, (1.0, 0.0))
    told = {a.name: a.f for a in node.attribute} if node.op_type == "HardSigmoid" else {}
    return told.get("alpha", alpha), told.get("beta", beta)


def read_by_factor(model: onnx.ModelProto, factors: dict[str, float]) -> None:
    """Let readers of rounded sums have them times their factor, in place, by the scale that they read them by."""
    constants = {i.name: i for i in model.graph.initializer}
    rounded = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        factor = factors.get(rounded.get(node.input[0], "")) if node.op_type == "DequantizeLinear" else None
        if factor is None:
            continue
        scale = numpy_helper.to_array(constants[node.input[1]])
        name = f"{node.input[1]}/{factor:.9g}"
        if name not in constants:
            constants[name] = numpy_helper.from_array((scale * np.float32(factor)).astype(np.float32), name)
            model.graph.initializer.append(constants[name])
        node.input[1] = name
