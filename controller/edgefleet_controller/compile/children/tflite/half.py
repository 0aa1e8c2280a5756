"""Stage 2, compile: float weights of a .tflite in half precision. Receives a file's bytes, hands on the same network with smaller constants.

The weights of products become float16 with a DEQUANTIZE behind them, TensorFlow's own form of a float16 model: kernels and XNNPACK take the float values
out of it once, when the file is loaded. Nothing is computed in float16. Which weights may be so is told by :mod:`.half`.
Source: TensorFlow Lite, "Post-training float16 quantization", and ``op_version.cc`` for DEQUANTIZE.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ..half import in_half
from .file import packed, unpacked

_CODES, _TYPES = schema.BuiltinOperator, schema.TensorType
PRODUCTS = frozenset({_CODES.CONV_2D, _CODES.DEPTHWISE_CONV_2D, _CODES.FULLY_CONNECTED, _CODES.TRANSPOSE_CONV})
WEIGHT = 1  # which of their inputs
FROM_HALF = 3  # DEQUANTIZE's version that takes float16


def halved(content: bytes) -> bytes:
    """The file with its large float weights in half precision; inputs and outputs are the same."""
    model = unpacked(schema, content)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    for subgraph in model.subgraphs:
        weights = {
            int(operator.inputs[WEIGHT]) for operator in subgraph.operators if codes[operator.opcodeIndex] in PRODUCTS
        }
        _halve(model, subgraph, sorted(weights))
    return packed(model)


def _halve(model: Any, subgraph: Any, weights: list[int]) -> None:
    dequantizers = []
    for index in weights:
        tensor = subgraph.tensors[index]
        buffer = model.buffers[tensor.buffer]
        shared = sum(one.buffer == tensor.buffer for sub in model.subgraphs for one in sub.tensors) > 1
        if tensor.type != _TYPES.FLOAT32 or tensor.sparsity is not None or buffer.data is None or shared:
            continue
        value = np.frombuffer(np.ascontiguousarray(buffer.data, np.uint8).tobytes(), "<f4").reshape(tensor.shape)
        half = in_half(value, channels=(0, -1))  # a depthwise convolution's are the last axis, all others' the first
        if half is None:
            continue
        stored = schema.TensorT()
        stored.name = tensor.name + b"/half"
        stored.shape, stored.type, stored.buffer = tensor.shape, _TYPES.FLOAT16, tensor.buffer
        buffer.data = np.frombuffer(half.astype("<f2").tobytes(), np.uint8)
        tensor.buffer = 0  # the empty one, by the schema
        dequantize = schema.OperatorT()
        dequantize.opcodeIndex = _from_half(model)
        dequantize.inputs, dequantize.outputs = [len(subgraph.tensors)], [index]
        subgraph.tensors.append(stored)
        dequantizers.append(dequantize)
    subgraph.operators = [*dequantizers, *subgraph.operators]


def _from_half(model: Any) -> int:
    """Where the file names the operator; files before knew only that of int8."""
    for number, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == _CODES.DEQUANTIZE and code.version >= FROM_HALF:
            return number
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = _CODES.DEQUANTIZE
    code.version = FROM_HALF
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
