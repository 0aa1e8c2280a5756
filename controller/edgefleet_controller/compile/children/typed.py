"""Stage 2, compile: what a network's values are. Receives a simplified network, hands on the same with every value's type in it.

ONNX infers nothing for operators that are not its own, nor for what comes behind them: int8 would pass all of that by. onnxruntime, which has such operators,
knows what they make.
"""

from __future__ import annotations

import onnx
import onnxruntime
from onnx import TensorProto, helper

# onnxruntime's name of a tensor's type -> ONNX's.
_TYPES = {
    "tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16, "tensor(double)": TensorProto.DOUBLE, "tensor(bool)": TensorProto.BOOL,
    "tensor(uint8)": TensorProto.UINT8, "tensor(int8)": TensorProto.INT8, "tensor(int32)": TensorProto.INT32, "tensor(int64)": TensorProto.INT64,
}  # fmt: skip


def write_types(path: str) -> None:
    """Change a network's file, in place."""
    model = onnx.load(path)
    untold = _untold(model)
    if not untold:
        return
    watch = onnx.ModelProto()
    watch.CopyFrom(model)
    watch.graph.output.extend(onnx.ValueInfoProto(name=name) for name in untold)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watch.SerializeToString(), options, providers=["CPUExecutionProvider"])
    model.graph.value_info.extend(
        helper.make_tensor_value_info(told.name, _TYPES[told.type], told.shape)
        for told in session.get_outputs()
        if told.name in untold and told.type in _TYPES
    )
    onnx.save(model, path)


def _untold(model: onnx.ModelProto) -> set[str]:
    """The values of whose type neither the network nor ONNX's inference tells anything."""
    inferred = onnx.shape_inference.infer_shapes(model)
    told = {
        value.name for value in (*inferred.graph.value_info, *inferred.graph.output) if value.type.WhichOneof("value")
    }
    return {name for node in model.graph.node for name in node.output if name} - told
