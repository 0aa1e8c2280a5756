"""The ONNX-to-TFLite converter against onnxruntime: every operator of its table over its attributes, and what it refuses."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from edgefleet_controller.compile.children.onnx_to_tflite import OPERATORS, convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.onnx_cases import CASES, Draw, model_of

# What the layout and the types at the edges may add to what an operator makes.
ALWAYS = {"RESHAPE", "TRANSPOSE", "CAST"}
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


def assert_alike(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, wanted in want.items():
        assert got[name].shape == wanted.shape
        assert got[name].dtype == wanted.dtype
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(got[name], wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))
        else:
            np.testing.assert_array_equal(got[name], wanted)


def test_every_row_of_the_table_has_cases_here() -> None:
    assert set(OPERATORS) - set(CASES) == {"Swish"}  # onnxruntime 1.32 has none to compare with


@pytest.mark.parametrize("op", sorted(CASES))
@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_operator_answers_as_onnxruntime_does(op: str, data: Any) -> None:
    draw = Draw(data)
    model, feeds = model_of(CASES[op](draw), draw)
    content = convert(model).content
    assert_alike(tflite_answers(content, feeds), onnx_answers(model, feeds))
    assert set(operators_of(content)) <= {*OPERATORS[op].makes, *ALWAYS}
