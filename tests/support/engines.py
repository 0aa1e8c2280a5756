"""The same question to onnxruntime and to LiteRT, and what a .tflite consists of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

_OPERATOR_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}


def onnx_answers(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def tflite_answers(content: bytes, feeds: dict[str, Any]) -> dict[str, Any]:
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    run = interpreter.get_signature_runner("serving_default")
    return {name: np.array(value) for name, value in run(**feeds).items()}


def operators_of(content: bytes) -> Counter[str]:
    """The operators of a .tflite, counted."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    codes = [_OPERATOR_NAMES[code.builtinCode] for code in model.operatorCodes]
    return Counter(codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators)


def types_by_operator(content: bytes) -> dict[str, set[str]]:
    """For each kind of operator of a .tflite, the types that its operators make."""
    names = {code: name for name, code in vars(schema.TensorType).items() if isinstance(code, int)}
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    found: dict[str, set[str]] = {}
    for operator in graph.operators:
        kind = _OPERATOR_NAMES[model.operatorCodes[operator.opcodeIndex].builtinCode]
        found.setdefault(kind, set()).update(names[graph.tensors[made].type] for made in operator.outputs)
    return found


def misaligned(content: bytes) -> dict[str, int]:
    """Where in a .tflite the constants begin that do not begin at a multiple of 16 bytes, by tensor. As schema.fbs asks, and Arm's kernels."""
    model = schema.Model.GetRootAs(content, 0)
    graph = model.Subgraphs(0)
    found, seen = {}, 0
    for number in range(graph.TensorsLength()):
        tensor = graph.Tensors(number)
        table = model.Buffers(tensor.Buffer())._tab
        field = table.Offset(4)  # the vtable's place of ``data``
        if not field:
            continue
        seen += 1
        place = table.Vector(field)
        if place % 16:
            found[tensor.Name().decode()] = place
    assert seen, "no tensor has a constant"
    return found


def assert_alike(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, wanted in want.items():
        assert got[name].shape == wanted.shape
        assert got[name].dtype == wanted.dtype
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(got[name], wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))
        else:
            np.testing.assert_array_equal(got[name], wanted)
