"""Stage 2, compile: assembling a .tflite file. Receives tensors and operators, hands on the flatbuffer's bytes.

A thin layer over the schema's generated classes (TensorFlow Lite schema version 3), which come with LiteRT.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

Array = npt.NDArray[Any]

TENSOR_TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int64): schema.TensorType.INT64,
    np.dtype(np.bool_): schema.TensorType.BOOL,
}


class Graph:
    """One subgraph with its tensors, operators, and a signature that carries the served names."""

    def __init__(self) -> None:
        self._subgraph = schema.SubGraphT()
        self._subgraph.tensors, self._subgraph.operators = [], []
        self._buffers = [schema.BufferT()]  # buffer 0 is the empty one, by convention
        self.whole: list[str] = []  # names of computed tensors that are not float
        self._codes: dict[int, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> int:
        """A tensor that an operator or the caller fills; returns its index."""
        if np.dtype(dtype) != np.float32:
            self.whole.append(name)
        return self._add(name, shape, np.dtype(dtype), 0)

    def name(self, tensor: int) -> str:
        """The name of a tensor by its index."""
        return str(self._subgraph.tensors[tensor].name)

    def constant(self, name: str, values: Array) -> int:
        """A tensor with fixed values; equal ones are stored once."""
        values = np.ascontiguousarray(values)
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            self._buffers.append(buffer)
            self._constants[key] = self._add(name, values.shape, values.dtype, len(self._buffers) - 1)
        return self._constants[key]

    def operator(self, op: str, inputs: list[int], outputs: list[int], options: str = "", **fields: Any) -> None:
        """Append an operator.

        Args:
            op: the schema's name, such as ``CONV_2D``.
            options: the schema's options table, such as ``Conv2DOptions``; ``fields`` are its fields.
        """
        operator = schema.OperatorT()
        code = getattr(schema.BuiltinOperator, op)
        operator.opcodeIndex = self._codes.setdefault(code, len(self._codes))
        operator.inputs, operator.outputs = inputs, outputs
        if options:
            table = getattr(schema, options + "T")()
            for field, value in fields.items():
                if not hasattr(table, field):
                    raise AttributeError(f"{options} has no {field}")
                setattr(table, field, value)
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = table
        self._subgraph.operators.append(operator)

    def finish(self, inputs: dict[str, int], outputs: dict[str, int]) -> bytes:
        """The file's bytes; names become the signature ``serving_default``."""
        self._subgraph.inputs, self._subgraph.outputs = list(inputs.values()), list(outputs.values())
        self._subgraph.name = "main"
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [_entry(name, index) for name, index in inputs.items()]
        signature.outputs = [_entry(name, index) for name, index in outputs.items()]
        model = schema.ModelT()
        model.version, model.description = 3, "edgefleet"
        model.subgraphs, model.buffers, model.signatureDefs = [self._subgraph], self._buffers, [signature]
        model.operatorCodes = [_code(code) for code in self._codes]
        builder = flatbuffers.Builder(sum(len(b.data) for b in self._buffers if b.data is not None) + 65536)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _add(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], buffer: int) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), TENSOR_TYPES[dtype], buffer
        self._subgraph.tensors.append(tensor)
        return len(self._subgraph.tensors) - 1


def _entry(name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry


def _code(code: int) -> Any:
    entry = schema.OperatorCodeT()
    # Codes above 127 live in the new field only; readers older than 2020 look at the old one (schema.fbs).
    entry.deprecatedBuiltinCode, entry.builtinCode, entry.version = min(code, 127), code, 1
    return entry
