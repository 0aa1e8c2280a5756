"""Stage 2, compile: matrix products in one form. Receives a network, hands it on with every Gemm as other converters expect it.

pnnx makes ncnn's InnerProduct, and qonnx turns a flattened picture's axes, in this form only.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from .measure import Array


def with_plain_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every Gemm over constants in one form: weights as rows (transB), a flat bias."""
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type != "Gemm" or node.input[1] not in constants:
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        if not transposed:
            kept = [a for a in node.attribute if a.name != "transB"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("transB", 1)])
            node.input[1] = _constant(model, f"{node.output[0]}/weight", weight.T)
        if len(node.input) > 2 and node.input[2] in constants and len(constants[node.input[2]].dims) == 2:
            bias = numpy_helper.to_array(constants[node.input[2]]).reshape(-1)
            node.input[2] = _constant(model, f"{node.output[0]}/bias", bias)
    return model


def _constant(model: onnx.ModelProto, name: str, value: Array) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name
