"""Stage 2, compile: the form that everything behind the simplifier expects. Receives a network that onnxruntime simplified, hands on the same in that form."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from .assembled import gates_whole
from .folded import fold_affine

ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")
GIVEN = "given/"  # before the names of roundings that a network came with
POOLED = (3, 4, 5)  # axes that a value has which engines pool: up to three of places
LOWEST = np.float32(-1e4)  # of what masks add; scores differ by hundreds at most, and float32 holds no e^-104


def tidy(path: str) -> None:
    """Change a simplified network's file, in place: every node has a name, by what it makes (recipes speak of nodes by name), weights are float32, no product
    adds a matrix, gates are whole, what is one number for all values is in weights, each operator set is named once, and nothing is remarked."""
    model = onnx.load(path)
    _named_once(model)
    _without_remarks(model.graph)
    seen: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}/{node.output[0]}"
        seen.add(node.name)
        # A limit that is left away: torch writes an empty name for it, and onnx2torch looks for that one.
        while node.input and not node.input[-1]:
            del node.input[-1]
    _without_places(model.graph)
    _stand_aside(model.graph)
    _masks_no_lower(model.graph)
    _weights_in_float(model.graph)
    _summands_apart(model.graph)
    _slopes_in_common(model.graph)
    _means_of_pictures(model.graph)
    gates_whole(model.graph, readers_of(model.graph))
    fold_affine(model.graph, readers_of(model.graph))
    _swept(model.graph)
    onnx.save(model, path)


def _named_once(model: onnx.ModelProto) -> None:
    """Leave each operator set named once: some converters name one twice, and the QDQ writer looks for exactly one of ONNX's own."""
    sets = {entry.domain: entry.version for entry in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in sets.items())


def _without_places(graph: onnx.GraphProto) -> None:
    """Let pools tell the places of their maxima no more where nothing reads these: engines have pools that can't."""
    read = {name for node in graph.node for name in read_by(node)} | {output.name for output in graph.output}
    for node in graph.node:
        if node.op_type == "MaxPool" and read.isdisjoint(node.output[1:]):
            del node.output[1:]


def _without_remarks(graph: onnx.GraphProto) -> None:
    """Take away what exporters write to nodes and tensors for people: torch's notes, by each node, where in whose source files it came from, which can be as much
    as the weights. What the model itself is told of stays: its licence may stand there."""
    parts = (graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info)
    for part in (*parts, *(a for node in graph.node for a in node.attribute)):
        part.ClearField("doc_string")
    for part in parts:
        part.ClearField("metadata_props")
    for attribute in (a for node in graph.node for a in node.attribute):
        for inside in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            _without_remarks(inside)


def read_by(node: onnx.NodeProto) -> set[str]:
    """What a node and the graphs inside it read."""
    return {*node.input, *read_inside(node)}


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Who reads a value, itself or in graphs inside it, by the value's name."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in read_by(node):
            found.setdefault(name, []).append(node)
    return found


def read_inside(node: onnx.NodeProto) -> set[str]:
    """What the graphs inside a node read."""
    inside = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {name for graph in inside for one in graph.node for name in read_by(one)}


def _weights_in_float(graph: onnx.GraphProto) -> None:
    """Constants that a Cast makes float32 become what it makes. So weights lie that came in half precision, which this host's processor computes nothing
    in: onnxruntime puts the Casts there, and nothing behind it would know the weights for constants."""
    constants = {i.name: i for i in graph.initializer}
    served = {output.name for output in graph.output}
    for node in list(graph.node):
        to_float = node.op_type == "Cast" and any(
            a.name == "to" and a.i == onnx.TensorProto.FLOAT for a in node.attribute
        )
        if to_float and node.input[0] in constants and node.output[0] not in served:
            values = numpy_helper.to_array(constants[node.input[0]]).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            graph.node.remove(node)


