"""What is made of a value before it counts: ranges follow that, and maxima come before activations without another answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children import qdq, statistics
from edgefleet_controller.compile.children.measure import SampleFile
from edgefleet_controller.compile.children.readings import pools_first, readings
from safetensors.numpy import save_file
from support.networks import Net

RECIPE = {
    "ranges": "mse", "weights": "full", "granularity": "channel", "activations": "uint8", "scope": "all", "correct_bias": True, "in_float": [],
    "fit_weights": True, "fused_activations": False, "gates_in_int8": False, "aligned_channels": False,
}  # fmt: skip
PICTURES = np.random.default_rng(1).normal(size=(12, 3, 32, 32)).astype(np.float32)


def pool(net: Net, **attributes: Any) -> str:
    return net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2], **attributes)


def answers(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": one[None]})[0] for one in PICTURES])


def order(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("op", "attributes"), [("LeakyRelu", {"alpha": 0.1}), ("Sigmoid", {}), ("Elu", {}), ("Tanh", {})]
)
def test_a_maximum_comes_before_a_rising_activation(op: str, attributes: dict[str, Any]) -> None:
    net = Net(1)
    net.conv(3, 8)
    net.add(op, **attributes)
    pool(net)
    pool(net)
    net.conv(8, 4)
    model = net.model([1, 4, 8, 8])
    before = answers(model)
    pools_first(model)
    onnx.checker.check_model(model, full_check=True)
    assert order(model) == ["Conv", "MaxPool", "MaxPool", op, "Conv", "Identity"]
    assert np.allclose(answers(model), before, rtol=1e-6, atol=1e-6)


def test_an_activation_that_a_branch_of_a_branch_reads_stays_where_it_is() -> None:
    net = Net(1)
    net.conv(3, 8)
    active = net.add("LeakyRelu", alpha=0.1)
    pool(net)
    pooled = net.add("GlobalAveragePool")
    yes = net.constant(np.array(True))

    def branch(name: str, *nodes: Any) -> onnx.GraphProto:
        out = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
        return onnx.helper.make_graph(list(nodes), name, [], [out])

    def either(name: str) -> onnx.GraphProto:
        read = [
            branch(f"{name}{b}", onnx.helper.make_node("GlobalMaxPool", [active], [f"{name}{b}"])) for b in ("y", "n")
        ]
        inner = onnx.helper.make_node("If", [yes], [name], then_branch=read[0], else_branch=read[1])
        return branch(f"in_{name}", inner)

    net.nodes.append(
        onnx.helper.make_node("If", [yes], ["either"], name="if", then_branch=either("p"), else_branch=either("q"))
    )
    net.add("Add", "either", first=pooled)
    model = net.model([1, 8, 1, 1])
    before = answers(model)
    pools_first(model)
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(answers(model), before)
    assert active not in readings(model)


def test_names_of_nodes_and_of_what_comes_out_stay() -> None:
    net = Net(1)
    net.conv(3, 8)
    activation = net.add("LeakyRelu", alpha=0.1)
    pooled = pool(net)
    model = net.model([1, 8, 16, 16])
    pools_first(model)
    nodes = {node.name: node.op_type for node in model.graph.node}
    assert (nodes[activation], nodes[pooled]) == ("LeakyRelu", "MaxPool")
    assert model.graph.node[-1].input[0] == pooled


@pytest.mark.parametrize(
    "why", ["falls", "not known to rise", "read elsewhere", "fed elsewhere", "served", "places asked for"]
)
def test_an_activation_stays_where_its_place_matters(why: str) -> None:
    net = Net(1)
    convolved = net.conv(3, 8)
    op, attributes = (
        ("HardSwish", {}) if why == "not known to rise" else ("LeakyRelu", {"alpha": -0.1 if why == "falls" else 0.1})
    )
    active = net.add(op, **attributes)
    pool(net)
    if why == "places asked for":
        net.nodes[-1].output.append("places")
    if why == "read elsewhere":
        net.add("Add", net.add("Resize", "", net.constant(np.array([1, 1, 2, 2], np.float32))), first=active)
    if why == "fed elsewhere":
        net.add("Add", net.add("Resize", "", net.constant(np.array([1, 1, 2, 2], np.float32))), first=convolved)
    if why == "served":
        net.last = active
    shape = [1, 8, 32, 32] if why in ("read elsewhere", "fed elsewhere", "served") else [1, 8, 16, 16]
    model = net.model(shape)
    before = order(model)
    pools_first(model)
    assert order(model) == before


def test_readings_follow_what_reads_a_value_alone() -> None:
    net = Net(1)
    leaky_in = net.conv(3, 8)
    net.add("LeakyRelu", alpha=0.25)
    silu_in = net.conv(8, 8)
    net.add("Mul", net.add("Sigmoid"), first=silu_in)
    pooled_in = net.conv(8, 8)
    pooled = pool(net)
    net.add("Tanh")
    both_in = net.conv(8, 8)
    net.add("Add", net.add("Tanh"), first=both_in)
    last = net.conv(8, 4)
    found = readings(net.model([1, 4, 16, 16]))
    x = np.linspace(-4, 4, 9)
    assert np.allclose(found[leaky_in].function(x), np.where(x < 0, x / 4, x))
    assert np.allclose(found[silu_in].function(x), x / (1 + np.exp(-x)))
    assert found[pooled_in].tensor == pooled
    assert np.allclose(found[pooled_in].function(x), np.tanh(x))
    assert both_in not in found
    assert last not in found


def test_a_range_gives_little_to_what_hardly_counts(tmp_path: Path) -> None:
    """A convolution's output far below zero, a hundredth of which is left: its range must not hold all of it, and int8 gets better by that."""
    net = Net(1)
    convolved = net.conv(3, 8)
    bias = next(c for c in net.constants if list(c.dims) == [8])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(8, -2.0, np.float32), bias.name))
    net.add("LeakyRelu", alpha=0.01)
    last = net.conv(8, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))
    save_file({"image": PICTURES}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=True)
    low, high = known.ranges[convolved]["mse"]
    least, most = known.ranges[convolved]["minmax"]
    assert low > 0.8 * least
    assert high > 0.8 * most
    for method in ("entropy", "percentile"):
        assert known.ranges[convolved][method] == (low, high)

    def noise(judged: tuple[float, float]) -> float:
        ranges = {name: {"mse": methods["minmax"]} for name, methods in known.ranges.items()} | {
            convolved: {"mse": judged}
        }
        quantized = qdq.quantize(model, known._replace(ranges=ranges), RECIPE | {"in_float": [last]})
        return float(np.sum((answers(quantized) - answers(model)) ** 2))

    assert noise((low, high)) < 0.8 * noise((least, most))


