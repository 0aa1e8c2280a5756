"""Stage 2, compile: what exporters wrote out in several nodes and TFLite has one operator for. Receives nodes, hands on nodes.

Hard swish, ``x * clip(x + 3, 0, 6) / 6`` in its usual spellings: as four quantized operators it costs four roundings and, on
PP-OCR's networks, most of the time. The nodes that were taken in stay on the list; what nobody needs is not written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from .tflite_source import Node, Source

_CLOSE = 1e-4  # exporters round 1/6 to four digits and more


def simplified(source: Source) -> Source:
    """The same graph with hard swishes as one node each."""
    makers = {name: node for node in source.nodes for name in node.outputs}
    nodes = []
    for node in source.nodes:
        x = _hard_swish(node, makers)
        if x is not None and source.types[x] == node.made[node.output]:
            node = dataclasses.replace(node, op="HardSwish", inputs=(x,), values=(None,), attributes={})
        nodes.append(node)
    return source._replace(nodes=nodes)


def _hard_swish(node: Node, makers: Mapping[str, Node]) -> str | None:
    """The value whose hard swish a node makes."""
    product = makers.get(_sixth_of(node) or "", node)
    if product.op != "Mul":
        return None
    for x, gate in (product.inputs, product.inputs[::-1]):
        maker = makers.get(gate)
        if maker is None:
            continue
        if product is not node:
            found = _clipped(maker, makers)
        elif (
            maker.op == "HardSigmoid"
            and math.isclose(maker.get("alpha", 0.2), 1 / 6, abs_tol=_CLOSE)
            and maker.get("beta", 0.5) == 0.5
        ):
            found = maker.inputs[0]
        else:
            sixth = makers.get(_sixth_of(maker) or "")
            found = _clipped(sixth, makers) if sixth is not None else None
        if found == x:
            return x
    return None


def _clipped(node: Node, makers: Mapping[str, Node]) -> str | None:
    """``x`` of ``clip(x + 3, 0, 6)``."""
    added = makers.get(node.inputs[0]) if node.op == "Clip" else None
    if added is None or added.op != "Add" or any(node.has(i) and node.values[i] is None for i in (1, 2)):
        return None
    return _beside(added, 3.0) if (node.number("min", 1), node.number("max", 2)) == (0.0, 6.0) else None


def _sixth_of(node: Node) -> str | None:
    """``x`` of ``x / 6``, or of ``x * (1 / 6)``."""
    if node.op == "Div" and node.values[0] is None:
        return _beside(node, 6.0)
    return _beside(node, 1 / 6) if node.op == "Mul" else None


def _beside(node: Node, number: float) -> str | None:
    """The other side of an operator that has this number on one."""
    for mine, other in ((1, 0), (0, 1)):
        values = node.values[mine]
        if values is not None and node.values[other] is None and values.size == 1 and values.dtype.kind == "f":
            return node.inputs[other] if math.isclose(float(values.item()), number, abs_tol=_CLOSE) else None
    return None
