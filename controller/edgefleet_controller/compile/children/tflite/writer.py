"""Stage 2, compile: walking an ONNX graph while a .tflite is written. Receives the graph and a table of operators, hands on bytes.

The walk goes once through the nodes; each appends what it amounts to through the row of its operator. Values keep the order in
which they lie (:mod:`.layout`) until an operator asks for another. Inputs and outputs keep ONNX's names, order, shape and
type, so that a model is served alike by every engine. The operators themselves are in the other modules here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema

from .. import job
from .graph import TENSOR_TYPES, Array, Graph
from .layout import (
    Order,
    Shape,
    Value,
    channels_last,
    plain,
    regrouped,
    same_bytes,
    transposed,
    widened,
    with_last,
)
from .node import Node
from .patterns import simplified
from .source import WIDE, Source, read

ACTIVATION = schema.ActivationFunctionType
FLOAT, INT, BOOL = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.bool_)
MAX_RANK = 6  # of a TRANSPOSE and of arithmetic in TFLite's kernels
MAX_FILE_BYTES = 2**31 - 2**20  # flatbuffers count with 32 bits, signed

Emit = Callable[["Writer", Node], None]  # appends what one ONNX node amounts to


class Operator(NamedTuple):
    """A row of the table: how an ONNX operator is written.

    Attributes:
        makes: the TFLite operators that may come of it, beside RESHAPE and TRANSPOSE where the order asks for them.
        types: element types that its computed inputs may have (int64 counts as int32).
        limits: what is refused, for people; empty if nothing is.
    """

    emit: Emit
    makes: tuple[str, ...]
    types: tuple[Any, ...] = (FLOAT,)
    limits: str = ""


class Writer:
    """Walks the graph once, in an order in which everything is made before it is used.

    Attributes:
        made: for each node that made a tensor, the name of the one that comes out, after what is fused into it.
        whole: names of tensors whose operators must be left whole by a quantizer, once written.
        same_as: for tensors that only the file has, the one whose numbers they hold in another order or shape.
    """

    def __init__(self, model: onnx.ModelProto, operators: Mapping[str, Operator]) -> None:
        self._source: Source = simplified(read(model, operators))
        self._operators = operators
        self.graph = Graph()
        self._node: Node  # the one that is being written
        self.made: dict[str, str] = {}
        self.whole: list[str] = []
        self.same_as: dict[str, str] = {}
        self._values: dict[str, Value] = {}
        self._arrays: dict[int, Array] = {}
        self._moved: dict[tuple[Value, Order], Value] = {}
        self._before: dict[str, Value] = {}
        self._fused: set[str] = set()  # what activations make that are part of an operator before them
        self._becomes: dict[str, str] = {}  # the value that such an activation would have been given -> what it makes
        self._positive: set[str] = set()
        self._users: dict[str, list[Node]] = {}
        for node in self._source.nodes:
            for name in node.inputs:
                self._users.setdefault(name, []).append(node)

    def write(self) -> bytes:
        """The file.

        Raises:
            Refused: see :func:`.onnx_to_tflite.convert`.
        """
        size = sum(
            self._source.constants[n].nbytes
            for n in {n for node in self._source.nodes for n in node.inputs} & set(self._source.constants)
        )
        if size > MAX_FILE_BYTES:
            raise job.Refused(
                "bad_model",
                f"tflite can't hold {size} bytes of constants in one file",
                "serve the class by onnxruntime, or train a smaller network",
            )
        inputs = {name: self.graph.tensor(name, kind.shape, kind.dtype) for name, kind in self._source.inputs.items()}
        for name, (shape, dtype) in self._source.inputs.items():
            value = Value(inputs[name], shape, plain(len(shape)), dtype)
            self._values[name] = self._cast(f"{name}/whole", value, WIDE[dtype]) if dtype in WIDE else value
        for node in self._source.nodes:
            if node.output not in self._fused:
                self._node = node
                self._check(node)
                known = self.graph.size
                self._operators[node.op].emit(self, node)
                last = self._becomes.get(node.output, node.output)
                if self._values[last].tensor >= known:  # else it only got another name
                    self.made.setdefault(node.name, self.graph.name(self._values[last].tensor))
        outputs: dict[str, int] = {}
        for name, kind in self._source.outputs.items():
            value = self.plain(name)
            if value.dtype != kind.dtype:
                value = self._cast(f"{name}/wide", value, kind.dtype)
            if value.tensor in self._arrays or value.tensor in inputs.values() or value.tensor in outputs.values():
                # An input, a constant or another output already: a file's output has a tensor of its own.
                value = self.reshaped(f"{name}/copy", value, value.stored)
            outputs[name] = value.tensor
        content, self.whole = self.graph.finish(inputs, outputs)
        return content

    def _check(self, node: Node) -> None:
        allowed = self._operators[node.op].types
        for name, constant in zip(node.inputs, node.values, strict=True):
            if not name or constant is not None:
                continue
            value = self._values[name]
            if value.dtype not in allowed:
                raise node.refused(f"over {value.dtype}")
            if len(value.shape) > MAX_RANK:
                raise node.refused(f"in {len(value.shape)} dimensions")
        for made in node.made.values():
            if len(made.shape) > MAX_RANK:
                raise node.refused(f"in {len(made.shape)} dimensions")

    # --- values ---

    def value(self, name: str) -> Value:
        """A value as it lies; constants become tensors on first use, in ONNX's order.

        Raises:
            Refused: a constant whose type or values TFLite can't hold.
        """
        if name not in self._values:
            self._values[name] = self.constant(name, self._source.constants[name])
        return self._values[name]

    def constant(self, name: str, array: Array) -> Value:
        """Fixed values as they are, in ONNX's order."""
        array = np.asarray(array)
        if array.dtype == np.int64:
            limits = np.iinfo(np.int32)
            if array.size and (array.min() < limits.min or array.max() > limits.max):
                raise job.Refused(
                    "bad_model",
                    f"tflite computes with 32 bits: constant {name!r} does not fit",
                    "serve the class by onnxruntime",
                )
            array = array.astype(np.int32)
        if array.dtype not in TENSOR_TYPES:
            raise job.Refused(
                "bad_model",
                f"tflite has no tensors of {array.dtype} here (constant {name!r})",
                "export the network in float32, or serve the class by onnxruntime",
            )
        tensor = self.graph.constant(name, array)
        self._arrays[tensor] = array
        return Value(tensor, tuple(array.shape), plain(array.ndim), array.dtype)

    def plain(self, name: str) -> Value:
        """A value in ONNX's order."""
        value = self.value(name)
        return self.laid(value, plain(len(value.shape)))

    def picture(self, name: str) -> Value:
        """A value with its channels last."""
        value = self.value(name)
        return self.laid(value, channels_last(len(value.shape)))

    def ending(self, name: str, *axes: int) -> Value:
        """A value with these axes stored last, the others as they lie."""
        value = self.value(name)
        return self.laid(value, with_last(value.order, *axes))

    def laid(self, value: Value, order: Order) -> Value:
        """The value in that order: as it is, under another shape, or by a TRANSPOSE."""
        if value.order == order:
            return value
        key = (value, order)
        if key not in self._moved:
            self._moved[key] = self._move(value, order)
        return self._moved[key]

    def _move(self, value: Value, order: Order) -> Value:
        moved = value._replace(order=order)
        steps = [value.place(axis) for axis in order]
        name = f"{self.graph.name(value.tensor)}/moved"
        if value.tensor in self._arrays:
            return moved._replace(
                tensor=self.constant(name, self._arrays[value.tensor].reshape(value.stored).transpose(steps)).tensor
            )
        if same_bytes(value.shape, value.order, order):
            tensor = self.reshaped(name, value, moved.stored).tensor
            return moved._replace(tensor=tensor)
        steps_value = self.graph.constant(f"{name}/order", np.array(steps, np.int32))
        moved = moved._replace(tensor=self._another(name, value, moved.stored))
        self.graph.operator("TRANSPOSE", [value.tensor, steps_value], [moved.tensor], "TransposeOptions")
        return moved

    def reshaped(self, name: str, value: Value, stored: Shape) -> Value:
        """The stored bytes under another shape; the result counts as lying in ONNX's order."""
        if value.tensor in self._arrays:
            return self.constant(name, self._arrays[value.tensor].reshape(stored))
        form = self.graph.constant(f"{name}/shape", np.array(stored, np.int32))
        tensor = self._another(name, value, stored)
        self.graph.operator("RESHAPE", [value.tensor, form], [tensor], "ReshapeOptions", newShape=list(stored))
        return Value(tensor, stored, plain(len(stored)), value.dtype)

    def _another(self, name: str, value: Value, stored: Shape) -> int:
        """A tensor for the same numbers in another order or shape."""
        tensor = self.graph.tensor(name, stored, value.dtype)
        source = self.graph.name(value.tensor)
        self.same_as[self.graph.name(tensor)] = self.same_as.get(source, source)
        return tensor

    def reshape(self, name: str, value: Value, shape: Shape) -> Value:
        """ONNX's Reshape of a value, made the value of that name."""
        if len(value.shape) > 1 and value.order != plain(len(value.shape)) and value.tensor not in self._arrays:
            self._before[name] = value
        if math.prod(value.shape) != math.prod(shape):
            raise self._node.refused(f"from {list(value.shape)} to {list(shape)}")
        source, order = regrouped(value.shape, value.order, shape)
        value = self.laid(value, source)
        made = Value(-1, shape, order, value.dtype)
        same = made.stored == value.stored
        tensor = value.tensor if same else self.reshaped(name, value, made.stored).tensor
        return self.alias(name, made._replace(tensor=tensor))

    def before_reshape(self, name: str) -> Value | None:
        """What a reshaped value was before, if that lay in another order than ONNX's: who multiplies it by a constant can
        sort the constant instead of the value."""
        return self._before.get(name)

    def transpose(self, name: str, value: Value, perm: Sequence[int]) -> Value:
        """ONNX's Transpose: nothing is written."""
        return self.alias(name, transposed(value, tuple(perm)))

    def alias(self, name: str, value: Value) -> Value:
        """Give a value another name."""
        self._values[name] = value
        return value

    def together(self, *sides: Value) -> list[Value]:
        """Values that are broadcast against each other, all of one rank and in the order of the largest."""
        shapes = [value.shape for value in sides]
        try:
            rank = len(np.broadcast_shapes(*shapes))
        except ValueError as exc:
            raise self._node.refused(f"over shapes {', '.join(map(str, shapes))}") from exc
        values = [widened(value, rank) for value in sides]
        computed = [value for value in values if value.tensor not in self._arrays] or values
        order = max(computed, key=lambda v: (np.prod(v.shape), v.order != plain(rank))).order
        return [self._narrow(value, order) for value in values]

    def _narrow(self, value: Value, order: Order) -> Value:
        """A side of a broadcast in that order; a single element stays the scalar that it is."""
        if len(self.graph.shape(value.tensor)) <= len(order) and np.prod(value.shape) == 1:
            return value._replace(order=order)
        if self.graph.shape(value.tensor) != value.stored:  # was widened
            value = value._replace(
                tensor=self.reshaped(f"{self.graph.name(value.tensor)}/wide", value, value.stored).tensor
            )
        return self.laid(value, order)

    # --- operators ---

    def emit(
        self, name: str, op: str, inputs: Sequence[Value], shape: Shape, options: str = "",
        *, order: Order | None = None, dtype: Any = np.float32, **fields: Any,
    ) -> Value:  # fmt: skip
        """Append an operator with one output; ``name`` is the ONNX value it makes, ``shape`` in ONNX's order."""
        value = Value(-1, shape, plain(len(shape)) if order is None else order, np.dtype(dtype))
        value = value._replace(tensor=self.graph.tensor(name, value.stored, dtype))
        self.graph.operator(op, [i.tensor for i in inputs], [value.tensor], options, **fields)
        return self.alias(name, value)

    def like(self, name: str, op: str, x: Value, *more: Value, options: str = "", **fields: Any) -> Value:
        """:meth:`emit` for an operator that changes neither shape nor type of its first input."""
        return self.emit(name, op, [x, *more], x.shape, options, order=x.order, dtype=x.dtype, **fields)

    def number(self, name: str, number: float, dtype: Any = np.float32) -> Value:
        """A scalar constant."""
        return self.constant(name, np.array(number, dtype))

    def integers(self, name: str, numbers: Sequence[int]) -> Value:
        """A constant list of whole numbers: axes, pads, sizes."""
        return self.constant(name, np.array(numbers, np.int32))

    def _cast(self, name: str, value: Value, dtype: np.dtype[Any]) -> Value:
        return self.emit(name, "CAST", [value], value.shape, "CastOptions", order=value.order, dtype=dtype)

    def cast(self, name: str, value: Value, dtype: np.dtype[Any]) -> Value:
        """The value in another type."""
        return self.alias(name, value) if value.dtype == dtype else self._cast(name, value, dtype)

    def activation(self, node: Node) -> tuple[int, str]:
        """(fused activation, name of the value that then comes out) for an operator that can take one in."""
        name = node.output
        users = self._users.get(name, [])
        if len(users) == 1 and name not in self._source.outputs and node.made[name].dtype == FLOAT:
            kind = relu_kind(users[0])
            if kind is not None:
                self._fused.add(users[0].output)
                self._becomes[name] = users[0].output
                if kind != ACTIVATION.RELU_N1_TO_1:
                    self.mark_positive(users[0].output)
                return kind, users[0].output
        return ACTIVATION.NONE, name

    def mark_positive(self, name: str) -> None:
        """Note that nothing in a value is below zero."""
        self._positive.add(name)

    def is_positive(self, name: str) -> bool:
        """Whether nothing in a value is known to be below zero."""
        return name in self._positive


def bounds(node: Node) -> tuple[float | None, float | None]:
    """Of a Clip: by attributes in older operator sets, by inputs in newer ones.

    Raises:
        Refused: a computed bound.
    """
    return node.number("min", 1), node.number("max", 2)


def relu_kind(node: Node) -> int | None:
    """The fused activation that a node amounts to."""
    if node.op == "Relu":
        return int(ACTIVATION.RELU)
    if node.op == "Clip" and all(node.values[i] is not None for i in (1, 2) if node.has(i)):
        kinds = {(0.0, 6.0): ACTIVATION.RELU6, (-1.0, 1.0): ACTIVATION.RELU_N1_TO_1}
        low, high = bounds(node)
        if low == 0.0 and high in (None, float("inf"), float(np.finfo(np.float32).max)):
            return int(ACTIVATION.RELU)
        found = kinds.get((low, high)) if low is not None and high is not None else None
        return None if found is None else int(found)
    return None
