"""Networks that came quantized are read as the floats that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.source import dequantized
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from support.networks import SIDE, Net, classifier

Pictures = np.ndarray[Any, np.dtype[np.float32]]


def pictures(count: int, seed: int = 0) -> Pictures:
    return np.random.default_rng(seed).normal(size=(count, 1, 3, SIDE, SIDE)).astype(np.float32)


class Fed(CalibrationDataReader):
    def __init__(self, samples: Pictures) -> None:
        self._left = iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        sample = next(self._left, None)
        return None if sample is None else {"image": sample}


def answers(model: onnx.ModelProto, samples: Pictures) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As QDQ says: this processor's own int8 kernels may saturate.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.stack([session.run(None, {name: sample})[0] for sample in samples])


def noise(want: Any, have: Any) -> float:
    return float(np.sum((want - have) ** 2) / np.sum(want**2))


def quantized(folder: Path, model: onnx.ModelProto, **how: Any) -> onnx.ModelProto:
    """As onnxruntime's quantizer makes it, which takes activations away."""
    onnx.save(model, folder / "float.onnx")
    given = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8} | how
    quantize_static(folder / "float.onnx", folder / "int8.onnx", Fed(pictures(16)), **given)
    return onnx.load(folder / "int8.onnx")


@pytest.mark.parametrize(
    "how",
    [
        {"quant_format": QuantFormat.QDQ},
        {"quant_format": QuantFormat.QDQ, "per_channel": True},
        {"quant_format": QuantFormat.QOperator},
        {"quant_format": QuantFormat.QOperator, "per_channel": True},
        {"quant_format": QuantFormat.QDQ, "extra_options": {"ActivationSymmetric": True}, "activation_type": QuantType.QInt8},
    ],
)  # fmt: skip
def test_a_network_in_int8_becomes_one_in_float_that_answers_as_it_did_before(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    source = classifier()
    model = quantized(tmp_path, source, **how)
    samples = pictures(16, 1)
    rounded = answers(model, samples)
    assert dequantized.in_floats(model)
    onnx.checker.check_model(model, full_check=True)
    left = {node.op_type for node in model.graph.node}
    assert not left & {*dequantized.ROUNDINGS, *dequantized.OF_INTEGERS}
    assert {node.domain for node in model.graph.node} == {""}
    want, have = answers(source, samples), answers(model, samples)
    assert noise(want, have) < noise(want, rounded)
    assert noise(rounded, have) < 0.01


def test_weights_alone_in_int8_become_floats(tmp_path: Path) -> None:
    source = classifier()
    onnx.save(source, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
    model = onnx.load(tmp_path / "int8.onnx")
    assert "DynamicQuantizeLinear" in {node.op_type for node in model.graph.node}
    assert dequantized.in_floats(model)
    assert not {node.op_type for node in model.graph.node} & {*dequantized.ROUNDINGS, *dequantized.OF_INTEGERS}
    samples = pictures(8, 1)
    assert noise(answers(source, samples), answers(model, samples)) < 1e-3


def rounding(net: Net, scale: float, zero: Any, name: str = "") -> None:
    """A value rounded, and moved on as integers."""
    scales, zeros = net.constant(np.float32(scale)), net.constant(zero)
    net.add("QuantizeLinear", scales, zeros)
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("DequantizeLinear", scales, zeros)


def test_where_a_rounding_ends_its_floats_end_too() -> None:
    net = Net()
    net.conv(3, 8)
    rounding(net, 0.01, np.int8(-28))
    model = net.model([1, 8, SIDE // 2, SIDE // 2])
    samples = pictures(4)
    want = answers(model, samples)
    assert (want.min(), want.max()) == pytest.approx((-1.0, 1.55))
    assert dequantized.in_floats(model)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Clip", "MaxPool", "Identity", "Identity"]
    have = answers(model, samples)
    assert np.abs(want - have).max() <= 0.005 + 1e-6
    assert have.max() == pytest.approx(1.55)


def test_channels_end_where_each_of_them_did() -> None:
    net = Net()
    net.conv(3, 4)
    scales = net.constant(np.array([0.005, 0.01, 0.015, 0.02], np.float32))
    zeros = net.constant(np.array([128, 0, 255, 100], np.uint8))
    net.add("QuantizeLinear", scales, zeros, axis=1)
    net.add("DequantizeLinear", scales, zeros, axis=1)
    model = onnx.shape_inference.infer_shapes(net.model([1, 4, SIDE, SIDE]))
    samples = pictures(4)
    want = answers(model, samples)
    assert dequantized.in_floats(model)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Max", "Min", "Identity", "Identity"]
    assert np.abs(want - answers(model, samples)).max() <= 0.01 + 1e-6


def test_limits_of_activations_are_found_again_and_what_can_not_reach_an_end_gets_none() -> None:
    net = Net()
    net.conv(3, 8)
    rounding(net, 6 / 255 * 1.001, np.uint8(0))
    net.conv(8, 8)
    net.add("Sigmoid")
    rounding(net, 1 / 256, np.uint8(0))
    model = net.model([1, 8, SIDE // 4, SIDE // 4])
    assert dequantized.in_floats(model)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert [[float(constants[name]) for name in clip.input[1:]] for clip in clips] == [[0.0, 6.0]]


@pytest.mark.parametrize("op", ["Concat", "Add", "Resize", "Relu"])
def test_what_is_made_of_values_that_end_gets_no_end_of_its_own_unless_it_is_a_nearer_one(op: str) -> None:
    def clips(scale: float) -> int:
        net = Net()
        net.conv(3, 8)
        rounding(net, 0.01, np.int8(-28))
        if op == "Resize":
            roi, sides = net.constant(np.zeros(0, np.float32)), net.constant(np.array([1, 1, 2, 2], np.float32))
            net.add(op, roi, sides, mode="linear")
        else:
            net.add(op, *[net.last] * (op in ("Concat", "Add")), **({"axis": 1} if op == "Concat" else {}))
        rounding(net, scale, np.int8(-28))
        model = net.model([1, None, None, None])
        samples = pictures(2)
        want = answers(model, samples)
        assert dequantized.in_floats(model)
        assert np.abs(want - answers(model, samples)).max() <= 2.1 * max(scale, 0.01)
        return sum(node.op_type == "Clip" for node in model.graph.node)

    assert (clips(0.021), clips(0.005)) == (1, 2)


def test_an_input_and_an_output_of_integers_stay_these() -> None:
    integer, scale, zero = TensorProto.UINT8, "scale", "zero"
    nodes = [
        helper.make_node("DequantizeLinear", ["image", scale, zero], ["read"]),
        helper.make_node("Relu", ["read"], ["active"]),
        helper.make_node("QuantizeLinear", ["active", scale, zero], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("image", integer, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("scores", integer, [1, 3, SIDE, SIDE])],
        [helper.make_tensor(scale, TensorProto.FLOAT, [], [0.5]), helper.make_tensor(zero, integer, [], [100])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    sample = np.random.default_rng(0).integers(0, 256, (1, 1, 3, SIDE, SIDE)).astype(np.uint8)
    want = answers(model, sample)
    assert dequantized.in_floats(model)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Sub", "Mul", "Identity", "Relu", "QuantizeLinear"]
    assert np.array_equal(answers(model, sample), want)


def test_what_can_not_be_read_as_floats_stays_as_it_was() -> None:
    net = Net()
    net.conv(3, 8)
    rounding(net, 0.01, np.int8(0))
    scales, zeros = net.constant(np.float32(0.01)), net.constant(np.int8(0))
    net.add("QuantizeLinear", scales, zeros)
    net.add("BitwiseNot")
    net.add("DequantizeLinear", scales, zeros)
    model = net.model([1, 8, SIDE // 2, SIDE // 2], opset=18)
    before = model.SerializeToString()
    assert not dequantized.in_floats(model)
    assert model.SerializeToString() == before


def test_a_bias_that_is_rounded_as_the_network_runs_is_the_float_that_it_was() -> None:
    net = Net()
    chance = np.random.default_rng(3)
    # Weights without a sign: onnxruntime computes this operator of int8 from 1.24 on.
    weight, bias = chance.integers(1, 256, (8, 3, 3, 3)).astype(np.uint8), chance.normal(size=8).astype(np.float32)
    scale = net.constant(np.float32(0.01))
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["image"], ["whole", "step", "zero"]))
    product = net.add(
        "ConvInteger", net.constant(weight), "zero", net.constant(np.uint8(128)), first="whole", pads=[1] * 4
    )
    both = net.add("Mul", scale, first="step")
    net.add("Div", both, first=net.constant(bias))  # as onnxruntime's first quantizer wrote it
    net.add("Floor")
    net.add("Cast", to=TensorProto.INT32)
    rounded = net.add("Reshape", net.constant(np.array([1, 8, 1, 1])))
    net.add("Add", rounded, first=product)
    net.add("Transpose", perm=[0, 1, 3, 2])
    net.add("Cast", to=TensorProto.FLOAT)
    net.add("Mul", both)
    model = net.model([1, 8, SIDE, SIDE])
    samples = pictures(4)
    rough = answers(model, samples)
    assert dequantized.in_floats(model)
    onnx.checker.check_model(model, full_check=True)
    assert not {node.op_type for node in model.graph.node} & {
        *dequantized.OF_INTEGERS,
        "DynamicQuantizeLinear",
        "Floor",
    }
    exact = Net()
    exact.constant((weight - np.float32(128)) * np.float32(0.01), "weight")
    exact.constant(bias, "bias")
    exact.add("Conv", "weight", "bias", pads=[1, 1, 1, 1])
    exact.add("Transpose", perm=[0, 1, 3, 2])
    want = answers(exact.model([1, 8, SIDE, SIDE]), samples)
    assert noise(want, answers(model, samples)) < 1e-9 < noise(want, rough)


def test_a_product_of_whole_numbers_that_is_read_as_these_stays_as_it_was() -> None:
    net = Net()
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["image"], ["whole", "step", "zero"]))
    net.add("ConvInteger", net.constant(np.ones((8, 3, 3, 3), np.int8)), "zero", first="whole", pads=[1, 1, 1, 1])
    net.add("Mod", net.constant(np.int32(7)))
    net.add("Cast", to=TensorProto.FLOAT)
    model = net.model([1, 8, SIDE, SIDE])
    before = model.SerializeToString()
    assert not dequantized.in_floats(model)
    assert model.SerializeToString() == before
