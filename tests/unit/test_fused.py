"""Engines that compute an activation with what is before it: no rounding comes between, and the answers get better by that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children import fused, qdq, sensitivity, statistics
from edgefleet_controller.compile.children.gathered import Statistics
from edgefleet_controller.compile.children.measure import SampleFile
from edgefleet_controller.compile.children.readings import pools_first
from edgefleet_controller.compile.recipe import Recipe
from safetensors.numpy import save_file
from support.networks import Net

PICTURES = np.random.default_rng(1).normal(size=(12, 3, 32, 32)).astype(np.float32)
APART, FUSED = (Recipe(ranges="mse", fused_activations=told).as_dict() for told in (False, True))


def answers(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": one[None]})[0] for one in PICTURES])


def known(model: onnx.ModelProto, folder: Path) -> Statistics:
    """As the compiler gathers it, of the network with its maxima first."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    pools_first(own)
    save_file({"image": PICTURES}, folder / "samples")
    own = onnx.shape_inference.infer_shapes(own)
    return statistics.collect(own, SampleFile(str(folder / "samples")), lambda *_: None, histograms=True)


def noise(model: onnx.ModelProto, quantized: onnx.ModelProto) -> float:
    return float(np.sum((answers(quantized) - answers(model)) ** 2))


def readers(model: onnx.ModelProto, name: str) -> list[str]:
    return [node.op_type for node in model.graph.node if name in node.input]


def leaky(net: Net) -> str:
    return net.add("LeakyRelu", alpha=0.1)


def silu(net: Net) -> str:
    made = net.last
    return net.add("Mul", net.add("Sigmoid"), first=made)


def deep() -> onnx.ModelProto:
    """Half of the sums lie far below zero, where a tenth of them is left: their range leaves few levels to the others."""
    net = Net(1)
    net.conv(3, 8)
    bias = next(c for c in net.constants if list(c.dims) == [8])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.repeat(np.float32([-30, 0]), 4), bias.name))
    leaky(net)
    net.conv(8, 8)
    return onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))


@pytest.mark.parametrize("activation", [leaky, silu, lambda net: net.add("HardSwish")], ids=["leaky", "silu", "swish"])
def test_what_is_summed_for_an_activation_is_not_rounded(tmp_path: Path, activation: Callable[[Net], str]) -> None:
    net = Net(1)
    convolved = net.conv(3, 8)
    active = activation(net)
    net.conv(8, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))
    found = known(model, tmp_path)
    apart, together = (qdq.quantize(model, found, recipe) for recipe in (APART, FUSED))
    onnx.checker.check_model(together, full_check=True)
    assert "QuantizeLinear" in readers(apart, convolved)
    assert "QuantizeLinear" not in readers(together, convolved)
    assert readers(together, active) == ["QuantizeLinear"]
    assert noise(model, together) < noise(model, apart)


def test_a_leaky_sum_has_less_than_half_the_noise_of_a_rounded_one(tmp_path: Path) -> None:
    model = deep()
    found = known(model, tmp_path)
    apart, together = (noise(model, qdq.quantize(model, found, recipe)) for recipe in (APART, FUSED))
    assert together < 0.5 * apart


def test_what_a_maximum_reads_is_rounded_and_the_answers_stay(tmp_path: Path) -> None:
    net = Net(1)
    net.conv(3, 8)
    active = leaky(net)
    pooled = net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.conv(8, 4)
    net.add("Add", net.conv(8, 4, 1), first=net.conv(8, 4))
    net.nodes[-3].input[0] = net.nodes[-2].input[0] = pooled  # several read the maximum
    model = onnx.shape_inference.infer_shapes(net.model([1, 4, 16, 16]))
    found = known(model, tmp_path)
    quantized = qdq.quantize(model, found, FUSED)
    onnx.checker.check_model(quantized, full_check=True)
    assert readers(quantized, active) == ["QuantizeLinear"]
    assert set(readers(quantized, pooled)) == {"Conv"}
    behind = onnx.ModelProto()
    behind.CopyFrom(quantized)
    rounding, back, pool = (next(n for n in behind.graph.node if n.op_type == op and n.output[0] in names) for op, names in (
        ("QuantizeLinear", [n.output[0] for n in behind.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == active]),
        ("DequantizeLinear", [n.input[0] for n in behind.graph.node if n.op_type == "MaxPool"]),
        ("MaxPool", [pooled]),
    ))  # fmt: skip
    # By hand behind the maximum again, as the writer had it.
    pool.input[0], pool.output[0], rounding.input[0] = active, f"{pooled}/raw", f"{pooled}/raw"
    back.output[0] = pooled
    ordered = [n for n in behind.graph.node if n not in (pool, rounding, back)]
    place = next(i for i, n in enumerate(ordered) if pooled in n.input)
    nodes = [*ordered[:place], pool, rounding, back, *ordered[place:]]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    behind.graph.ClearField("node")
    behind.graph.node.extend(copies)
    assert np.allclose(answers(behind), answers(quantized), atol=1e-5)


