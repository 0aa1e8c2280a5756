"""Stage 2, compile: where onnxruntime rounds what is moved. Receives a QDQ network, hands on the same with each move on the cheaper side of its rounding.

What only puts values elsewhere (joins, nearest neighbours, largest of neighbours) answers the same on rounded values. Behind what is in int8 that takes less time: the QDQ
writer rounds what weighted operators read, so that a join before one of them was in float, with all that led there from others. Behind what a convolution makes in float
it takes more: rounded largest values are found fast only where channels come last, as int8 convolutions lay them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .tidy import readers_of
from .weights import WEIGHTED

FAR = 1e30  # a limit that no activation reaches


def settle_moves(model: onnx.ModelProto) -> None:
    """Put roundings before moves or hold them behind, in place. No answer changes: to round twice is to round once.

    Args:
        model: sorted; new nodes are put at its end.
    """
    graph = model.graph
    served = {output.name for output in graph.output}
    constants = {i.name for i in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers = readers_of(graph)
    for node in reversed(list(graph.node)):
        reading = readers.get(node.output[0], []) if len(node.output) == 1 else []
        if len(reading) != 1 or reading[0].op_type != "QuantizeLinear" or node.output[0] in served:
            continue
        if node.op_type == "MaxPool" and not _is_behind_int8(node, maker, constants):
            _hold_back(graph, reading[0])
        elif node.op_type in ("Concat", "MaxPool") or _takes_nearest(node):
            for place in range(len(node.input) if node.op_type == "Concat" else 1):
                _round(graph, node, place, reading[0], maker, readers)


def _takes_nearest(node: onnx.NodeProto) -> bool:
    return (
        node.op_type == "Resize" and next((a.s for a in node.attribute if a.name == "mode"), b"nearest") == b"nearest"
    )


def _is_behind_int8(pool: onnx.NodeProto, maker: dict[str, onnx.NodeProto], constants: Collection[str]) -> bool:
    """Whether what a pool reads is rounded, or made of nothing but rounded values without a weighted operator in float."""
    todo, seen = [pool.input[0]], set[str]()
    while todo:
        name = todo.pop()
        if name in seen or name in constants:
            continue
        seen.add(name)
        made = maker.get(name)
        if made is None or made.op_type in WEIGHTED:
            return False
        if made.op_type != "DequantizeLinear":
            todo += filter(None, made.input)
    return True


def _hold_back(graph: onnx.GraphProto, rounding: onnx.NodeProto) -> None:
    """Keep onnxruntime from putting a rounding before the pool that it reads (its QDQPropagationTransformer), with a Clip that clips nothing: ResNet's first
    convolution in float took three times as long with its pool as in int8."""
    name = f"{rounding.input[0]}/held"
    limits = [f"{name}/low", f"{name}/high"]
    graph.initializer.extend(
        numpy_helper.from_array(np.float32(v), n) for v, n in zip((-FAR, FAR), limits, strict=True)
    )
    graph.node.append(helper.make_node("Clip", [rounding.input[0], *limits], [name], name=name))
    rounding.input[0] = name


def _round(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    place: int,
    rounding: onnx.NodeProto,
    maker: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
) -> None:
    """Let a node read one of its inputs rounded as ``rounding`` does what it makes; what a join reads may be rounded otherwise already."""
    name, scale = node.input[place], list(rounding.input[1:])
    made = maker.get(name)
    if (
        made is not None
        and made.op_type == "DequantizeLinear"
        and (node.op_type == "Concat" or list(made.input[1:]) == scale)
    ):
        return
    again = f"{name}/for/{node.output[0]}/{place}"
    pair = [
        helper.make_node("QuantizeLinear", [name, *scale], [f"{again}/q"], name=f"{again}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [f"{again}/q", *scale], [again], name=f"{again}/DequantizeLinear"),
    ]
    graph.node.extend(pair)
    node.input[place] = again
    readers[name] = [*(reader for reader in readers[name] if reader is not node), pair[0]]
    maker[again], readers[again] = pair[1], [node]
