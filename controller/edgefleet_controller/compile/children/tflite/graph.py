"""Stage 2, compile: assembling a .tflite file. Receives tensors and operators, hands on the flatbuffer's bytes.

A thin layer over the schema's generated classes (TensorFlow Lite schema version 3), which come with LiteRT. Operators and tensors
that no output needs are left out of the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from .file import packed

Array = npt.NDArray[Any]

TENSOR_TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int64): schema.TensorType.INT64,
    np.dtype(np.uint8): schema.TensorType.UINT8,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.bool_): schema.TensorType.BOOL,
}


_VERSIONS = {schema.BuiltinOperator.BROADCAST_TO: 2}  # kernels register no version 1 of it
# tflite-runtime 2.14 has no int8 kernels for them, and a root or a quotient in 8 bits ruins the normalisations they are in.
FLOAT_ONLY = frozenset({schema.BuiltinOperator.SQRT, schema.BuiltinOperator.DIV})
_ARITHMETIC = frozenset({schema.BuiltinOperator.ADD, schema.BuiltinOperator.SUB, schema.BuiltinOperator.MUL})
MAX_INT8_RANK = 4  # of arithmetic: tflite-runtime 2.14 ends the process beyond


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: Array | None


class _Operator(NamedTuple):
    code: int
    inputs: list[int]
    outputs: list[int]
    options: str
    fields: dict[str, Any]


class Graph:
    """One subgraph with its tensors, operators, and a signature that carries the served names."""

    def __init__(self) -> None:
        self._tensors: list[_Tensor] = []
        self._operators: list[_Operator] = []
        self._names: set[str] = set()
        self._left: set[int] = set()
        self._constants: dict[tuple[str, str, tuple[int, ...], bytes], int] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> int:
        """A tensor that an operator or the caller fills; returns its index. A name that is taken gets a suffix."""
        return self._add(_Tensor(name, shape, np.dtype(dtype), None))

    def constant(self, name: str, values: Array) -> int:
        """A tensor with fixed values; equal whole numbers are stored once, floats once for each name: they get scales by use."""
        values = np.asarray(values, order="C")  # not ascontiguousarray, which makes a scalar a list
        key = (name if values.dtype.kind == "f" else "", values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = self._add(_Tensor(name, values.shape, values.dtype, values))
        return self._constants[key]

    def operator(self, op: str, inputs: list[int], outputs: list[int], options: str = "", **fields: Any) -> None:
        """Append an operator.

        Args:
            op: the schema's name, such as ``CONV_2D``.
            options: the schema's options table, such as ``Conv2DOptions``; ``fields`` are its fields.
        """
        self._operators.append(_Operator(getattr(schema.BuiltinOperator, op), inputs, outputs, options, fields))

    def leave(self, tensors: Iterable[int]) -> None:
        """Note that whatever makes these is ruined by 8 bits."""
        self._left.update(tensors)

    @property
    def size(self) -> int:
        """How many tensors there are so far."""
        return len(self._tensors)

    def name(self, tensor: int) -> str:
        """A tensor's name in the file."""
        return self._tensors[tensor].name

    def shape(self, tensor: int) -> tuple[int, ...]:
        """A tensor's shape in the file."""
        return self._tensors[tensor].shape

    def finish(self, inputs: dict[str, int], outputs: dict[str, int]) -> tuple[bytes, list[str]]:
        """The file's bytes, and the names of computed tensors that a quantizer must leave whole: those that are not float, and those
        of operators that older runtimes or the quantizer have no int8 for. Inputs' and outputs' names become ``serving_default``'s.
        """
        operators = self._needed(outputs)
        used = sorted({*inputs.values(), *outputs.values(), *(t for o in operators for t in (*o.inputs, *o.outputs))})
        index = {tensor: place for place, tensor in enumerate(used)}
        codes = {code: place for place, code in enumerate(dict.fromkeys(o.code for o in operators))}
        buffers = [schema.BufferT()]  # buffer 0 is the empty one, by convention
        subgraph = schema.SubGraphT()
        subgraph.name = "main"
        subgraph.tensors = [_tensor(self._tensors[tensor], buffers) for tensor in used]
        subgraph.operators = [_operator(operator, codes, index) for operator in operators]
        subgraph.inputs, subgraph.outputs = [index[i] for i in inputs.values()], [index[o] for o in outputs.values()]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [_entry(name, index[tensor]) for name, tensor in inputs.items()]
        signature.outputs = [_entry(name, index[tensor]) for name, tensor in outputs.items()]
        model = schema.ModelT()
        model.version, model.description = 3, "edgefleet"
        model.subgraphs, model.buffers, model.signatureDefs = [subgraph], buffers, [signature]
        model.operatorCodes = [_code(code) for code in codes]
        return packed(model), self._whole(used, operators)

    def _whole(self, used: list[int], operators: list[_Operator]) -> list[str]:
        kept = self._left | {tensor for o in operators if self._float_only(o) for tensor in o.outputs}
        computed = (tensor for tensor in used if self._tensors[tensor].values is None)
        return [self.name(t) for t in computed if t in kept or self._tensors[t].dtype != np.float32]

    def _float_only(self, operator: _Operator) -> bool:
        if operator.code == schema.BuiltinOperator.BATCH_MATMUL:
            # ai-edge-quantizer 0.10 makes zeros of a constant side
            return any(self._tensors[tensor].values is not None for tensor in operator.inputs)
        if operator.code in _ARITHMETIC:
            return any(len(self._tensors[tensor].shape) > MAX_INT8_RANK for tensor in operator.outputs)
        return operator.code in FLOAT_ONLY

    def _needed(self, outputs: dict[str, int]) -> list[_Operator]:
        wanted, kept = set(outputs.values()), []
        for operator in reversed(self._operators):
            if wanted & set(operator.outputs):
                wanted |= set(operator.inputs)
                kept.append(operator)
        return kept[::-1]

    def _add(self, tensor: _Tensor) -> int:
        name = tensor.name
        while name in self._names:  # the quantizer knows tensors by name
            name += "_"
        self._names.add(name)
        self._tensors.append(tensor._replace(name=name))
        return len(self._tensors) - 1


def _tensor(given: _Tensor, buffers: list[Any]) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = given.name, list(given.shape), TENSOR_TYPES[given.dtype], 0
    if given.values is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(given.values.tobytes(), np.uint8)
        buffers.append(buffer)
        tensor.buffer = len(buffers) - 1
    return tensor


def _operator(given: _Operator, codes: dict[int, int], index: dict[int, int]) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex = codes[given.code]
    operator.inputs, operator.outputs = [index[i] for i in given.inputs], [index[o] for o in given.outputs]
    if given.options:
        table = getattr(schema, given.options + "T")()
        for name, value in given.fields.items():
            if not hasattr(table, name):
                raise AttributeError(f"{given.options} has no {name}")
            setattr(table, name, value)
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, given.options)
        operator.builtinOptions = table
    return operator


def _entry(name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry


def _code(code: int) -> Any:
    entry = schema.OperatorCodeT()
    # Codes above 127 live in the new field only; readers older than 2020 look at the old one (schema.fbs).
    entry.deprecatedBuiltinCode, entry.builtinCode, entry.version = min(code, 127), code, _VERSIONS.get(code, 1)
    return entry
