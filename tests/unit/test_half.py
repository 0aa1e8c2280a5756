"""Weights in half precision: half the bytes, the same arithmetic, and nothing that float16 can't hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children.half import halve
from onnx import TensorProto, helper, numpy_helper
from support.networks import Net

RNG = np.random.default_rng(3)
PICTURE = RNG.normal(size=(1, 3, 32, 32)).astype(np.float32)


def network() -> onnx.ModelProto:
    net = Net(4)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 64)
    net.add("GlobalAveragePool")
    return net.model([1, 64, 1, 1])


def affine(weight: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """y = x + weight."""
    shape = list(weight.shape)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], name="add")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def answer(model: onnx.ModelProto, optimized: Path | None = None, **feeds: np.ndarray[Any, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_it_answers_alike_in_half_the_bytes_and_computes_in_float(tmp_path: Path) -> None:
    whole, half = network(), halve(network())
    onnx.checker.check_model(half)
    assert half.ByteSize() < 0.55 * whole.ByteSize()
    have, want = answer(half, tmp_path / "o.onnx", image=PICTURE), answer(whole, image=PICTURE)
    np.testing.assert_allclose(have, want, atol=2e-3 * np.abs(want).max())
    loaded = onnx.load(tmp_path / "o.onnx")
    assert "Cast" not in {node.op_type for node in loaded.graph.node}
    assert {i.data_type for i in loaded.graph.initializer} == {TensorProto.FLOAT}


def test_what_came_in_is_not_changed() -> None:
    model = network()
    before = model.SerializeToString()
    halve(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("beyond the largest", np.full(512, 1e5, np.float32)),
        ("below the smallest", np.full(512, 1e-9, np.float32)),
        ("one of both", np.r_[np.ones(511), 7e4].astype(np.float32)),
        ("not a number", np.r_[np.ones(511), np.nan].astype(np.float32)),
        ("infinite", np.r_[np.ones(511), np.inf].astype(np.float32)),
        ("few", np.ones(255, np.float32)),
    ],
)
def test_a_constant_that_half_precision_can_not_hold_or_would_not_pay_for_stays(
    name: str, weight: np.ndarray[Any, Any]
) -> None:
    (constant,) = halve(affine(weight)).graph.initializer
    assert constant.data_type == TensorProto.FLOAT, name
    np.testing.assert_array_equal(numpy_helper.to_array(constant), weight)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("share", "held"), [(1e-4, TensorProto.FLOAT), (1e-2, TensorProto.FLOAT16), (1e-7, TensorProto.FLOAT16)]
)
def test_one_faint_channel_keeps_a_weight_in_full_unless_it_is_dead(axis: int, share: float, held: int) -> None:
    weight = RNG.normal(size=(32, 32), scale=0.01).astype(np.float32)
    np.moveaxis(weight, axis, 0)[5] *= share
    (constant,) = halve(affine(weight)).graph.initializer
    assert constant.data_type == held


def test_zeros_are_held_exactly() -> None:
    model = halve(affine(np.zeros(512, np.float32)))
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT16
    assert answer(model, x=np.ones(512, np.float32)).tolist() == [1.0] * 512


def test_scales_of_int8_stay_exact() -> None:
    scale = RNG.uniform(1e-3, 2e-3, 512).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["x", "scale"], ["y"], name="d", axis=0)], "g",
        [helper.make_tensor_value_info("x", TensorProto.INT8, [512])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [512])],
        [numpy_helper.from_array(scale, "scale")],
    )  # fmt: skip
    (kept,) = halve(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(kept), scale)
