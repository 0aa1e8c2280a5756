"""Stage 2, compile: reading an ONNX graph for :mod:`.onnx_to_tflite`. Receives a model, hands on its nodes in order, checked.

What the emitters can rely on afterwards: every name is made once and before it is used; every value has a fixed shape without
zeros and a type that TFLite has; attributes are those of ONNX's schema; what can be computed now has been (:mod:`.folding`).
Shapes come from ONNX's own inference, node by node, so that a fault is told with the node that has it. Only what an output
needs is looked at. Not handled, and refused: external data, sparse tensors, control flow, sizes known only at run time.
"""

from __future__ import annotations

import graphlib
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.shape_inference
from onnx import TensorProto, helper, numpy_helper

from .. import job
from ..tidy import GIVEN
from .folding import FOLDED, folded
from .graph import Array
from .node import Node, Type

MIN_OPSET = 7  # older operators broadcast by an attribute
MAX_TENSOR_BYTES = 2**31 - 1  # TFLite's tensors and its file are indexed with 32 bits
MAX_INFERENCE_ELEMENTS = 4096  # of a constant whose values a shape may depend on
WIDE = {np.dtype(np.int64): np.dtype(np.int32)}  # TFLite computes whole numbers with 32 bits
TYPES = frozenset(np.dtype(t) for t in (np.float32, np.int32, np.int64, np.bool_, np.uint8, np.int8))
_KEEPS_SHAPE = frozenset({"GroupNormalization"})  # ONNX 1.23 infers nothing for it
_CHECK = "check it with onnx.checker.check_model(model, full_check=True), and export it again; TFLite has float32 and whole numbers of 32 bits"


class Source(NamedTuple):
    """A graph ready to be walked. ``types`` has inputs, constants and everything that a node makes."""

    inputs: dict[str, Type]
    outputs: dict[str, Type]
    nodes: list[Node]
    constants: dict[str, Array]
    types: dict[str, Type]


def read(model: onnx.ModelProto, known: Collection[str]) -> Source:
    """Check and order a graph.

    Args:
        known: the operators that can be written.

    Raises:
        Refused: names the node, input or tensor that is at fault.
    """
    return _Reader(model, known).read()


