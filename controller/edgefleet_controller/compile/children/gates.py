"""Stage 2, compile: gates that int8 has no operator for. Receives a network, hands on the same with them in pieces that it has.

onnxruntime has no HardSigmoid in int8, so that every HardSwish of a MobileNetV3 is computed in float, between two roundings. A sum has one, and int8 saturates
where its range ends: clip(a * x + b, 0, 1) is a * (x + b / a) within the range from 0 to 1 / a. The factor costs nothing: who reads the rounded sum reads it by another
scale. Where a value's own levels say so exactly, not even the sum is computed: another zero point adds, and a Clip of the levels themselves is the saturation
(:func:`by_levels`). A Sigmoid it has, but the QDQ writer rounds what weighted operators read, and leaves a SiLU's two pieces in float between two roundings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .in_float import ACTIVATIONS
from .tidy import read_by, readers_of
from .weights import LEVELS

PIECES = ("Add", "Mul", "Sigmoid")  # operators that gates become or are, and that multiply by them
GATES = ("HardSigmoid", "HardSwish")
DEFAULTS = {"HardSigmoid": (0.2, 0.5), "HardSwish": (1 / 6, 0.5)}  # alpha and beta
MOST_STRETCH = 1.02  # of a range, so that a whole number of its levels is what a gate adds
WHOLE = 1e-3  # of a level, that a whole number of them may be off


class Gate(NamedTuple):
    """``factor``: what readers multiply the rounded sum by. ``summand``: what is added to the value."""

    factor: float
    summand: float


class Pieces(NamedTuple):
    """``sums``: by the names of tensors, the gates of which :func:`read_by_factor` and :func:`by_levels` still have to know. ``others``: names of nodes of the same
    operators that have nothing to do with gates. ``any``: whether there are gates that are to be rounded."""

    sums: dict[str, Gate]
    others: set[str]
    any: bool


def in_pieces(model: onnx.ModelProto, in_float: Collection[str], ranges: dict[str, list[float]]) -> Pieces:
    """Replace gates, in place, and give their sums a range.

    Args:
        in_float: names of nodes that stay in float; what those read, and branches, stays as it is.
        ranges: of tensors; those of the sums are added, those of what gates read stretched by a hair.
    """
    graph, sums = model.graph, dict[str, Gate]()
    served = {output.name for output in graph.output}
    # A branch of an If reads what is there, not what is rounded.
    exact = {name for node in graph.node for name in read_by(node) if node.name in in_float or name not in node.input}
    rounded = [node for node in graph.node if node.name not in in_float and served.union(exact).isdisjoint(node.output)]
    readers = readers_of(graph)
    sigmoids = {
        node.output[0] for node in rounded
        if node.op_type == "Sigmoid" and {node.input[0], node.output[0]} <= ranges.keys()
        and all(one.op_type == "Mul" for one in readers.get(node.output[0], []))
    }  # fmt: skip
    # The QDQ writer takes an activation away where a range stands for it, and its name for what is before it: the factor would be lost.
    active = {node.input[0] for node in graph.node if node.op_type in ACTIVATIONS}
    pieces: dict[str, list[onnx.NodeProto]] = {}
    for node in rounded:
        alpha, beta = _factors(node)
        if node.op_type not in GATES or alpha <= 0 or node.input[0] not in ranges or node.output[0] in active:
            continue
        x, y = node.input[0], node.output[0]
        swish = node.op_type == "HardSwish"
        total, summand = (f"{y}/gate" if swish else y), f"{y}/summand"
        graph.initializer.append(numpy_helper.from_array(np.float32(beta / alpha), summand))
        pieces[y] = [helper.make_node("Add", [x, summand], [total], name=f"{node.name}/sum")]
        if swish:
            pieces[y].append(helper.make_node("Mul", [x, total], [y], name=node.name))
        ranges[total] = [0.0, 1 / alpha]
        ranges[x] = _stretched(ranges[x], beta / alpha)
        sums[total] = Gate(alpha, beta / alpha)
    _replace(graph, pieces)
    return Pieces(sums, _others(graph, sums.keys() | sigmoids, served), bool(sums or sigmoids))


def _replace(graph: onnx.GraphProto, pieces: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Put nodes in place of others, by the first of what those make."""
    nodes = [piece for node in graph.node for piece in pieces.get(node.output[0], [node])]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(copies)


