"""Stage 2, compile: walking an ONNX graph while a .tflite is written. Receives the graph and emitters for its operators.

ONNX keeps pictures as N x C x H x W, TFLite computes on N x H x W x C. Every four-dimensional value is held in TFLite's
order for as long as the operators allow; inputs and outputs keep ONNX's names, order and shape, so a model is served alike
by every engine. The operators themselves are in :mod:`.onnx_to_tflite`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import helper, numpy_helper

from . import job
from .tflite_graph import Array, Graph

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
ACTIVATION = schema.ActivationFunctionType


Emit = Callable[["Writer", onnx.NodeProto], None]  # appends what one ONNX node amounts to


class Value(NamedTuple):
    """A tensor under way: its index in the file, its shape as ONNX sees it, and whether it lies as N x H x W x C."""

    tensor: int
    shape: tuple[int, ...]
    nhwc: bool
    dtype: Any = np.float32

    @property
    def stored(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in TO_NHWC) if self.nhwc else self.shape


class Writer:
    """Walks the graph once, in its (topological) order."""

    def __init__(self, model: onnx.ModelProto, operators: Mapping[str, Emit]) -> None:
        self.graph = Graph()
        self._operators = operators
        self._onnx = model.graph
        self._values: dict[str, Value] = {}
        self._constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self._moved: dict[tuple[int, bool], Value] = {}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        self._results = {output.name for output in model.graph.output}
        self._fused: set[str] = set()
        self.same_as: dict[str, str] = {}  # tensors of the file alone -> the ONNX value whose numbers they hold
        self.made: dict[str, str] = {}  # node -> the tensor that comes out, after what is fused into it
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def write(self) -> bytes:
        inputs: dict[str, int] = {}
        for given in self._onnx.input:
            if given.name in self._constants:
                continue
            kind = given.type.tensor_type
            shape = tuple(d.dim_value for d in kind.shape.dim)
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            inputs[given.name] = self.graph.tensor(given.name, shape, dtype)
            self._values[given.name] = Value(inputs[given.name], shape, False, dtype)
        for node in self._onnx.node:
            if node.output[0] in self._fused:
                continue
            emit = self._operators.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
            if emit is None:
                raise refused(node, "")
            emit(self, node)
        outputs = {}
        for result in self._onnx.output:
            value = self.plain(result.name)
            # The served name belongs to a tensor of its own, and an output may not also be an input.
            index = self.graph.tensor(result.name, value.shape, value.dtype)
            form = self.graph.constant(f"{result.name}/shape", np.array(value.shape, np.int32))
            self.graph.operator("RESHAPE", [value.tensor, form], [index], "ReshapeOptions", newShape=list(value.shape))
            outputs[result.name] = index
        return self.graph.finish(inputs, outputs)

    # --- values ---

    def constant(self, name: str) -> Array | None:
        """The values of an initializer; ``None`` for what is computed."""
        return self._constants.get(name)

    def fixed(self, node: onnx.NodeProto, position: int) -> Array:
        """An input that has to be an initializer."""
        values = self.constant(node.input[position])
        if values is None:
            raise refused(node, f"with a computed input {node.input[position]!r}")
        return values

    def optional(self, node: onnx.NodeProto, position: int) -> Array | None:
        return self.fixed(node, position) if len(node.input) > position and node.input[position] else None

    def value(self, name: str) -> Value:
        """A value as it lies; initializers become tensors on first use, in ONNX's order."""
        if name not in self._values:
            array = self._constants[name]
            array = array.astype(np.int32) if array.dtype == np.int64 else array
            self._values[name] = Value(self.graph.constant(name, array), tuple(array.shape), False, array.dtype)
        return self._values[name]

    def plain(self, name: str) -> Value:
        """A value in ONNX's order."""
        return self._in_order(self.value(name), False)

    def picture(self, name: str) -> Value:
        """A four-dimensional value as N x H x W x C."""
        return self._in_order(self.value(name), True)

    def _in_order(self, value: Value, nhwc: bool) -> Value:
        if value.nhwc == nhwc:
            return value
        key = (value.tensor, nhwc)
        if key not in self._moved:
            moved = Value(-1, value.shape, nhwc, value.dtype)
            name = f"t{value.tensor}/{'nhwc' if nhwc else 'nchw'}"
            index = self.graph.tensor(name, moved.stored, value.dtype)
            source = self.graph.name(value.tensor)
            self.same_as[name] = self.same_as.get(source, source)
            _, c, h, w = value.shape
            if c == 1 or h * w == 1:  # the same bytes in either order
                shape = self.graph.constant(f"t{value.tensor}/shape", np.array(moved.stored, np.int32))
                self.graph.operator(
                    "RESHAPE", [value.tensor, shape], [index], "ReshapeOptions", newShape=list(moved.stored)
                )
            else:
                order = self.graph.constant(f"order/{nhwc}", np.array(TO_NHWC if nhwc else TO_NCHW, np.int32))
                self.graph.operator("TRANSPOSE", [value.tensor, order], [index], "TransposeOptions")
            self._moved[key] = moved._replace(tensor=index)
        return self._moved[key]

    def emit(
        self, name: str, op: str, inputs: list[int], shape: tuple[int, ...], options: str = "",
        *, nhwc: bool = False, dtype: Any = np.float32, **fields: Any,
    ) -> Value:  # fmt: skip
        """Append an operator with one output; ``name`` is the ONNX value it makes, ``shape`` in ONNX's order."""
        value = Value(-1, shape, nhwc, dtype)
        own = name
        if name in self._results:
            own = f"{name}/out"
            self.same_as[own] = name
        value = value._replace(tensor=self.graph.tensor(own, value.stored, dtype))
        self.graph.operator(op, inputs, [value.tensor], options, **fields)
        self._values[name] = value
        return value

    def alias(self, name: str, value: Value) -> None:
        self._values[name] = value

    def shape(self, name: str) -> tuple[int, ...]:
        return self._values[name].shape if name in self._values else tuple(self._constants[name].shape)

    def activation(self, node: onnx.NodeProto) -> tuple[int, str]:
        """(fused activation, name of the value that then comes out) for an operator that can take one in."""
        name = node.output[0]
        users = self._users.get(name, [])
        if len(users) == 1 and name not in self._results:
            kind = relu_kind(self, users[0])
            if kind is not None:
                self._fused.add(users[0].output[0])
                self.made[node.name] = users[0].output[0]
                return kind, users[0].output[0]
        return ACTIVATION.NONE, name


def refused(node: onnx.NodeProto, why: str) -> job.Refused:
    kind = f"{node.domain}.{node.op_type}" if node.domain not in {"", "ai.onnx"} else node.op_type
    return job.Refused(
        "bad_model", f"tflite has no operator {kind}{' ' + why if why else ''} (node {node.name or node.output[0]!r})"
    )  # fmt: skip


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def relu_kind(writer: Writer, node: onnx.NodeProto) -> int | None:
    """The fused activation that a node amounts to."""
    if node.op_type == "Relu":
        return int(ACTIVATION.RELU)
    if node.op_type == "Clip" and len(node.input) == 3:
        low, high = writer.constant(node.input[1]), writer.constant(node.input[2])
        if low is not None and high is not None and (low.item(), high.item()) == (0.0, 6.0):
            return int(ACTIVATION.RELU6)
    return None