def test_weights_that_make_up_for_each_other_make_less_noise_in_the_engine(tmp_path: Path) -> None:
    """Depthwise convolutions on smooth pictures: nine neighbours are alike, and what comes out tells how their weights' errors add up."""
    rng = np.random.default_rng(4)
    coarse = rng.normal(size=(24, 3, 6, 6)).astype(np.float32)
    smooth = np.repeat(np.repeat(coarse, 6, axis=2), 6, axis=3)[:, :, :32, :32]
    net = Net(2)
    net.conv(3, 3, 5, group=3)
    weight = next(c for c in net.constants if len(c.dims) == 4)
    # One large weight per channel, so that the scale is coarse for the others and they make the noise.
    values = rng.standard_t(1.5, (3, 1, 5, 5)).astype(np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    model = onnx.shape_inference.infer_shapes(net.model([1, 3, 32, 32]))
    save_file({"image": smooth[:16]}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=False)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def noise(fit: bool) -> float:
        found = qdq.quantize(model, known, RECIPE | {"ranges": "minmax", "fit_weights": fit, "weights": "reduced"})
        rounded = onnxruntime.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
        unseen = [one[None] for one in smooth[16:]]
        return sum(
            float(np.sum((rounded.run(None, {"image": x})[0] - session.run(None, {"image": x})[0]) ** 2))
            for x in unseen
        )

    assert noise(True) < 0.7 * noise(False)


@pytest.mark.parametrize("mask", [-1e4, -1e9, float(np.finfo(np.float32).min)])
def test_what_a_mask_puts_out_of_a_softmaxs_reach_takes_no_levels_from_what_it_weighs(
    tmp_path: Path, mask: float
) -> None:
    net = Net(1)
    net.conv(3, 4)
    exact = net.last
    last = np.zeros(32, np.float32)
    last[20:] = mask
    masked = net.add("Add", net.constant(last))
    net.add("Softmax", axis=-1)
    served = net.add("Add", net.constant(last), first=exact)
    model = onnx.shape_inference.infer_shapes(net.model([1, 4, 32, 32]))
    save_file({"image": PICTURES}, tmp_path / "samples")
    known = statistics.collect(model, SampleFile(str(tmp_path / "samples")), lambda *_: None, histograms=True)
    assert known.ranges[served]["minmax"][0] < 0.9 * mask  # read by another
    low, high = known.ranges[exact]["minmax"]
    for method, (least, most) in known.ranges[masked].items():
        assert low - 16 <= least <= 0, method
        assert high / 2 < most <= high, method
