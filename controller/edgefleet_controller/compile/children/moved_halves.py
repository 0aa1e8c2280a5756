"""Stage 2, compile: half precision between operators. Receives a simplified network, hands on the same in which what is only moved is moved in float.

onnxruntime computes nothing in half precision on this host's processor: it puts Casts around what computes, and leaves what moves values as it is. int8 would end at
such a Cast, and TFLite knows none. Values that were float before they were halved, and are float again afterwards, may be so in between.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .tidy import read_by

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
MOVING = {
    "Reshape", "Transpose", "Slice", "Concat", "Flatten", "Squeeze", "Unsqueeze", "Gather", "Identity", "Expand", "Tile", "Split", "DepthToSpace",
    "SpaceToDepth",
}  # fmt: skip


def move_in_float(path: str) -> None:
    """Change a network's file, in place."""
    model = onnx.load(path)
    if _move(model):
        onnx.save(model, path)


def _move(model: onnx.ModelProto) -> bool:
    """Change a network, in place; returns whether it did."""
    types = _types(model)
    halves = {i.name: i for i in model.graph.initializer if i.data_type == HALF}
    if not halves and HALF not in types.values():
        return False
    floats: dict[str, str] = {}  # of what is half: the same in float
    kept: list[onnx.NodeProto] = []
    for node in list(model.graph.node):
        to, first = _cast_to(node), node.input[0] if node.input else ""
        if to == FLOAT and first in floats:
            kept.append(helper.make_node("Identity", [floats[first]], list(node.output), name=node.name))
            continue
        if to == HALF and types.get(first) == FLOAT:
            floats[node.output[0]] = first
        read = {name for name in node.input if types.get(name) == HALF}
        if node.op_type not in MOVING or not read & floats.keys() or read - floats.keys() - halves.keys():
            kept.append(node)
            continue
        for name in read - floats.keys():
            floats[name] = f"{name}/float"
            values = numpy_helper.to_array(halves[name]).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(values, floats[name]))
        moved = onnx.NodeProto.FromString(node.SerializeToString())
        moved.input[:] = [floats.get(name, name) for name in node.input]
        moved.output[:] = [f"{name}/float" for name in node.output]
        kept.append(moved)
        for name, moved_to in zip(node.output, moved.output, strict=True):
            floats[name] = moved_to
            kept.append(helper.make_node("Cast", [moved_to], [name], name=f"{name}/half", to=HALF))
    if not floats:
        return False
    _put(model.graph, kept)
    return True


def _put(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """These nodes in place of those that were there, but for what nothing reads."""
    read, kept = {output.name for output in graph.output}, list[onnx.NodeProto]()
    for node in reversed(nodes):
        if read & set(node.output):
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            read |= read_by(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of values, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    told = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return told | {i.name: i.data_type for i in graph.initializer}


def _cast_to(node: onnx.NodeProto) -> int:
    """The type that a node casts to; 0 where it is no Cast."""
    return next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else 0
