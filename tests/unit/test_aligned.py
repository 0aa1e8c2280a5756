"""Channels that are added for int8 kernels change no answer, and are added nowhere else than where weights alone decide how many there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children import qdq, statistics
from edgefleet_controller.compile.children.measure import SampleFile
from onnx import numpy_helper
from safetensors.numpy import save_file
from support.networks import Net

RECIPE = {
    "ranges": "minmax", "weights": "pairs", "granularity": "channel", "activations": "uint8", "scope": "all", "correct_bias": True, "in_float": [],
    "fit_weights": True, "fused_activations": False, "gates_in_int8": True, "aligned_channels": True,
}  # fmt: skip
UNALIGNED = RECIPE | {"aligned_channels": False}
PICTURES = np.random.default_rng(1).normal(size=(6, 3, 32, 32)).astype(np.float32)


def answers(model: onnx.ModelProto) -> Any:
    running = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([running.run(None, {"image": one[None]})[0] for one in PICTURES])


def known_of(model: onnx.ModelProto, folder: Path) -> Any:
    save_file({"image": PICTURES}, folder / "samples")
    return statistics.collect(model, SampleFile(str(folder / "samples")), lambda *_: None, histograms=False)


def quantized(net: Net, folder: Path, outputs: int = 8, **recipe: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network in int8: as it is, and aligned."""
    model = onnx.shape_inference.infer_shapes(net.model([1, outputs, None, None], opset=14))
    known = known_of(model, folder)
    plain, aligned = (qdq.quantize(model, known, one | recipe) for one in (UNALIGNED, RECIPE))
    onnx.checker.check_model(aligned, full_check=True)
    return plain, aligned