class _Reader:
    def __init__(self, model: onnx.ModelProto, known: Collection[str]) -> None:
        self._graph, self._known = model.graph, known
        self._opset = _opset(model)
        self._constants = dict(_initializers(model.graph))
        self._types = {name: Type(tuple(a.shape), a.dtype) for name, a in self._constants.items()}
        self._nodes: list[Node] = []

    def read(self) -> Source:
        inputs = dict(self._inputs())
        self._types |= inputs
        for node in self._ordered(set(inputs) | set(self._constants)):
            self._take(node)
        outputs = {}
        for result in self._graph.output:
            if result.name not in self._types:
                raise malformed(f"output {result.name!r} is made by no node")
            outputs[result.name] = self._types[result.name]
        if not outputs:
            raise malformed("it has no outputs")
        return Source(inputs, outputs, self._nodes, self._constants, self._types)

    def _inputs(self) -> Iterator[tuple[str, Type]]:
        for given in self._graph.input:
            if given.name in self._constants:
                continue  # an initializer with a name for who wants to replace it
            kind = given.type.tensor_type
            if not given.type.HasField("tensor_type") or not kind.HasField("shape"):
                raise malformed(f"input {given.name!r} is no tensor with a shape")
            sizes = [d.dim_value for d in kind.shape.dim]
            for size, dimension in zip(sizes, kind.shape.dim, strict=True):
                if size <= 0:
                    what = dimension.dim_param or (size if dimension.HasField("dim_value") else "?")
                    raise malformed(f"input {given.name!r} has a dimension {what!r} that is no size")
            found = Type(tuple(sizes), _dtype(kind.elem_type, f"input {given.name!r}"))
            yield given.name, _small(found, f"input {given.name!r}")

    def _ordered(self, given: set[str]) -> Iterator[onnx.NodeProto]:
        """The nodes that the outputs need, each after what it uses."""
        maker: dict[str, int] = {}
        for index, node in enumerate(self._graph.node):
            for name in filter(None, node.output):
                if name in maker or name in given:
                    raise malformed(f"value {name!r} is made twice, the second time by node {_name(node)!r}")
                maker[name] = index
        needed: dict[int, set[int]] = {}
        waiting = [maker[r.name] for r in self._graph.output if r.name in maker]
        while waiting:
            index = waiting.pop()
            if index in needed:
                continue
            needed[index] = set()
            for name in filter(None, self._graph.node[index].input):
                if name in maker:
                    needed[index].add(maker[name])
                    waiting.append(maker[name])
                elif name not in given:
                    where = self._graph.node[index]
                    raise malformed(f"node {_name(where)!r} ({where.op_type}) uses {name!r}, which nothing makes")
        try:
            order = list(graphlib.TopologicalSorter({i: sorted(needed[i]) for i in sorted(needed)}).static_order())
        except graphlib.CycleError as exc:
            names = ", ".join(repr(_name(self._graph.node[i])) for i in exc.args[1][:4])
            raise malformed(f"nodes depend on each other in a circle: {names}") from exc
        return (self._graph.node[i] for i in order)

    def _take(self, proto: onnx.NodeProto) -> None:
        """Compute a node now, or check it and put it on the list."""
        values = tuple(self._constants.get(name) for name in proto.input)
        node = Node(
            proto.op_type if proto.domain in {"", "ai.onnx"} else f"{proto.domain}.{proto.op_type}",
            _name(proto), self._opset, tuple(proto.input), values, tuple(proto.output), {}, {},
        )  # fmt: skip
        if node.op not in self._known and node.op not in FOLDED:
            raise node.refused()
        node.attributes.update((a.name, _attribute(a)) for a in proto.attribute)
        made = self._inferred(proto, node)
        for name, array in zip(node.inputs, values, strict=True):
            if array is not None and array.dtype.kind == "f" and np.isnan(array).any():
                raise malformed(f"constant {name!r} of node {node.name!r} ({node.op}) has values that are not numbers")
        now = folded(proto, node, {name: self._types[name].shape for name in node.inputs if name}, made)
        if now is not None:
            self._constants |= now
            self._types |= {name: Type(tuple(array.shape), array.dtype) for name, array in now.items()}
            return
        if node.op not in self._known:
            raise node.refused("with a computed input")
        for name, (shape, dtype) in made.items():
            if dtype not in TYPES:
                raise node.refused(f"in {dtype}")
            if 0 in shape:
                raise node.refused(f"that makes {name!r} without elements: {list(shape)}")
            node.made[name] = _small(Type(shape, dtype), f"node {node.name!r} ({node.op})")
        self._types |= node.made
        self._nodes.append(node)

    def _inferred(self, proto: onnx.NodeProto, node: Node) -> dict[str, Type]:
        """The types of what a node makes; its attributes are checked against ONNX's schema meanwhile."""
        where = f"node {node.name!r} ({node.op})"
        plain = onnx.NodeProto()
        plain.CopyFrom(proto)
        plain.domain = ""
        try:
            found = self._infer(plain, node)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, onnx.defs.SchemaError) as exc:
            raise malformed(f"{where}: {str(exc).strip().splitlines()[0]}") from exc
        except ValueError as exc:  # a type that is none, or a message that quotes bytes that are no text
            raise malformed(f"{where}: {exc}") from exc
        made = {}
        for name in filter(None, node.outputs):
            kind = found[name].tensor_type if name in found else onnx.TypeProto.Tensor()
            sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
            if not kind.HasField("shape") or any(size < 0 for size in sizes):
                if name == node.outputs[0] or kind.HasField("shape"):
                    raise node.refused(f"whose output {name!r} has a size that is known only at run time")
                continue
            sizes = _begun(node, self._types[node.inputs[0]].shape, sizes) if node.get("ceil_mode") else sizes
            made[name] = Type(tuple(sizes), _dtype(kind.elem_type, where))
        return made

    def _infer(self, plain: onnx.NodeProto, node: Node) -> dict[str, onnx.TypeProto]:
        given = {
            name: helper.make_tensor_type_proto(
                helper.np_dtype_to_tensor_dtype(self._types[name].dtype), self._types[name].shape
            )
            for name in filter(None, node.inputs)
        }
        known = {
            name: numpy_helper.from_array(array, name)
            for name, array in zip(node.inputs, node.values, strict=True)
            if array is not None and array.size <= MAX_INFERENCE_ELEMENTS
        }
        opsets = [helper.make_opsetid("", self._opset)]
        schema = onnx.defs.get_schema(node.op, max_inclusive_version=self._opset)
        found: dict[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            schema, plain, given, known, opset_imports=opsets
        )
        if node.output in found and found[node.output].tensor_type.HasField("shape"):
            return found
        if node.op in _KEEPS_SHAPE:
            return {node.output: given[node.inputs[0]]}
        # An operator that ONNX defines by others has no inference of its own; in a whole model they are looked into.
        graph = helper.make_graph(
            [plain], "one", [helper.make_value_info(name, kind) for name, kind in given.items()],
            [onnx.ValueInfoProto(name=name) for name in filter(None, node.outputs)], list(known.values()),
        )  # fmt: skip
        inferred = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets), strict_mode=True)
        return {value.name: value.type for value in inferred.graph.output}