@pytest.mark.parametrize("branches", [1, 2])
def test_of_what_is_added_to_a_shortcut_the_last_is_not_rounded(tmp_path: Path, branches: int) -> None:
    net = Net(1)
    net.conv(3, 8)
    shortcut = net.add("Relu")
    if branches == 2:
        shortcut = net.conv(8, 8, 1)
        net.last = net.nodes[-1].input[0]
    net.conv(8, 8)
    net.add("Relu")
    last = net.conv(8, 8)
    total = net.add("Add", shortcut)
    net.add("Relu")
    net.conv(8, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))
    found = known(model, tmp_path)
    apart, together = (qdq.quantize(model, found, recipe) for recipe in (APART, FUSED))
    onnx.checker.check_model(together, full_check=True)
    adding = next(node for node in together.graph.node if total in node.output)
    made = {name: node.op_type for node in together.graph.node for name in node.output}
    assert [made[name] for name in adding.input] == ["Conv", "DequantizeLinear"]
    assert adding.input[0] == last
    assert fused.sums(model, {total}) == set()  # nothing where the addition stays in float
    assert noise(model, together) < noise(model, apart)


@pytest.mark.parametrize("why", ["read elsewhere", "served", "in float", "pooled first", "no activation"])
def test_a_sum_that_is_not_an_activations_alone_is_not_among_them(why: str) -> None:
    net = Net(1)
    convolved = net.conv(3, 8)
    if why == "pooled first":
        net.add("MaxPool", kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    if why != "no activation":
        leaky(net)
    if why == "read elsewhere":
        net.add("Add", net.last, first=convolved)
    if why == "served":
        net.last = convolved
        leaky(net)
        net.add("Add", convolved)
    model = net.model([1, 8, 32, 32])
    if why == "served":
        model.graph.output.append(onnx.helper.make_tensor_value_info(convolved, onnx.TensorProto.FLOAT, [1, 8, 32, 32]))
    assert fused.sums(model, {convolved} if why == "in float" else ()) == set()


def test_a_layer_in_float_keeps_its_activation_in_float(tmp_path: Path) -> None:
    net = Net(1)
    first = net.conv(3, 8)
    active = leaky(net)
    net.conv(8, 8)
    leaky(net)
    net.conv(8, 4)
    model = onnx.shape_inference.infer_shapes(net.model([1, 4, 32, 32]))
    found = known(model, tmp_path)
    quantized = qdq.quantize(model, found, FUSED | {"in_float": [first, active]})
    onnx.checker.check_model(quantized, full_check=True)
    assert readers(quantized, first) == ["LeakyRelu"]
    assert readers(quantized, "image") == ["Conv"]
    assert noise(model, quantized) < noise(model, qdq.quantize(model, found, FUSED))


def test_a_layer_in_float_behind_a_maximum_reads_it_unrounded(tmp_path: Path) -> None:
    net = Net(1)
    net.conv(3, 8)
    active = leaky(net)
    pooled = net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    last = net.conv(8, 4)
    model = onnx.shape_inference.infer_shapes(net.model([1, 4, 16, 16]))
    quantized = qdq.quantize(model, known(model, tmp_path), FUSED | {"in_float": [last]})
    onnx.checker.check_model(quantized, full_check=True)
    assert readers(quantized, active) == ["MaxPool"]
    assert readers(quantized, pooled) == ["Conv"]


def test_a_layers_noise_is_that_without_the_rounding_between(tmp_path: Path) -> None:
    model = deep()
    found, feeds = known(model, tmp_path), [{"image": one[None]} for one in PICTURES[:4]]

    def first(recipe: dict[str, Any]) -> float:
        units = sensitivity.measure(model, found, feeds, recipe, [{"output": "scores"}], lambda *_: None)
        return float(units[0]["noise"])

    assert first(FUSED) < 0.5 * first(APART)