def channels(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """(groups, input channels of a group) of each convolution, in the order of the network's."""
    constants = {i.name: i for i in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            name = node.input[1]
            weight = constants[name if name in constants else maker[name].input[0]]
            found.append((next(a.i for a in node.attribute if a.name == "group"), weight.dims[1]))
    return found


def depthwise(net: Net, count: int) -> str:
    return net.conv(count, count, group=count)


def mobile(net: Net) -> None:
    """Depthwise convolutions over 24 and 20 channels, with gates, weighed channels and a sum, as MobileNetV3 has them."""
    before = net.conv(3, 12)
    net.conv(12, 24, 1, pads=[0] * 4)
    net.add("HardSwish")
    depthwise(net, 24)
    features = net.add("Relu")
    net.add("GlobalAveragePool")
    net.conv(24, 5, 1, pads=[0] * 4)
    net.add("Relu")
    net.conv(5, 24, 1, pads=[0] * 4)
    gate = net.add("HardSigmoid")
    net.add("Mul", gate, first=features)
    net.conv(24, 12, 1, pads=[0] * 4)
    net.add("Add", before)
    net.conv(12, 20, 1, pads=[0] * 4)
    net.add("LeakyRelu", alpha=0.1)
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    depthwise(net, 20)
    net.conv(20, 8)


def test_the_answers_are_the_same_and_kernels_have_whole_blocks_of_channels(tmp_path: Path) -> None:
    net = Net(3)
    mobile(net)
    plain, aligned = quantized(net, tmp_path)
    assert np.array_equal(answers(aligned), answers(plain))
    assert channels(plain) == [(1, 3), (1, 12), (24, 1), (1, 24), (1, 5), (1, 24), (1, 12), (20, 1), (1, 20)]
    # The reduced five, too: four values are multiplied at once.
    assert channels(aligned) == [(1, 4), (1, 12), (32, 1), (1, 32), (1, 8), (1, 32), (1, 12), (32, 1), (1, 32)]


def test_layers_in_float_between_them_answer_the_same(tmp_path: Path) -> None:
    net = Net(3)
    mobile(net)
    convolutions = [node.name for node in net.nodes if node.op_type == "Conv"]
    for number in range(len(convolutions)):
        folder = tmp_path / str(number)
        folder.mkdir()
        again = Net(3)
        mobile(again)
        plain, aligned = quantized(again, folder, in_float=[convolutions[number]])
        np.testing.assert_allclose(answers(aligned), answers(plain), atol=1e-4)


@pytest.mark.parametrize("weights", ["full", "reduced"])
def test_weights_with_one_scale_for_all_keep_it(tmp_path: Path, weights: str) -> None:
    net = Net(3)
    mobile(net)
    plain, aligned = quantized(net, tmp_path, granularity="tensor", weights=weights)
    assert np.array_equal(answers(aligned), answers(plain))
    assert channels(aligned)[2] == (32, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_picture_gets_a_fourth_channel_once_for_all_who_read_it(tmp_path: Path, symmetric: bool) -> None:
    net = Net(3)
    one = net.conv(3, 8)
    net.last = "image"
    net.conv(3, 8, 5)
    net.add("Add", one)
    net.conv(8, 8)
    plain, aligned = quantized(net, tmp_path, **({"activations": "symmetric"} if symmetric else {}))
    assert np.array_equal(answers(aligned), answers(plain))
    assert channels(aligned) == [(1, 4), (1, 4), (1, 8)]
    assert [node.op_type for node in aligned.graph.node].count("Pad") == 1


@pytest.mark.parametrize("normalized", [False, True])
def test_a_picture_whose_channels_came_last_stays_as_it_is(tmp_path: Path, normalized: bool) -> None:
    """Its pixels would be padded one by one."""
    net = Net(3)
    net.add("Reshape", net.constant(np.array([1, 32, 32, 3])))
    net.add("Transpose", perm=[0, 3, 1, 2])
    if normalized:
        net.add("Sub", net.constant(np.linspace(0.1, 0.3, 3, dtype=np.float32).reshape(1, 3, 1, 1)))
        net.add("Mul", net.constant(np.linspace(0.5, 2, 3, dtype=np.float32).reshape(1, 3, 1, 1)))
    net.conv(3, 8)
    net.conv(8, 8)
    plain, aligned = quantized(net, tmp_path)
    assert channels(aligned) == channels(plain)


def widened(net: Net, more: int) -> str:
    return net.add("Pad", net.constant(np.array([0, 0, 0, 0, 0, more, 0, 0], np.int64)))


@pytest.mark.parametrize(("narrow", "wide"), [(24, 28), (28, 36), (16, 24), (24, 32), (10, 44)])
def test_a_shortcut_with_channels_of_zeros_behind_it_is_as_wide_as_what_it_is_added_to(
    tmp_path: Path, narrow: int, wide: int
) -> None:
    """As face detectors have it."""
    net = Net(3)
    net.conv(3, narrow)
    before = net.add("Relu")
    depthwise(net, narrow)
    made = net.conv(narrow, wide, 1, pads=[0] * 4)
    net.last = before
    widened(net, wide - narrow)
    net.add("Add", made)
    net.add("Relu")
    depthwise(net, wide)
    net.conv(wide, 8)
    plain, aligned = quantized(net, tmp_path)
    assert np.array_equal(answers(aligned), answers(plain))
    whole = [-(-count // 16) * 16 for count in (narrow, wide)]
    assert channels(aligned) == [(1, 4), (whole[0], 1), (1, whole[0]), (whole[1], 1), (1, whole[1])]


def test_a_shortcut_that_can_not_grow_holds_what_is_before_it(tmp_path: Path) -> None:
    """28 channels that are read apart stay 28, so that the 24 may not become 32."""
    net = Net(3)
    net.conv(3, 24)
    depthwise(net, 24)
    before = net.last
    net.conv(24, 28, 1, pads=[0] * 4)
    made = net.last
    net.last = before
    widened(net, 4)
    net.add("Add", made)
    depthwise(net, 28)
    net.add("Reshape", net.constant(np.array([1, 28, 32, 32], np.int64)))
    net.conv(28, 8)
    plain, aligned = quantized(net, tmp_path)
    assert np.array_equal(answers(aligned), answers(plain))
    assert channels(aligned) == [(1, 4), (24, 1), (1, 24), (28, 1), (1, 28)]


@pytest.mark.parametrize("pads", [[0, 0, 0, 0, 0, 4, 1, 1], [0, 4, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, -4, 0, 0]])
def test_what_pads_otherwise_counts_the_channels(tmp_path: Path, pads: list[int]) -> None:
    net = Net(3)
    net.conv(3, 24)
    depthwise(net, 24)
    net.add("Pad", net.constant(np.array(pads, np.int64)))
    net.conv(24 + pads[1] + pads[5], 8)
    plain, aligned = quantized(net, tmp_path)
    assert channels(aligned)[1] == (24, 1)
    assert np.array_equal(answers(aligned), answers(plain))


def test_three_channels_inside_a_network_become_four_once(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 3)
    net.conv(3, 8)
    plain, aligned = quantized(net, tmp_path)
    assert channels(aligned) == [(1, 4), (1, 4)]
    assert np.array_equal(answers(aligned), answers(plain))


def per_channel(net: Net, values: Any) -> str:
    return net.constant(np.asarray(values, np.float32).reshape(1, -1, 1, 1))


def served(net: Net) -> None:
    depthwise(net, 24)


def moved(net: Net) -> None:
    depthwise(net, 24)
    net.add("Reshape", net.constant(np.array([1, 24, 32, 32], np.int64)))
    net.conv(24, 8)


def resized(net: Net) -> None:
    depthwise(net, 24)
    net.add("Resize", "", "", net.constant(np.array([1, 24, 40, 40], np.int64)), mode="nearest")
    net.conv(24, 8)


def sloped(net: Net) -> None:
    depthwise(net, 24)
    net.add("PRelu", net.constant(np.full((24, 1, 1), 0.2, np.float32)))
    net.conv(24, 8)


def weighed(net: Net) -> None:
    depthwise(net, 24)
    net.add("Mul", per_channel(net, np.linspace(0.5, 1, 24)))
    net.conv(24, 8)


def divided(net: Net) -> None:
    """Nothing by nothing is no number, and no weight of zero makes one of it."""
    features = depthwise(net, 24)
    net.add("Div", features)
    net.conv(24, 8)


def joined(net: Net) -> None:
    features = depthwise(net, 24)
    net.add("Concat", features, axis=1)
    net.conv(48, 8)


def in_groups(net: Net) -> None:
    depthwise(net, 24)
    net.conv(24, 8, group=2)


def several_each(net: Net) -> None:
    net.conv(24, 48, group=24)
    net.conv(48, 8)


def normalized(net: Net) -> None:
    depthwise(net, 24)
    net.add("Softmax", axis=1)
    net.conv(24, 8)


@pytest.mark.parametrize(
    "make", [served, moved, resized, sloped, weighed, divided, joined, in_groups, several_each, normalized]
)
def test_nothing_is_added_where_something_else_counts_the_channels(tmp_path: Path, make: Callable[[Net], None]) -> None:
    net = Net(3)
    net.conv(3, 24)
    make(net)
    plain, aligned = quantized(net, tmp_path, outputs=24 if make is served else 8)
    assert [groups for groups, _ in channels(aligned)] == [groups for groups, _ in channels(plain)]
    assert np.array_equal(answers(aligned), answers(plain), equal_nan=True)


def test_weights_that_two_read_stay_and_both_answer_the_same(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 24)
    one = depthwise(net, 24)
    weight, bias = net.nodes[-1].input[1:]
    net.add("Conv", weight, bias, first=one, kernel_shape=[3, 3], pads=[1] * 4, group=24)
    net.conv(24, 8)
    plain, aligned = quantized(net, tmp_path)
    assert np.array_equal(answers(aligned), answers(plain))


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_weight_that_reads_pictures_twice_gets_no_channel_from_either(tmp_path: Path, pictures: int) -> None:
    """As networks have it that compare two pictures."""
    net = Net(3)
    first = net.conv(3, 8)
    weights = net.nodes[-1].input[1:]
    other = "image" if pictures == 1 else net.add("Relu", first="image")
    net.add("Conv", *weights, first=other, kernel_shape=[3, 3], pads=[2, 2, 2, 2], dilations=[2, 2])
    net.add("Add", first)
    plain, aligned = quantized(net, tmp_path)
    np.testing.assert_array_equal(answers(aligned), answers(plain))


def test_few_channels_do_not_become_many(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 7)
    depthwise(net, 7)
    net.conv(7, 8)
    plain, aligned = quantized(net, tmp_path)
    assert channels(aligned) == [(1, 4), (7, 1), (1, 7)]
    assert np.array_equal(answers(aligned), answers(plain))


STEPS = (
    "conv",
    "depthwise",
    "Relu",
    "HardSwish",
    "LeakyRelu",
    "Clip",
    "Sigmoid",
    "MaxPool",
    "gate",
    "sum",
    "twice",
    "spread",
    "Resize",
)


@pytest.mark.parametrize("seed", range(32))
def test_networks_of_any_make_answer_the_same(tmp_path: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    net = Net(seed)
    count = int(chance.choice([9, 20, 24, 28]))
    net.conv(3, count)
    for step in chance.choice(STEPS, 10):
        before = net.last
        match step:
            case "conv":
                made = int(chance.choice([5, 10, 20, 24, 28, 40]))
                net.conv(count, made, 1, pads=[0] * 4)
                count = made
            case "depthwise":
                depthwise(net, count)
            case "Clip":
                net.add("Clip", net.constant(np.float32(0)), net.constant(np.float32(6)))
            case "MaxPool":
                net.add("MaxPool", kernel_shape=[3, 3], pads=[1] * 4)
            case "gate":
                net.add("GlobalAveragePool")
                net.conv(count, count, 1, pads=[0] * 4)
                gate = net.add(str(chance.choice(["Sigmoid", "HardSigmoid"])))
                net.add("Mul", gate, first=before)
            case "sum":
                depthwise(net, count)
                net.add("Add", before)
            case "twice":
                net.add("Mul", net.constant(np.float32(0.5)))
            case "spread":
                net.conv(count, 1, 1, pads=[0] * 4)
                net.add("Mul", before)
            case "widen":
                more = int(chance.choice([1, 4, 8, 20]))
                widened(net, more)
                count += more
            case "Resize":
                net.add("Resize", "", net.constant(np.ones(4, np.float32)), mode="nearest")
            case op:
                net.add(op)
    net.conv(count, 8)
    plain, aligned = quantized(net, tmp_path)
    np.testing.assert_allclose(answers(aligned), answers(plain), atol=1e-4)


def test_scales_of_added_channels_are_scales(tmp_path: Path) -> None:
    net = Net(3)
    mobile(net)
    _, aligned = quantized(net, tmp_path)
    constants = {i.name: numpy_helper.to_array(i) for i in aligned.graph.initializer}
    scales = [constants[n.input[1]] for n in aligned.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all((scale > 0).all() for scale in scales)