def _begun(node: Node, given: tuple[int, ...], sizes: list[int]) -> list[int]:
    """Sizes of a pool's output without the windows that begin past the picture and the border before it (ONNX, MaxPool: "sliding
    windows that would start in the right padded region are ignored"), which ONNX 1.23 infers all the same."""
    rank = len(given) - 2
    strides, pads = node.get("strides", [1] * rank), node.get("pads", [0] * 2 * rank)
    most = [(given[2 + i] + pads[i] - 1) // strides[i] + 1 for i in range(rank)]
    return [*sizes[:2], *(min(pair) for pair in zip(sizes[2:], most, strict=True))]


def _opset(model: onnx.ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}]
    newest = onnx.defs.onnx_opset_version()
    if not versions or not MIN_OPSET <= max(versions) <= newest:
        raise malformed(f"its operator set is {max(versions, default=0)}; {MIN_OPSET} to {newest} can be read")
    return int(max(versions))


def _initializers(graph: onnx.GraphProto) -> Iterator[tuple[str, Array]]:
    seen: set[str] = set()
    for tensor in graph.sparse_initializer:
        raise malformed(f"constant {tensor.values.name!r} is sparse")
    for tensor in graph.initializer:
        if tensor.name in seen:
            raise malformed(f"constant {tensor.name!r} is given twice")
        seen.add(tensor.name)
        yield tensor.name, array_of(tensor)


def array_of(tensor: TensorProto) -> Array:
    """A tensor's values; external data is refused, because a network is one file that was hashed."""
    if tensor.data_location == TensorProto.EXTERNAL:
        raise malformed(f"constant {tensor.name!r} lies in another file")
    elements = math.prod(tensor.dims) if all(d >= 0 for d in tensor.dims) else -1
    if not 0 <= elements <= MAX_TENSOR_BYTES:
        raise malformed(f"constant {tensor.name!r} has dimensions {list(tensor.dims)}")
    try:
        values = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as exc:
        raise malformed(f"constant {tensor.name!r} can't be read: {exc}") from exc
    return np.asarray(values)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return array_of(value) if isinstance(value, TensorProto) else value


def _dtype(element: int, where: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(element))
    except (KeyError, ValueError) as exc:
        raise malformed(f"{where} has an unknown element type {element}") from exc
    return dtype


def _small(found: Type, where: str) -> Type:
    size = math.prod(found.shape) * found.dtype.itemsize
    if size > MAX_TENSOR_BYTES:
        raise malformed(f"{where} has a tensor of {size} bytes, {list(found.shape)}")
    if found.dtype not in TYPES:
        what = f"{where} is {found.dtype}; TFLite here has float32, int32, int64, uint8, int8 and bool"
        raise malformed(
            what, "export the network with inputs and outputs in one of these, or serve the class by onnxruntime"
        )
    return found


def _name(node: onnx.NodeProto) -> str:
    """A node's name as the network came with it, or by custom its first output's."""
    return str(node.name or next(iter(node.output), "")).removeprefix(GIVEN)


def malformed(what: str, hint: str = _CHECK) -> job.Refused:
    """A graph that is broken, or holds what no .tflite can: ``what`` says where."""
    return job.Refused("bad_model", f"tflite can't read this network: {what}", hint)