def _swept(graph: onnx.GraphProto) -> None:
    """Take away constants that nothing reads any more."""
    read = {name for node in graph.node for name in read_by(node)} | {output.name for output in graph.output}
    kept = [i for i in graph.initializer if i.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _summands_apart(graph: onnx.GraphProto) -> None:
    """Make what a Gemm adds a node of its own, unless it is one number for each column: int8 has no other biases. onnxruntime puts them together where
    a product of two matrices is followed by any sum, such as that with the places of a picture's parts."""
    constants = {i.name: i for i in graph.initializer}
    nodes = list(graph.node)
    graph.ClearField("node")
    for node in nodes:
        graph.node.append(node)
        product = graph.node[-1]
        if node.op_type != "Gemm" or len(node.input) < 3 or not node.input[2]:
            continue
        summand = constants.get(node.input[2])
        if summand is not None and int(np.prod(summand.dims[:-1])) == 1:
            continue
        output, name, added = node.output[0], node.name, node.input[2]
        beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
        product.name, product.output[0] = f"{name}/product", f"{output}/product"
        del product.input[2:]
        if beta != 1.0:
            graph.initializer.append(numpy_helper.from_array(np.float32(beta), f"{output}/beta"))
            graph.node.append(
                onnx.helper.make_node("Mul", [added, f"{output}/beta"], [f"{output}/summand"], name=f"{name}/summand")
            )
            added = f"{output}/summand"
        graph.node.append(onnx.helper.make_node("Add", [product.output[0], added], [output], name=name))


def _slopes_in_common(graph: onnx.GraphProto) -> None:
    """Make PRelus with one slope for all LeakyRelus: engines have int8 for these, and onnxruntime computes them with the convolution before."""
    constants = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "PRelu" and node.input[1] in constants:
            slopes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1)
            if slopes.size and np.isfinite(slopes).all() and (slopes == slopes[0]).all():
                node.op_type = "LeakyRelu"
                del node.input[1:]
                node.attribute.append(onnx.helper.make_attribute("alpha", float(slopes[0])))


def _means_of_pictures(graph: onnx.GraphProto) -> None:
    """Make means over all places of a picture GlobalAveragePools, as which engines have them in int8: torch's mean((2, 3)) is a ReduceMean."""
    constants = {i.name: i for i in graph.initializer}
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }  # fmt: skip
    nodes = list(graph.node)
    graph.ClearField("node")
    for node in nodes:
        graph.node.append(node)
        rank = ranks.get(node.input[0], 0) if node.op_type == "ReduceMean" else 0
        told = {a.name: a for a in node.attribute}
        axes = list(told["axes"].ints) if "axes" in told else []
        if len(node.input) > 1 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
        if rank not in POOLED or sorted(axis % rank for axis in axes) != list(range(2, rank)):
            continue
        mean, output = graph.node[-1], node.output[0]
        mean.op_type = "GlobalAveragePool"
        del mean.input[1:], mean.attribute[:]
        if "keepdims" in told and not told["keepdims"].i:
            mean.output[0] = f"{output}/places"
            graph.node.append(
                onnx.helper.make_node("Flatten", [mean.output[0]], [output], name=f"{node.name}/row", axis=1)
            )


def _masks_no_lower(graph: onnx.GraphProto) -> None:
    """Raise what masks add before a Softmax to :data:`LOWEST`, which leaves nothing of a value as well: TFLite's int8 sum ends its process over the lowest
    float, as exporters write it. What is masked everywhere along the row is left alone: there a Softmax weighs what the mask leaves."""
    constants = {i.name: i for i in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in read_by(node):
            readers.setdefault(name, []).append(node)
    served, raised = {output.name for output in graph.output}, dict[str, str]()
    for node in graph.node:
        if node.op_type != "Add" or node.output[0] in served or not _along_rows(readers.get(node.output[0], [])):
            continue
        for place, name in enumerate(node.input):
            if name not in constants or constants[name].data_type != onnx.TensorProto.FLOAT:
                continue
            mask = numpy_helper.to_array(constants[name])
            low = mask < LOWEST
            if not low.any() or low.all(axis=-1).any() or not np.isfinite(mask).all():
                continue
            if name not in raised:
                raised[name] = f"{name}/raised"
                graph.initializer.append(numpy_helper.from_array(np.maximum(mask, LOWEST), raised[name]))
            node.input[place] = raised[name]


def _along_rows(nodes: list[onnx.NodeProto]) -> bool:
    """Whether these are one Softmax over the last axis."""
    return [node.op_type for node in nodes] == ["Softmax"] and all(
        a.i == -1 for a in nodes[0].attribute if a.name == "axis"
    )


def _stand_aside(graph: onnx.GraphProto) -> None:
    """Give roundings that a network came with names of their own: the QDQ writer's are made from tensors' names, as those were by its like."""
    outputs = {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in ROUNDINGS:
            node.name = f"{GIVEN}{node.name}"
            renamed |= {name: f"{GIVEN}{name}" for name in node.output if name not in outputs}
    _rename(graph, renamed)


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    """Values by other names, here and in the graphs inside, which may read them."""
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inside in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _rename(inside, renamed)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)
