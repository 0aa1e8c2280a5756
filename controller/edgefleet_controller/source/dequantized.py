"""Stage 1, source: networks that came quantized. Receives a checked ONNX model, hands on what it means in floats, which is compiled like any other.

An engine's own int8 is another's unknown operator, and is chosen for one kind of processor. So weights become the floats that they stand for, what computes on
integers computes on floats, and values between are no longer rounded. What stays of a rounding is where it ends: quantizers take activations away whose limits
are a rounding's, and training with roundings learns where these end. Where nothing can go beyond its ends nothing stays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgefleet_controller.source.network import read_by

Array = npt.NDArray[Any]
ROUNDINGS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
OF_ONE = {
    "QLinearGlobalAveragePool": "GlobalAveragePool", "QLinearAveragePool": "AveragePool", "QLinearSigmoid": "Sigmoid",
    "QLinearLeakyRelu": "LeakyRelu", "QLinearSoftmax": "Softmax",
}  # fmt: skip
OF_TWO = {"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearMatMul": "MatMul"}
OF_WHOLE_NUMBERS = {
    "MatMulInteger": "MatMul",
    "ConvInteger": "Conv",
}  # their weights' axis of channels: the last, the first
OF_INTEGERS = {*OF_ONE, *OF_TWO, *OF_WHOLE_NUMBERS, "QLinearConv", "QLinearConcat", "QGemm"}
MOVING = {
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Identity", "Expand", "Tile", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
TO_WHOLE = {"Floor", "Round", "Ceil"}
KEEPING = MOVING | {"AveragePool", "GlobalAveragePool", "Dropout"}  # what they make lies within what they read
ENDS = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}
USUAL = (
    0.0,
    1.0,
    -1.0,
    6.0,
)  # limits of activations: what lies within a step of one is it (a share of one is often rounded in 256ths)


class Untold(Exception):
    """The network has integers of which this module does not know what they mean."""


class Integers(NamedTuple):
    """What a tensor of integers stands for: the floats' name, and the scale and zero point that tell it; None where these come out of the values."""

    floats: str
    scale: Array | None
    zero: Array


def in_floats(model: onnx.ModelProto) -> bool:
    """Change a network, in place, that came quantized; returns whether it did, and all of it could be read as floats. Else it is as it was."""
    if not any(node.op_type in ROUNDINGS or node.op_type in OF_INTEGERS for node in model.graph.node):
        return False
    try:
        read = _Reader(model).read()
    except (Untold, ValueError):  # the latter of scales that don't fit what they scale, which the engine will tell
        return False
    model.CopyFrom(read)
    return True


