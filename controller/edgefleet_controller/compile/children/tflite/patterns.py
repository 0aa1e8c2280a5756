"""Stage 2, compile: what exporters wrote out in several nodes and TFLite has one operator for. Receives nodes, hands on nodes.

Hard swish, ``x * clip(x + 3, 0, 6) / 6``, and gelu, ``x * (1 + erf(x / sqrt(2))) / 2``, in their usual spellings: as several
quantized operators they cost as many roundings and, on PP-OCR's networks, most of the time. The nodes that were taken in stay
on the list; what nobody needs is not written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from .node import Node
from .source import Source

_CLOSE = 1e-4  # exporters round 1/6 to four digits and more


def simplified(source: Source) -> Source:
    """The same graph with each hard swish and gelu as one node."""
    makers = {name: node for node in source.nodes for name in node.outputs}
    nodes = []
    for node in source.nodes:
        for op, found in _PATTERNS.items():
            x = found(node, makers)
            if x is not None and source.types[x] == node.made[node.output]:
                node = dataclasses.replace(node, op=op, inputs=(x,), values=(None,), attributes={})
                break
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


def _gelu(node: Node, makers: Mapping[str, Node]) -> str | None:
    """The value whose gelu a node makes; the half may stand at the end or at ``x``."""
    if node.op != "Mul":
        return None
    halved = makers.get(_beside(node, 0.5) or "")
    product = node if halved is None else halved
    if product.op != "Mul":
        return None
    for factor, rest in (product.inputs, product.inputs[::-1]):
        maker = makers.get(factor)
        x = factor if halved is not None else _beside(maker, 0.5) if maker is not None and maker.op == "Mul" else None
        if x is not None and _one_and_erf(rest, makers) == x:
            return x
    return None


def _one_and_erf(name: str, makers: Mapping[str, Node]) -> str | None:
    """``x`` of ``1 + erf(x / sqrt(2))``."""
    added = makers.get(name)
    erf = makers.get(_beside(added, 1.0) or "") if added is not None and added.op == "Add" else None
    inner = makers.get(erf.inputs[0]) if erf is not None and erf.op == "Erf" else None
    if inner is None or inner.op not in {"Div", "Mul"} or (inner.op == "Div" and inner.values[0] is not None):
        return None
    return _beside(inner, math.sqrt(2) if inner.op == "Div" else math.sqrt(0.5))


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


_PATTERNS = {"HardSwish": _hard_swish, "Gelu": _gelu}
