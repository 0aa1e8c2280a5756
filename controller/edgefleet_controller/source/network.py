"""Stage 1, source: the network itself. Receives bytes that claim to be ONNX, hands on a checked model with fixed shapes.

Everything here treats the file as hostile: it may not be ONNX, may point at files outside itself (the CVEs of ONNX's
external data), and may leave sizes open. Operators are not judged here: which of them exist is each engine's matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

import onnx
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import ModelError
from google.protobuf.message import DecodeError

# ONNX element type -> name in the Open Inference Protocol.
_DATATYPES = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.DOUBLE: "FP64",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
}
MAX_NETWORK_BYTES = 2**31 - 1  # protobuf's own limit
MIN_OPSET = 7  # older ones have no converter in the tools behind us


def load(content: bytes, origin: str) -> onnx.ModelProto:
    """Parse and check a network.

    Args:
        origin: what to call it in errors, usually its path.

    Raises:
        ModelError: not ONNX, not valid ONNX, external data, or an operator set too old or unknown.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as exc:
        raise ModelError(f"{origin} is not an ONNX model", hint="export the network as .onnx") from exc
    # Protobuf parses many a foreign file into an empty message.
    if not model.ir_version or not model.graph.node or not model.graph.output:
        raise ModelError(f"{origin} is not an ONNX model: no graph in it", hint="export the network as .onnx")
    outside = [t for t in tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL or t.external_data]
    if (size := sum(_bytes(tensor) for tensor in outside)) > MAX_NETWORK_BYTES:
        raise ModelError(
            f"{origin} has {size / 1e9:.1f} GB of weights in other files; one ONNX file holds {MAX_NETWORK_BYTES / 1e9:.1f} GB",
            hint="weights in half precision take half of that; what is larger still is not for boards",
        )
    if outside:
        raise ModelError(
            f"{origin} keeps tensor {outside[0].name or '(unnamed)'!r} in another file",
            hint="save the network as one file: torch.onnx.export(..., external_data=False) where it is made, or beside its other file "
            "onnx.save(onnx.load(path), new_path)",
        )
    opset = max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=0)
    if 0 < opset < MIN_OPSET:
        raise ModelError(f"{origin} has operator set {opset}; at least {MIN_OPSET} is needed")
    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise ModelError(
            f"{origin} has operator set {opset}, which no tool here knows; the newest known is {newest}",
            hint="export it with an older one: torch.onnx.export(..., opset_version=18)",
        )
    _in_order(model.graph)
    _tell_sides(model.graph)
    _tell_outputs(model, origin)
    try:
        onnx.checker.check_model(model.SerializeToString())
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as exc:
        raise ModelError(f"{origin} is not valid ONNX: {str(exc).strip().splitlines()[0]}") from exc
    fed = {value.name for value in model.graph.input}
    passed_on = [value.name for value in model.graph.output if value.name in fed]
    if passed_on:
        raise ModelError(
            f"{origin}: the output {passed_on[0]!r} is an input, passed on as it came",
            hint="leave it away: who asked has it",
        )
    return model


def read_by(node: onnx.NodeProto) -> set[str]:
    """What a node and the graphs inside it read."""
    inside = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {*node.input, *(name for graph in inside for one in graph.node for name in read_by(one))}


def _in_order(graph: onnx.GraphProto) -> None:
    """Put each node behind those that make what it reads, as ONNX wants it and some converters don't leave it; as it is where nodes wait for each other."""
    nodes = list(graph.node)
    makers = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    waits = [{makers[name] for name in read_by(node) if name in makers} for node in nodes]
    if all(not of or max(of) < number for number, of in enumerate(waits)):
        return
    try:
        order = list(TopologicalSorter(dict(enumerate(waits))).static_order())
    except CycleError:
        return
    ordered = [onnx.NodeProto.FromString(nodes[number].SerializeToString()) for number in order]
    del graph.node[:]
    graph.node.extend(ordered)


def _tell_sides(graph: onnx.GraphProto) -> None:
    """Write the default of STFT's ``onesided`` where it is left away: ONNX's shape inference (1.23) then takes both sides, and refuses what is right."""
    for node in graph.node:
        if node.op_type == "STFT" and not any(attribute.name == "onesided" for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("onesided", 1))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _tell_sides(attribute.g)


