"""QDQ networks: what an activation needs is still there where the activation comes back for layers that stay in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children import qdq, statistics
from edgefleet_controller.compile.children.int8_weights import Settling
from edgefleet_controller.compile.children.measure import SampleFile
from onnx import helper, numpy_helper
from safetensors.numpy import save_file
from support.networks import Net

PLAIN = {
    "ranges": "minmax", "weights": "full", "granularity": "channel", "activations": "uint8", "scope": "all", "correct_bias": True, "fit_weights": True, "fused_activations": False, "gates_in_int8": False, "aligned_channels": False,
}  # fmt: skip
PICTURES = np.random.default_rng(1).normal(size=(8, 3, 32, 32)).astype(np.float32)


def network(limits: str, *, read_elsewhere: bool = False) -> onnx.ModelProto:
    """Three convolutions with two Clips between, which share their limits.

    Args:
        limits: ``initializers``, or ``Constant``: nodes that make them.
        read_elsewhere: whether the upper limit is also a summand, so that its int8 form takes its place.
    """
    net = Net(4)
    net.conv(3, 8, stride=2)
    low, high = (net.constant(np.array(v, np.float32), name) for v, name in ((0, "Relu6_min"), (1.5, "Relu6_max")))
    net.add("Clip", low, high)
    net.conv(8, 8)
    net.add("Clip", low, high)
    net.conv(8, 8)
    if read_elsewhere:
        net.add("Add", high)
    net.add("GlobalAveragePool")
    model = net.model([1, 8, 1, 1])
    if limits == "Constant":
        own = {i.name: i for i in model.graph.initializer if i.name in (low, high)}
        kept = [i for i in model.graph.initializer if i.name not in own]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        nodes = [helper.make_node("Constant", [], [n], name=n, value=i) for n, i in own.items()]
        nodes += model.graph.node
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return onnx.shape_inference.infer_shapes(model)


def answers(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": one[None]})[0] for one in PICTURES])


@pytest.mark.parametrize("limits", ["initializers", "Constant"])
@pytest.mark.parametrize("read_elsewhere", [False, True])
@pytest.mark.parametrize("in_float", [(), ("n2",), ("n4",), ("n2", "n4")])
def test_layers_behind_a_clip_with_shared_limits_can_stay_in_float(
    tmp_path: Path, limits: str, read_elsewhere: bool, in_float: tuple[str, ...]
) -> None:
    model = network(limits, read_elsewhere=read_elsewhere)
    save_file({"image": PICTURES}, tmp_path / "samples.safetensors")
    samples = SampleFile(str(tmp_path / "samples.safetensors"))
    known = statistics.collect(model, samples, lambda *_: None, histograms=False)
    quantized = qdq.quantize(model, known, PLAIN | {"in_float": list(in_float)})
    have, want = answers(quantized), answers(model)
    assert float(np.mean((have - want) ** 2)) < 1e-3 * float(np.var(want))


def test_a_limit_that_comes_back_keeps_its_value(tmp_path: Path) -> None:
    model = network("initializers")
    save_file({"image": PICTURES}, tmp_path / "samples.safetensors")
    known = statistics.collect(
        model, SampleFile(str(tmp_path / "samples.safetensors")), lambda *_: None, histograms=False
    )
    quantized = qdq.quantize(model, known, PLAIN | {"in_float": ["n4"]})
    constants = {i.name: float(numpy_helper.to_array(i)) for i in quantized.graph.initializer if not i.dims}
    again = [n for n in quantized.graph.node if n.op_type == "Clip" and n.name.endswith("/active")]
    assert [[constants[name] for name in node.input[1:]] for node in again] == [[0.0, 1.5]]


@pytest.mark.parametrize("in_float", [(), ("n2",), ("n0", "n4")])
def test_the_file_is_valid_onnx_whatever_stays_in_float(tmp_path: Path, in_float: tuple[str, ...]) -> None:
    """Also for readers that take nodes in the order in which they stand."""
    model = network("initializers")
    save_file({"image": PICTURES}, tmp_path / "samples.safetensors")
    samples = SampleFile(str(tmp_path / "samples.safetensors"))
    known = statistics.collect(model, samples, lambda *_: None, histograms=False)
    onnx.checker.check_model(qdq.quantize(model, known, PLAIN | {"in_float": list(in_float)}), full_check=True)


@pytest.mark.parametrize(("group", "channels"), [(8, 8), (2, 6), (1, 6)])
def test_a_transposed_convolution_in_groups_is_quantized(tmp_path: Path, group: int, channels: int) -> None:
    """One output channel for each of input, as upsampling has it, and several in a group, whose weight has no axis that counts them."""
    net = Net(5)
    net.conv(3, 8, stride=2)
    weight = net.rng.normal(size=(8, channels // group, 2, 2)) * 0.3 * 10.0 ** net.rng.uniform(-1, 1, (8, 1, 1, 1))
    bias = net.constant(net.rng.normal(size=channels).astype(np.float32))
    net.add("ConvTranspose", net.constant(weight.astype(np.float32)), bias, group=group, strides=[2, 2])
    model = onnx.shape_inference.infer_shapes(net.model([1, channels, 32, 32]))
    save_file({"image": PICTURES}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=False)
    want, have = answers(model), answers(qdq.quantize(model, known, PLAIN | {"in_float": []}))
    assert np.sum((have - want) ** 2) < 0.01 * np.sum(want**2)  # 20 dB


def test_means_of_what_a_convolution_over_a_line_reads_are_by_channel(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 6, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="c")], "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 6, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 6])],
        [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    lines = np.tile(np.arange(6, dtype=np.float32)[:, None], (8, 1, 6))
    save_file({"x": lines}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=False)
    assert known.means["x"] == [0, 1, 2, 3, 4, 5]


def in_int8(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    save_file({"image": PICTURES}, folder / "samples")
    known = statistics.collect(model, SampleFile(str(folder / "samples")), lambda *_: None, histograms=False)
    recipe = PLAIN | {"in_float": [], "weights": "pairs"}  # so that no sum overflows on a CPU without VNNI
    return qdq.quantize(model, known, recipe)


def sqnr_db(model: onnx.ModelProto, folder: Path) -> float:
    """Of the network in int8 against the float one."""
    model = onnx.shape_inference.infer_shapes(model)
    want, have = answers(model), answers(in_int8(model, folder))
    return float(10 * np.log10(np.sum(want**2) / np.sum((have - want) ** 2)))


@pytest.mark.parametrize("limits", [(0.5, 2.0), (-3.0, -1.0), (0.25, None), (None, -0.5)])
def test_a_clip_whose_limits_leave_out_zero_is_more_than_a_range(tmp_path: Path, limits: tuple[Any, Any]) -> None:
    net = Net(6)
    net.conv(3, 8, stride=2)
    net.add("Clip", *("" if limit is None else net.constant(np.float32(limit)) for limit in limits))
    net.conv(8, 8)
    assert sqnr_db(net.model([1, 8, 16, 16]), tmp_path) > 25


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,), (1, 5)])
def test_a_bias_may_be_one_number_for_all_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    net = Net(7)
    net.conv(3, 8, stride=2)
    net.add("Relu")
    net.add("GlobalAveragePool")
    net.add("Flatten")
    weight = net.constant(net.rng.normal(size=(8, 5)).astype(np.float32))
    net.add("Gemm", weight, net.constant(np.full(shape, 0.7, np.float32)))
    assert sqnr_db(net.model([1, 5]), tmp_path) > 25


def test_a_product_that_is_scaled_afterwards_keeps_its_mean(tmp_path: Path) -> None:
    net = Net(8)
    net.conv(3, 8, stride=2)
    net.add("Relu")
    net.add("GlobalAveragePool")
    net.add("Flatten")
    weight = net.constant(net.rng.normal(size=(8, 5)).astype(np.float32))
    net.add("Gemm", weight, net.constant(net.rng.normal(size=5).astype(np.float32)), alpha=0.01, beta=3.0)
    assert sqnr_db(net.model([1, 5]), tmp_path) > 25


def test_a_product_with_a_scale_per_channel_is_one_that_older_onnxruntimes_compute(tmp_path: Path) -> None:
    """Up to 1.23 they want zero points for such weights, and forget the factor. Their Python is 3.10's, on which this file's other tests show it."""
    net = Net(8)
    net.conv(3, 8, stride=2)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    weight = net.constant(net.rng.normal(size=(8, 5)).astype(np.float32))
    net.add("Gemm", weight, net.constant(net.rng.normal(size=5).astype(np.float32)), alpha=0.01)
    quantized = in_int8(onnx.shape_inference.infer_shapes(net.model([1, 5])), tmp_path)
    (product,) = (node for node in quantized.graph.node if node.op_type == "Gemm")
    (dequantize,) = (node for node in quantized.graph.node if product.input[1] in node.output)
    assert len(dequantize.input) == 3
    assert [a.f for a in product.attribute if a.name == "alpha"] in ([], [1.0])


def decoder(net: Net, encoded: str, weight: str) -> str:
    """A transposed convolution with a weight that a convolution reads too, as auto-encoders have it."""
    bias = net.constant(net.rng.normal(size=8).astype(np.float32))
    return net.add("ConvTranspose", weight, bias, first=encoded, pads=[1] * 4)


@pytest.mark.parametrize("channels", [8, 16])
def test_a_weight_whose_channels_two_operators_count_along_unlike_axes_has_scales_for_each(
    tmp_path: Path, channels: int
) -> None:
    net = Net(9)
    net.conv(3, 8, stride=2)
    net.add("Relu")
    # Of one operator's channels, so that scales of the other's ruin them.
    spread = 10.0 ** net.rng.uniform(-1, 1, (channels, 1, 1, 1))
    weight = net.constant((net.rng.normal(size=(channels, 8, 3, 3)) * 0.1 * spread).astype(np.float32))
    net.add("Conv", weight, net.constant(net.rng.normal(size=channels).astype(np.float32)), pads=[1] * 4)
    decoder(net, net.add("Relu"), weight)
    assert sqnr_db(net.model([1, 8, 16, 16]), tmp_path) > 25


def test_a_matrix_that_is_read_from_both_sides_has_scales_for_each(tmp_path: Path) -> None:
    net = Net(10)
    net.conv(3, 8, stride=2)
    net.add("Relu")
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    net.add("Flatten")
    weight = net.constant((net.rng.normal(size=(48, 128)) * 0.1).astype(np.float32))
    net.add("Gemm", weight, net.constant(net.rng.normal(size=48).astype(np.float32)), transB=1)
    net.add("Relu")
    net.add("MatMul", weight)
    assert sqnr_db(net.model([1, 128]), tmp_path) > 25


@pytest.mark.parametrize("correct_bias", [True, False])
def test_a_layer_in_float_keeps_the_weight_that_it_shares_with_one_in_int8(tmp_path: Path, correct_bias: bool) -> None:
    net = Net(11)
    net.conv(3, 8, stride=2)
    first = net.add("Relu")
    weight = net.constant((net.rng.normal(size=(8, 8, 3, 3)) * 0.2).astype(np.float32))
    bias = net.constant(net.rng.normal(size=8).astype(np.float32))
    net.add("Conv", weight, bias, pads=[1] * 4)
    net.add("Relu")
    in_float = net.add("Conv", weight, bias, first=first, pads=[1] * 4)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 16, 16]))
    save_file({"image": PICTURES}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=False)
    recipe = PLAIN | {"in_float": [in_float], "correct_bias": correct_bias}
    quantized = qdq.quantize(model, known, recipe)
    (node,) = [node for node in quantized.graph.node if node.name == in_float]
    constants = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    given = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    assert np.array_equal(constants[node.input[1]], given[weight])


def test_rows_of_a_weight_may_be_looked_up_too(tmp_path: Path) -> None:
    net = Net(12)
    net.conv(3, 8, stride=2)
    net.add("Relu")
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    features = net.add("Flatten")
    table = net.constant((net.rng.normal(size=(128, 20)) * 0.1).astype(np.float32))
    net.add("MatMul", table)
    chosen = net.add("ArgMax", axis=1, keepdims=0)
    net.add("Gather", chosen, first=table, axis=1)
    net.add("Transpose", perm=[1, 0])
    net.add("Add", features)
    assert sqnr_db(net.model([1, 128]), tmp_path) > 25


@pytest.mark.parametrize("left", [0, 1])
def test_a_weight_that_was_fitted_for_two_layers_is_fitted_again_for_one(tmp_path: Path, left: int) -> None:
    """Else a compiled model would depend on which recipes came before it."""
    net = Net(3)
    net.conv(3, 8)
    net.add("Relu")
    layers = [net.conv(8, 8)]
    weight = net.nodes[-1].input[1]
    net.add("LeakyRelu", alpha=0.3)
    layers.append(net.add("Conv", weight, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))
    save_file({"image": PICTURES}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=False)
    recipe = PLAIN | {"in_float": [layers[left]]}
    settling = Settling(known)
    qdq.quantize(model, known, PLAIN | {"in_float": []}, settling)
    assert qdq.quantize(model, known, recipe, settling) == qdq.quantize(model, known, recipe)


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.parametrize("also_read", [True, False])
def test_an_activation_that_a_branch_reads_is_still_there(tmp_path: Path, activation: str, also_read: bool) -> None:
    """The writer lets a range stand for it, which only those see that read the rounded value."""
    net = Net(3)
    net.conv(3, 8)
    active = net.add("Relu") if activation == "Relu" else net.relu6()
    trunk = net.conv(8, 8) if also_read else net.add("Identity", first=active)
    yes = net.constant(np.array(True))
    branches = [
        helper.make_graph(
            [helper.make_node(op, [active], [f"out{op}"])], op, [], [helper.make_tensor_value_info(f"out{op}", 1, None)]
        )
        for op in ("Sqrt", "Neg")
    ]
    net.nodes.append(
        helper.make_node("If", [yes], ["either"], name="if", then_branch=branches[0], else_branch=branches[1])
    )
    net.add("Add", "either", first=trunk)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))
    save_file({"image": PICTURES}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=False)
    exact = answers(model)
    lost = answers(qdq.quantize(model, known, PLAIN | {"in_float": []})) - exact
    assert np.sum(lost**2) < 1e-3 * np.sum(exact**2)
