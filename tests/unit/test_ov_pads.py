"""OpenVINO pads rightly between int8 layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from edgefleet_controller.compile.children import qdq, statistics
from edgefleet_controller.compile.children.measure import SampleFile
from edgefleet_controller.compile.children.ov_pads import pad_in_float
from edgefleet_controller.compile.recipe import Recipe
from safetensors.numpy import save_file
from support.networks import Net

PICTURES = np.random.default_rng(1).normal(size=(8, 3, 32, 32)).astype(np.float32)
CHANNELS, BORDERS = [0, 0, 0, 0, 0, 16, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]


def padded(pads: list[int], *value: float, pooled: bool = True, shared: bool = True) -> onnx.ModelProto:
    """A shortcut of values on both sides of zero that is padded, as residual networks for boards have it. ``shared``: a convolution reads it too."""
    net = Net(3)
    net.conv(3, 16)
    activated = net.add("LeakyRelu", alpha=0.3)
    wider = ""
    if pads == CHANNELS:
        net.last = activated if shared else "image"
        wider = net.conv(16 if shared else 3, 32)
    net.last = activated
    if pooled:
        net.add("MaxPool", kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    more = [net.constant(np.array(number, np.float32)) for number in value]
    net.add("Pad", net.constant(np.array(pads, np.int64)), *more)
    if wider:
        net.add("Add", wider)
    net.conv(32 if wider else 16, 8, pads=None if wider else [0] * 4)
    return onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))


def in_int8(model: onnx.ModelProto, folder: Any) -> onnx.ModelProto:
    save_file({"image": PICTURES}, folder / "samples")
    known = statistics.collect(model, SampleFile(str(folder / "samples")), lambda *_: None, histograms=False)
    return qdq.quantize(model, known, Recipe(weights="pairs", fused_activations=True).as_dict())


def by_openvino(model: onnx.ModelProto) -> Any:
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return np.concatenate([compiled(one[None])[0] for one in PICTURES])


def db(model: onnx.ModelProto, have: Any) -> float:
    """Signal to noise of answers against the float network's."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = np.concatenate([session.run(["scores"], {"image": one[None]})[0] for one in PICTURES])
    return float(10 * np.log10(np.sum(want**2) / np.sum((have - want) ** 2)))


@pytest.mark.parametrize("pads", [CHANNELS, BORDERS])
@pytest.mark.parametrize("value", [(), (0.0,)])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_padded_in_int8_answers_as_in_float(
    tmp_path: Any, pads: list[int], value: tuple[float, ...], pooled: bool, shared: bool
) -> None:
    model = padded(pads, *value, pooled=pooled, shared=shared)
    quantized = in_int8(model, tmp_path)
    pad_in_float(quantized)
    onnx.checker.check_model(quantized)
    assert db(model, by_openvino(quantized)) > 25


@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [0, 1, 2, 1]])
def test_a_mean_that_counts_its_borders_answers_as_in_float(tmp_path: Any, pads: list[int]) -> None:
    net = Net(3)
    net.conv(3, 16)  # on both sides of zero
    net.add("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=pads, count_include_pad=1)
    net.conv(16, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, None, None]))
    quantized = in_int8(model, tmp_path)
    pad_in_float(quantized)
    onnx.checker.check_model(quantized)
    assert db(model, by_openvino(quantized)) > 25


def test_pads_by_another_value_and_networks_in_float_are_left_as_they_are(tmp_path: Any) -> None:
    for model in (in_int8(padded(CHANNELS, 1.5), tmp_path), padded(CHANNELS)):
        before = model.SerializeToString(deterministic=True)
        pad_in_float(model)
        assert model.SerializeToString(deterministic=True) == before


def test_a_shape_that_is_padded_is_left_as_it_is(tmp_path: Any) -> None:
    quantized = in_int8(padded(CHANNELS), tmp_path)
    numbers = onnx.numpy_helper.from_array(np.array([2, 3], np.int64), "numbers")
    shape = onnx.helper.make_node("Pad", ["numbers", "ends"], ["longer"])
    quantized.graph.initializer.extend([numbers, onnx.numpy_helper.from_array(np.array([1, 0], np.int64), "ends")])
    quantized.graph.node.append(shape)
    quantized.graph.output.append(onnx.helper.make_tensor_value_info("longer", onnx.TensorProto.INT64, [3]))
    pad_in_float(quantized)
    onnx.checker.check_model(quantized, full_check=True)
    assert list(quantized.graph.node[-1].input) == ["numbers", "ends"]
