"""A factor and a summand of a rounded value are another scale and zero point of it: nothing is computed, and the answers come nearer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import qdq
from edgefleet_controller.compile.children.rescaled import settle_ranges
from support.int8 import RECIPE, answers, db, kernels, known_of
from support.networks import Net

ALIGNED = RECIPE | {"aligned_channels": True}
STEPS = ("Add", "Sub", "Mul", "Div")


def number(net: Net, value: float) -> str:
    return net.constant(np.float32([value]))


def inferred(net: Net) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))


def quantized(net: Net, folder: Path, **told: Any) -> tuple[onnx.ModelProto, float, float]:
    """(the network in int8, its signal to noise, that of the same with a second rounding)."""
    model = inferred(net)
    known, wanted = known_of(model, folder), answers(model)
    one = qdq.quantize(model, known, ALIGNED | told)
    onnx.checker.check_model(one, full_check=True)
    twice = qdq.quantize(model, known, ALIGNED | told | {"gates_in_int8": False})
    return one, db(answers(one), wanted), db(answers(twice), wanted)


def learned(net: Net, factor: float = 1.0, summand: float = 0.3) -> None:
    if factor != 1.0:
        net.add("Mul", number(net, factor))
    net.add("Add" if summand > 0 else "Sub", number(net, abs(summand)))


def left(model: onnx.ModelProto) -> list[str]:
    """The names of steps over all values, but for gates' own."""
    return [node.name for node in model.graph.node if node.op_type in STEPS and not node.name.endswith("/sum")]


@pytest.mark.parametrize("factor", [1.0, 0.4, 2.5])
@pytest.mark.parametrize(("activation", "summand"), [("HardSwish", 1.1), ("HardSwish", -1.0), ("Relu", -2.0)])
def test_before_a_frame_of_zeros(tmp_path: Path, activation: str, factor: float, summand: float) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add(activation)
    learned(net, factor, summand)
    net.conv(16, 8)
    model, once, twice = quantized(net, tmp_path)
    assert len(left(model)) == (activation == "HardSwish")  # its product
    assert once > max(twice - 0.5, 25)


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_what_a_range_stands_for_ends_where_it_ended(tmp_path: Path, activation: str) -> None:
    """Levels below zero would let pass what a Relu does not."""
    net = Net(3)
    net.conv(3, 16)
    net.relu6() if activation == "Clip" else net.add(activation)
    learned(net, 1.0, 1.1)
    net.conv(16, 8)
    _, once, twice = quantized(net, tmp_path)
    assert once > max(twice - 0.5, 25)


def test_the_engine_goes_to_float_no_more(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add("HardSwish")
    learned(net, 0.8, 0.3)
    net.conv(16, 16, group=16)
    net.add("HardSwish")
    learned(net, 1.2, -0.3)
    net.conv(16, 8)
    model, _, _ = quantized(net, tmp_path)
    ran = kernels(model, tmp_path)
    assert ran.count("QLinearConv") == 3
    assert ran.count("QuantizeLinear") == ran.count("DequantizeLinear") == 1


def test_of_pictures_that_the_network_normalizes_itself(tmp_path: Path) -> None:
    net = Net(3)
    net.add("Sub", number(net, 0.5))
    net.add("Div", number(net, 0.25))
    net.conv(3, 8)
    model, once, twice = quantized(net, tmp_path)
    assert not left(model)
    assert once > twice - 0.5


def test_who_weighs_channels_by_their_mean_reads_it_so_too(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add("HardSwish")
    learned(net, 0.4, 0.3)
    features = net.last
    net.add("GlobalAveragePool")
    net.conv(16, 16, 1)
    net.add("HardSigmoid")
    net.add("Mul", net.last, first=features)
    net.conv(16, 8)
    model, once, twice = quantized(net, tmp_path)
    assert len(left(model)) == 2  # products
    assert once > twice - 1.5  # whose gate is in float


def read_by_others(net: Net) -> None:
    value = net.last
    learned(net)
    net.conv(16, 16)
    net.add("Add", value)


def negative(net: Net) -> None:
    net.add("Mul", number(net, -1.5))
    net.conv(16, 16)


def less_than_a_level(net: Net) -> None:
    learned(net, summand=1e-4)
    net.conv(16, 16)


def by_channel(net: Net) -> None:
    net.add("Add", net.constant(np.linspace(0.1, 0.5, 16, dtype=np.float32).reshape(1, 16, 1, 1)))
    net.conv(16, 16)


@pytest.mark.parametrize("make", [read_by_others, negative, less_than_a_level, by_channel])
def test_what_says_nothing_exactly_is_computed(tmp_path: Path, make: Callable[[Net], None]) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add("Relu")
    make(net)
    net.conv(16, 8)
    model, once, twice = quantized(net, tmp_path)
    assert left(model)
    assert once > twice - 0.5


@pytest.mark.parametrize("told", [{"activations": "symmetric"}, {"in_float": ["n2", "n3"]}, {"in_float": ["n3"]}])
def test_where_a_value_is_not_rounded_so_the_answers_are_right_still(tmp_path: Path, told: dict[str, Any]) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add("Relu")
    learned(net)
    net.conv(16, 16)
    net.conv(16, 8)
    _, once, twice = quantized(net, tmp_path, **told)
    assert once > max(twice - 0.5, 20)


@pytest.mark.parametrize("seed", range(40))
def test_both_ranges_have_the_same_levels(seed: int) -> None:
    chance = np.random.default_rng(seed)
    low, high = -float(chance.uniform(0, 3)), float(chance.uniform(0.1, 9))
    factor, summand = float(chance.uniform(0.2, 4)), float(chance.normal(scale=2))
    net = Net(3)
    net.add("Abs")
    value = net.last
    learned(net, factor, summand)
    read = net.last
    net.conv(3, 8)
    ranges = {value: [low, high], read: [0.0, 1.0], "n1": [0.0, 1.0], "image": [-1.0, 1.0]}
    found = settle_ranges(inferred(net), set(), ranges)
    if read not in found:
        assert ranges[value] == [low, high]
        return
    scale, scale_read = ((ranges[name][1] - ranges[name][0]) / 255 for name in (value, read))
    zero, zero_read = -ranges[value][0] / scale, -ranges[read][0] / scale_read
    for number_read in (zero, zero_read, zero - summand / factor / scale):
        assert number_read == pytest.approx(round(number_read), abs=1e-4)
        assert 0 <= round(number_read) <= 255
    assert scale_read == pytest.approx(factor * scale)
    assert zero_read == pytest.approx(zero - summand / factor / scale, abs=1e-4)
    assert ranges[value][0] <= low + 0.021 * (high - low) + 1.1 * scale
    assert ranges[value][1] >= high - 0.021 * (high - low) - 1.1 * scale


@pytest.mark.parametrize("behind", ["Relu", "Sigmoid"])
def test_a_number_that_adds_an_axis_stays(tmp_path: Path, behind: str) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add("Flatten")
    net.add(behind)
    net.add("Add", net.constant(np.full((1, 1, 1), 0.3, np.float32)))
    net.add("MatMul", net.constant((net.rng.normal(size=(16 * 32 * 32, 8)) / 128).astype(np.float32)))
    model = onnx.shape_inference.infer_shapes(net.model([1, 1, 8], opset=14))
    known, wanted = known_of(model, tmp_path), answers(model)
    have = answers(qdq.quantize(model, known, RECIPE))
    assert have.shape == wanted.shape
    assert db(have, wanted) > 25
