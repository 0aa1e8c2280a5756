"""One number for each channel is a convolution of one tap, and the answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import qdq
from edgefleet_controller.compile.children.scaled import scale_by_convolutions
from support.int8 import RECIPE, answers, db, kernels, known_of
from support.networks import Net

FACTORS = np.linspace(0.5, 2, 8, dtype=np.float32)
SUMMANDS = np.linspace(-1, 1, 8, dtype=np.float32)


def normalized(net: Net) -> None:
    values = [FACTORS, SUMMANDS, SUMMANDS[::-1] / 3, FACTORS[::-1] * 2]
    net.add("BatchNormalization", *(net.constant(np.ascontiguousarray(one)) for one in values), epsilon=1e-3)


def scaled(net: Net, *steps: str, shape: tuple[int, ...] = (1, 8, 1, 1), swapped: bool = False) -> None:
    for step in steps:
        numbers = net.constant((FACTORS if step in ("Mul", "Div") else SUMMANDS).reshape(shape))
        if swapped:
            net.add(step, net.last, first=numbers)
        else:
            net.add(step, numbers)


def model_of(make: Callable[[Net], None]) -> onnx.ModelProto:
    """Convolution, activation, what is made, activation, convolution."""
    net = Net(3)
    net.conv(3, 8)
    net.add("Relu")
    make(net)
    net.add("Relu")
    net.conv(8, 8)
    return onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=15))


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node][:-1]


@pytest.mark.parametrize(
    "make",
    [
        normalized,
        lambda net: scaled(net, "Mul", "Add"),
        lambda net: scaled(net, "Add", "Mul", shape=(8, 1, 1)),
        lambda net: scaled(net, "Div", "Sub"),
        lambda net: scaled(net, "Mul", swapped=True),
        lambda net: scaled(net, "Sub", shape=(8, 1, 1)),
    ],
)
def test_they_are_convolutions(make: Callable[[Net], None]) -> None:
    before = model_of(make)
    after = onnx.ModelProto.FromString(before.SerializeToString())
    assert scale_by_convolutions(after)
    onnx.checker.check_model(after, full_check=True)
    assert operators(after) == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-4, atol=1e-5)


def read_between(net: Net) -> None:
    scaled(net, "Mul")
    between = net.last
    scaled(net, "Add")
    net.add("Add", between)


def test_what_is_read_between_two_steps_is_made(tmp_path: Path) -> None:
    before = model_of(read_between)
    after = onnx.ModelProto.FromString(before.SerializeToString())
    assert scale_by_convolutions(after)
    assert operators(after) == ["Conv", "Relu", "Conv", "Conv", "Add", "Relu", "Conv"]
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-4, atol=1e-5)


def by_place(net: Net) -> None:
    net.add("Mul", net.constant(np.linspace(1, 2, 32, dtype=np.float32)))


def by_number(net: Net) -> None:
    net.add("Mul", net.constant(np.float32([2.0])))


def by_computed(net: Net) -> None:
    value = net.last
    net.add("GlobalAveragePool")
    net.add("Mul", value)


def turned_over(net: Net) -> None:
    scaled(net, "Div", swapped=True)


def by_zero(net: Net) -> None:
    net.add("Div", net.constant(np.r_[FACTORS[:-1], 0].astype(np.float32).reshape(1, 8, 1, 1)))


def in_windows(net: Net) -> None:
    """More axes than a convolution goes along."""
    net.add("Reshape", net.constant(np.array([1, 8, 4, 8, 4, 8])))
    scaled(net, "Mul", shape=(1, 8, 1, 1, 1, 1))
    net.add("Reshape", net.constant(np.array([1, 8, 32, 32])))


@pytest.mark.parametrize("make", [by_place, by_number, by_computed, turned_over, by_zero, in_windows])
def test_others_stay(make: Callable[[Net], None]) -> None:
    model = model_of(make)
    before = operators(model)
    assert not scale_by_convolutions(model)
    assert operators(model) == before


def test_a_picture_is_normalized_in_float() -> None:
    net = Net(3)
    net.add("Mul", net.constant(np.float32([0.5, 1, 2]).reshape(1, 3, 1, 1)))
    net.conv(3, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))
    assert not scale_by_convolutions(model)


@pytest.mark.parametrize("make", [normalized, lambda net: scaled(net, "Mul", "Add")])
def test_they_are_in_int8_and_as_exact(tmp_path: Path, make: Callable[[Net], None]) -> None:
    before = model_of(make)
    after = onnx.ModelProto.FromString(before.SerializeToString())
    assert scale_by_convolutions(after)
    models = (before, onnx.shape_inference.infer_shapes(after))
    found = [qdq.quantize(model, known_of(model, tmp_path), RECIPE) for model in models]
    in_float, in_int8 = (db(answers(one), answers(before)) for one in found)
    assert in_int8 > max(in_float - 1, 25)
    ran = kernels(found[1], tmp_path)
    assert ran.count("QLinearConv") == 3
    assert ran.count("QuantizeLinear") == ran.count("DequantizeLinear") == 1