class _Reader:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        graph = self._model.graph
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info)}
        self._shapes = {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in (*graph.input, *graph.value_info)
            if v.type.tensor_type.HasField("shape")
        }
        self._inputs = {value.name for value in graph.input}
        self._served = {value.name for value in graph.output}
        self._integers: dict[str, Integers] = {}
        self._products: set[str] = set()  # of whole numbers: floats now, of the same values
        self._unrounded: dict[str, str] = {}  # floats that were made whole numbers, by these
        self._ends: dict[str, tuple[float, float]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))

    def read(self) -> onnx.ModelProto:
        """The model in floats.

        Raises:
            Untold: not all of it can be.
        """
        graph = self._model.graph
        for node in list(graph.node):
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            self._take(node)
        del graph.node[:]
        graph.node.extend(self._nodes)
        _swept(graph)
        del graph.value_info[:]  # types among them that are others now
        domains = {node.domain for node in graph.node}
        kept = [entry for entry in self._model.opset_import if entry.domain in ("", "ai.onnx", *domains)]
        del self._model.opset_import[:]
        self._model.opset_import.extend(kept)
        return self._model

    def _take(self, node: onnx.NodeProto) -> None:
        op, inputs = node.op_type, list(node.input)
        if op == "QuantizeLinear":
            self._quantize(node)
        elif op == "DequantizeLinear":
            floats = self._value(inputs, _attribute(node, "axis", 1), node)
            if floats in self._constants:
                self._constant(node.output[0], self._constants[floats])
            else:
                self._add("Identity", [floats], node.output[0])
        elif op == "DynamicQuantizeLinear":
            rounded, scale, zero = node.output
            self._constant(scale, np.float32(1))
            self._constant(zero, np.uint8(0))
            self._integers[rounded] = Integers(inputs[0], None, np.array(0, np.uint8))
        elif op in OF_INTEGERS:
            self._compute(node)
        elif self._products & read_by(node):
            self._follow(node)
        elif op in MOVING and inputs[0] in self._integers and not set(inputs[1:]) & self._integers.keys():
            self._move(node)
        else:
            self._leave(node)

    def _leave(self, node: onnx.NodeProto) -> None:
        if read_by(node) & self._integers.keys():
            raise Untold
        self._nodes.append(node)
        self._note_unrounded(node)
        if node.op_type == "Clip" and len(node.input) == 3 and {*node.input[1:]} <= self._constants.keys():
            self._ends[node.output[0]] = tuple(float(self._constants[name]) for name in node.input[1:])  # type: ignore[assignment]
        else:
            self._note_ends(node)

    def _note_ends(self, node: onnx.NodeProto) -> None:
        """Note between which ends an operator's output lies whatever comes, by those of what it reads."""
        read = [self._ends.get(name, (-np.inf, np.inf)) for name in node.input]
        match node.op_type:
            case "Relu":
                found = (0.0, max(0.0, read[0][1]))
            case "Concat":
                found = min(low for low, _ in read), max(high for _, high in read)
            case "Add":
                found = sum(low for low, _ in read), sum(high for _, high in read)
            case "Resize" if _mode(node) != "cubic":  # which overshoots
                found = read[0]
            case op if op in ENDS:
                found = ENDS[op]
            case op if op in KEEPING and read:
                found = read[0]
            case _:
                return
        self._ends[node.output[0]] = found

    def _move(self, node: onnx.NodeProto) -> None:
        known = self._integers[node.input[0]]
        moved = onnx.NodeProto()
        moved.CopyFrom(node)
        moved.input[0], moved.output[0] = known.floats, f"{node.output[0]}/float"
        if node.output[0] in self._served or len(node.output) > 1:
            raise Untold
        self._nodes.append(moved)
        if known.floats in self._ends:
            self._ends[moved.output[0]] = self._ends[known.floats]
        self._integers[node.output[0]] = known._replace(floats=moved.output[0])

    def _quantize(self, node: onnx.NodeProto) -> None:
        name, axis = node.input[0], _attribute(node, "axis", 1)
        scale, zero = self._parameters(node.input[1], _at(list(node.input), 2), node)
        if name in self._constants:
            values = self._constants[name]
            wide = _along(scale, axis, values.ndim), _along(zero, axis, values.ndim)
            limits = np.iinfo(zero.dtype)
            whole = np.clip(np.rint(values / wide[0]) + wide[1], limits.min, limits.max)
            self._constants[node.output[0]] = whole.astype(zero.dtype)
            return
        self._rounded(name, node.output[0], scale, zero, node)

    def _rounded(self, floats: str, name: str, scale: Array, zero: Array, node: onnx.NodeProto) -> None:
        """Call what ``floats`` becomes by a rounding ``name``."""
        if name in self._served:
            if node.op_type != "QuantizeLinear":
                raise Untold
            self._nodes.append(node)
        limits = np.iinfo(zero.dtype)
        low, high = ((end - zero.astype(scale.dtype)) * scale for end in (limits.min, limits.max))
        if scale.size > 1:
            floats = self._within(floats, f"{name}/float", low, high, _attribute(node, "axis", 1))
        elif floats not in self._inputs:  # what a board is fed lies where the samples lay that the range was taken from
            floats = self._ended(floats, f"{name}/float", float(low), float(high), float(scale), scale.dtype)
        self._integers[name] = Integers(floats, scale, zero)

    def _ended(self, floats: str, name: str, low: float, high: float, step: float, kind: Any) -> str:
        """One end below and one above, where something can go beyond them."""
        low, high = _usual(low, step), _usual(high, step)
        lowest, highest = self._ends.get(floats, (-np.inf, np.inf))
        if lowest >= low - step and highest <= high + step:
            return floats
        self._ends[name] = max(low, lowest), min(high, highest)
        return self._clipped(floats, name, *self._ends[name], kind)

    def _within(self, floats: str, name: str, low: Array, high: Array, axis: int) -> str:
        """Ends of their own for each channel."""
        shape = self._shapes.get(floats)
        if shape is None:
            raise Untold  # where its channels lie
        for op, end, made in (("Max", low, f"{name}/low"), ("Min", high, name)):
            self._constant(f"{made}/end", _along(end, axis, shape))
            self._add(op, [floats, f"{made}/end"], made)
            floats = made
        return name

    def _clipped(self, floats: str, name: str, low: float, high: float, kind: Any) -> str:
        if self._opset < 11:
            self._nodes.append(helper.make_node("Clip", [floats], [name], name=name, min=low, max=high))
            return name
        limits = [f"{name}/low", f"{name}/high"]
        for limit, value in zip(limits, (low, high), strict=True):
            self._constant(limit, np.asarray(value, kind))
        self._add("Clip", [floats, *limits], name)
        return name

    def _compute(self, node: onnx.NodeProto) -> None:
        op, inputs, made = node.op_type, list(node.input), f"{node.output[0]}/made"
        if op in OF_WHOLE_NUMBERS:
            self._compute_whole(node)
            return
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if attributes.pop("channels_last", 0):
            raise Untold
        if op in OF_ONE:
            old = attributes.pop("opset", self._opset) < 13
            if op == "QLinearSoftmax" and old != (self._opset < 13):
                raise Untold
            self._add(OF_ONE[op], [self._value(inputs[:3], 1, node)], made, node.name, attributes)
            self._result(node, made, _at(inputs, 3), _at(inputs, 4))
        elif op in OF_TWO:
            read = [self._value(inputs[:3], -1, node), self._value(inputs[3:6], -1, node)]
            self._add(OF_TWO[op], read, made, node.name)
            self._result(node, made, _at(inputs, 6), _at(inputs, 7))
        elif op == "QLinearConcat":
            read = [self._value(inputs[i : i + 3], 1, node) for i in range(2, len(inputs), 3)]
            self._add("Concat", read, made, node.name, attributes)
            self._result(node, made, _at(inputs, 0), _at(inputs, 1))
        elif op == "QLinearConv":
            read = [self._value(inputs[:3], 1, node), self._value(inputs[3:6], 0, node)]
            if bias := _at(inputs, 8):
                read.append(self._bias(bias, _at(inputs, 1), _at(inputs, 4), node))
            self._add("Conv", read, made, node.name, attributes)
            self._result(node, made, _at(inputs, 6), _at(inputs, 7))
        else:  # QGemm
            across = 0 if attributes.get("transB") else 1
            read = [self._value(inputs[:3], 1, node), self._value(inputs[3:6], across, node)]
            if bias := _at(inputs, 6):
                read.append(self._bias(bias, _at(inputs, 1), _at(inputs, 4), node, attributes.get("alpha", 1.0)))
            self._add("Gemm", read, made, node.name, attributes)
            if _at(inputs, 7):
                self._result(node, made, _at(inputs, 7), _at(inputs, 8))
            else:
                self._add("Identity", [made], node.output[0])

    def _compute_whole(self, node: onnx.NodeProto) -> None:
        """A product of whole numbers, which what follows scales: the same of floats whose scale is 1."""
        known, weight = self._integers.get(node.input[0]), self._constants.get(node.input[1])
        if known is None or known.scale is not None or weight is None:
            raise Untold
        floats = weight.astype(np.float32)
        if zero := _at(list(node.input), 3):
            axis = -1 if node.op_type == "MatMulInteger" else 0
            floats -= _along(self._constants[zero].astype(np.float32), axis, weight.ndim)
        name = f"{node.output[0]}/weight"
        self._constant(name, floats)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._add(OF_WHOLE_NUMBERS[node.op_type], [known.floats, name], node.output[0], node.name, attributes)

        self._note_product(node.output[0])

    def _note_product(self, name: str) -> None:
        if name in self._served:
            raise Untold
        self._products.add(name)

    def _follow(self, node: onnx.NodeProto) -> None:
        """What a product of whole numbers goes through until a scale makes floats of it: a bias is added, which was rounded to that scale."""
        added = [name if name in self._products else self._unrounded.get(name, "") for name in node.input]
        if node.op_type == "Add" and all(added):
            self._add("Add", added, node.output[0], node.name)
        elif node.op_type in {"Cast", *MOVING} and not self._products & {*node.input[1:]}:
            self._nodes.append(node)
        else:
            raise Untold
        if node.op_type != "Cast":
            self._note_product(node.output[0])

    def _note_unrounded(self, node: onnx.NodeProto) -> None:
        """Note of which floats a node makes whole numbers, or moves such."""
        first = node.input[0] if node.input else ""
        if node.op_type in TO_WHOLE or (node.op_type == "Cast" and first in self._unrounded):
            self._unrounded[node.output[0]] = self._unrounded.get(first, first)
        elif node.op_type in MOVING and first in self._unrounded and len(node.output) == 1:
            moved = onnx.NodeProto()
            moved.CopyFrom(node)
            moved.name = moved.output[0] = f"{node.output[0]}/float"
            moved.input[0] = self._unrounded[first]
            self._nodes.append(moved)
            self._unrounded[node.output[0]] = moved.output[0]

    def _result(self, node: onnx.NodeProto, made: str, scale: str, zero: str) -> None:
        self._rounded(made, node.output[0], *self._parameters(scale, zero, node), node)

    def _bias(self, name: str, read: str, weight: str, node: onnx.NodeProto, factor: float = 1.0) -> str:
        scales = self._parameters(read, "", node)[0] * self._parameters(weight, "", node)[0] * np.float32(factor)
        if name not in self._constants:
            raise Untold
        floats = f"{node.output[0]}/bias"
        values = self._constants[name].astype(scales.dtype)
        self._constant(floats, values * scales)
        return floats

    def _value(self, given: list[str], axis: int, node: onnx.NodeProto) -> str:
        """The name of the floats that integers stand for. Args: ``given``: names of the integers, of their scale and, maybe, of their zero point."""
        name = _at(given, 0)
        scales, zeros = self._parameters(_at(given, 1), _at(given, 2), node)
        if name in self._integers:
            known = self._integers[name]
            if known.scale is None or not (np.array_equal(known.scale, scales) and np.array_equal(known.zero, zeros)):
                raise Untold
            return known.floats
        if name in self._constants:
            floats, values = f"{node.output[0]}/{name}", self._constants[name]
            block = _attribute(node, "block_size", 0)
            scales, zeros = (_along(each, axis, values.ndim, block, values.shape) for each in (scales, zeros))
            self._constant(floats, (values.astype(scales.dtype) - zeros.astype(scales.dtype)) * scales)
            return floats
        if self._types.get(name) not in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8) or scales.size != 1:
            raise Untold
        parts = [f"{node.output[0]}/{name}/{part}" for part in ("cast", "zero", "moved", "scale", "float")]
        self._constant(parts[1], zeros.astype(scales.dtype).reshape(()))
        self._constant(parts[3], scales.reshape(()))
        self._add("Cast", [name], parts[0], attributes={"to": helper.np_dtype_to_tensor_dtype(scales.dtype)})
        self._add("Sub", [parts[0], parts[1]], parts[2])
        self._add("Mul", [parts[2], parts[3]], parts[4])
        return parts[4]

    def _parameters(self, scale: str, zero: str, node: onnx.NodeProto) -> tuple[Array, Array]:
        """Scale and zero point. Raises: Untold: they are computed, or not of 8 bits and more."""
        if scale not in self._constants or (zero and zero not in self._constants):
            raise Untold
        kind = helper.tensor_dtype_to_np_dtype(_attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8)
        zeros = self._constants[zero] if zero else np.zeros((), kind)
        if zeros.dtype.kind not in "iu":
            raise Untold
        scales = self._constants[scale]
        return tuple(each.reshape(()) if each.size == 1 else each for each in (scales, zeros))  # type: ignore[return-value]

    def _constant(self, name: str, values: Any) -> None:
        if name not in self._constants:
            self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        self._constants[name] = np.asarray(values)

    def _add(
        self, op: str, inputs: list[str], output: str, name: str = "", attributes: dict[str, Any] | None = None
    ) -> None:
        self._nodes.append(helper.make_node(op, inputs, [output], name=name or output, **(attributes or {})))
        self._note_ends(self._nodes[-1])


def _usual(end: float, step: float) -> float:
    """Where a rounding ends, or the limit of an activation that it stands for."""
    return next((limit for limit in USUAL if abs(end - limit) < 1.01 * step), end)


def _along(values: Array, axis: int, axes: int, block: int = 0, shape: tuple[int, ...] = ()) -> Array:
    """Scales or zero points in a shape that lies along an axis; of blocks, for each value."""
    if block:
        return np.take(values, np.arange(shape[axis]) // block, axis)
    if values.ndim != 1:
        return values
    return values.reshape([-1 if place == axis % axes else 1 for place in range(axes)])


def _at(inputs: list[str], place: int) -> str:
    return inputs[place] if place < len(inputs) else ""


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _mode(node: onnx.NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "mode"), "nearest")


def _swept(graph: onnx.GraphProto) -> None:
    """Take away what nothing reads any more."""
    read = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read & set(node.output):
            kept.append(node)
            read |= read_by(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(nodes)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
