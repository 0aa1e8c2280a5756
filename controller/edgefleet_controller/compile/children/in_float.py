"""Stage 2, compile: what stays in float beside int8. Receives a network and the nodes that a recipe leaves in float, hands on all that must.

A node in float gains nothing where what it makes is rounded on its way to the next one in float. So an activation behind it stays in float, because
rounding what is about to be clipped wastes the range, and so does what only moves values on to another reader in float. What moves values
from float to int8 alone is cheaper in int8, and no worse.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from .weights import PASSIVE, WEIGHTED

ACTIVATIONS = ("Relu", "Clip")  # what the range of a rounded value can stand for


def outside(model: onnx.ModelProto, scope: str) -> set[str]:
    """The names of nodes that compute and are in float because a recipe's scope leaves them out."""
    if scope == "all":
        return set()
    return {n.name for n in model.graph.node if n.op_type not in WEIGHTED and n.op_type not in PASSIVE}


def with_passages(model: onnx.ModelProto, chosen: Iterable[str]) -> set[str]:
    """The names of ``chosen``, and of the nodes that stay in float because those do."""
    found = set(chosen)
    if not found:
        return found
    inputs = {value.name for value in model.graph.input}
    exact = set(inputs)
    passages: list[onnx.NodeProto] = []
    for node in model.graph.node:  # in order: whatever is read is made before
        from_float = bool(node.input) and node.input[0] in exact
        if from_float and node.op_type in ACTIVATIONS and node.input[0] not in inputs:
            found.add(node.name)
        if node.name in found or (from_float and node.op_type in PASSIVE):
            exact |= set(node.output)
            passages += [node] if node.name not in found else []
    read = {output.name for output in model.graph.output}
    read |= {name for node in model.graph.node if node.name in found for name in node.input}
    for node in reversed(passages):
        if read & set(node.output):
            found.add(node.name)
            read |= set(node.input)
    return found