def _others(graph: onnx.GraphProto, gates: Collection[str], served: Collection[str]) -> set[str]:
    """The names of nodes of the same operators as gates' pieces that neither make a gate nor multiply by one."""
    return {
        node.name for node in graph.node
        if node.op_type in PIECES and not any(name in gates for name in node.output)
        and not (node.op_type == "Mul" and any(name in gates for name in node.input) and node.output[0] not in served)
    }  # fmt: skip


def _stretched(within: Sequence[float], summand: float) -> list[float]:
    """The range of 255 levels, a whole number of which is ``summand``, that is most like a range; itself where that is not much like it, or does not reach as far
    below zero."""
    low, high = min(within[0], 0.0), max(within[1], 0.0)
    scale = (high - low) / LEVELS
    steps = round(summand / scale) if scale > 0 and summand > 0 else 0
    if not steps or not 1 / MOST_STRETCH <= summand / steps / scale <= MOST_STRETCH:
        return list(within)
    scale = summand / steps
    zero = min(round(-low / scale), LEVELS)
    return [-zero * scale, (LEVELS - zero) * scale] if zero >= steps else list(within)


def _factors(node: onnx.NodeProto) -> tuple[float, float]:
    alpha, beta = DEFAULTS.get(node.op_type, (1.0, 0.0))
    told = {a.name: a.f for a in node.attribute} if node.op_type == "HardSigmoid" else {}
    return told.get("alpha", alpha), told.get("beta", beta)


def read_by_factor(model: onnx.ModelProto, sums: dict[str, Gate]) -> None:
    """Let readers of rounded sums have them times their factor, in place, by the scale that they read them by."""
    constants = {i.name: i for i in model.graph.initializer}
    rounded = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        gate = sums.get(rounded.get(node.input[0], "")) if node.op_type == "DequantizeLinear" else None
        if gate is None:
            continue
        scale = numpy_helper.to_array(constants[node.input[1]])
        name = f"{node.input[1]}/{gate.factor:.9g}"
        if name not in constants:
            constants[name] = numpy_helper.from_array((scale * np.float32(gate.factor)).astype(np.float32), name)
            model.graph.initializer.append(constants[name])
        node.input[1] = name


def by_levels(model: onnx.ModelProto, sums: dict[str, Gate]) -> None:
    """Let gates be Clips of what their value is rounded to, in place, where a whole number of levels is what they add and another one where they end. Nothing is
    rounded twice so, and a Clip of bytes takes a fourth of a sum's time."""
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers = readers_of(graph)
    for node in [one for one in graph.node if one.op_type == "Add" and one.output[0] in sums]:
        gate, value = sums[node.output[0]], maker.get(node.input[0])
        rounding = readers.get(node.output[0], [])
        if value is None or value.op_type != "DequantizeLinear" or len(value.input) < 3 or len(rounding) != 1:
            continue
        reading = readers.get(rounding[0].output[0], []) if rounding[0].op_type == "QuantizeLinear" else []
        if not reading or any(one.op_type != "DequantizeLinear" for one in reading):
            continue
        scale, zero = (numpy_helper.to_array(constants[name]) for name in value.input[1:])
        limits = _levels(gate, float(scale), int(zero)) if zero.dtype == np.uint8 else None
        if limits is None:
            continue
        name = f"{node.output[0]}/levels"
        low, high = (np.uint8(limit) for limit in limits)
        new = {f"{name}/low": low, f"{name}/high": high, f"{name}/scale": np.float32(float(scale) * gate.factor)}
        graph.initializer.extend(numpy_helper.from_array(np.asarray(number), key) for key, number in new.items())
        graph.node.append(helper.make_node("Clip", [value.input[0], f"{name}/low", f"{name}/high"], [name], name=name))
        for one in reading:
            one.input[:] = [name, f"{name}/scale", f"{name}/low"]
        for one in (node, rounding[0]):
            graph.node.remove(one)


def _levels(gate: Gate, scale: float, zero: int) -> tuple[int, int] | None:
    """The levels between which a gate rises; None where none says exactly where it begins, or ends."""
    steps, most = gate.summand / scale, 1 / gate.factor / scale
    low, high = zero - round(steps), zero - round(steps) + round(most)
    if low < 0 or gate.summand <= 0 or abs(steps - round(steps)) > WHOLE:
        return None
    if high >= LEVELS:
        return low, LEVELS
    return (low, high) if abs(most - round(most)) <= WHOLE else None