def _tell_outputs(model: onnx.ModelProto, origin: str) -> None:
    """Give outputs of which only the name stands there, as where somebody cut a network short or asked for a value inside it, type and shape.

    Raises:
        ModelError: ONNX can't tell them.
    """

    def untold() -> list[str]:
        return [value.name for value in model.graph.output if _shapeless(value)]

    if not untold():
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as exc:
        raise ModelError(f"{origin} is not valid ONNX: {str(exc).strip().splitlines()[0]}") from exc
    model.CopyFrom(inferred)
    if left := untold():
        raise ModelError(
            f"{origin}: nothing tells type and shape of the output {left[0]!r}",
            hint="write them to the output: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)",
        )


def _shapeless(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.WhichOneof("value")
    return kind is None or (kind == "tensor_type" and not value.type.tensor_type.HasField("shape"))


def _bytes(tensor: onnx.TensorProto) -> int:
    """What a tensor's values take, as its shape and type say."""
    try:
        size: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:  # a type that there is none of, which the check of the model tells
        return 0
    return size * int(math.prod(tensor.dims))


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in a model: initializers, sparse ones, attributes, subgraphs, functions, training graphs."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _attribute_tensors(attribute for node in function.node for attribute in node.attribute)
        yield from _attribute_tensors(function.attribute_proto)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attribute_tensors(attribute for node in graph.node for attribute in node.attribute)


def _attribute_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (
            *attribute.sparse_tensors,
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
        ):
            yield from (sparse.values, sparse.indices)
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from _graph_tensors(graph)


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller feeds: those without an initializer."""
    given = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in given]


def fix_shapes(model: onnx.ModelProto, sizes: Mapping[str, int], origin: str) -> onnx.ModelProto:
    """Give every open dimension its size and infer all shapes.

    Args:
        sizes: size by the dimension's name; a dimension without a name is called ``<input>.<axis>``.

    Returns:
        the same model, changed in place.

    Raises:
        ModelError: an open dimension without a size, a size for no dimension, or shapes that contradict each other.
    """
    used: set[str] = set()
    named: dict[str, int] = {}
    for value in graph_inputs(model):
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            raise ModelError(f"{origin}: input {value.name!r} is no tensor of known rank")
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            name = dim.dim_param or f"{value.name}.{axis}"
            if name not in sizes:
                raise ModelError(
                    f"{origin}: dimension {name!r} (axis {axis} of input {value.name!r}) has no fixed size",
                    hint=f"give it one under spec.sizes, such as {{{name}: 1}}",
                )
            used.add(name)
            named[name] = sizes[name]
            dim.dim_value = sizes[name]
    if strangers := sorted(set(sizes) - used):
        raise ModelError(
            f"{origin} has no open dimension {strangers[0]!r}", hint=f"open: {', '.join(sorted(used)) or 'none'}"
        )
    for value in (*model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in named:
                dim.dim_value = named[dim.dim_param]
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as exc:
        raise ModelError(f"{origin}: shapes contradict each other: {str(exc).strip().splitlines()[0]}") from exc
    model.CopyFrom(inferred)
    return model


def specs(values: Iterable[onnx.ValueInfoProto], origin: str) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as they are served; -1 where a size stays open.

    Raises:
        ModelError: an element type that can't be served.
    """
    found = []
    for value in values:
        kind, tensor = value.type.WhichOneof("value"), value.type.tensor_type
        if kind != "tensor_type":
            told = str(kind).removesuffix("_type").replace("_", " ")
            raise ModelError(
                f"{origin}: {value.name!r} is a {told}, which can't be served",
                hint="take its tensors in or out one by one",
            )
        if tensor.elem_type not in _DATATYPES:
            name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            raise ModelError(f"{origin}: {value.name!r} is a tensor of {name}, which can't be served")
        shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in tensor.shape.dim)
        found.append(TensorSpec(value.name, _DATATYPES[tensor.elem_type], shape))
    return tuple(found)
