"""PRelus in operators that onnxruntime is fast at answer as PRelus do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children import ort
from edgefleet_controller.compile.children.slopes import slopes_apart
from edgefleet_controller.compile.children.tidy import tidy
from support.networks import Net

PICTURE = np.random.default_rng(1).normal(size=(1, 3, 32, 32)).astype(np.float32)
SLOPES = np.linspace(-0.4, 0.7, 8, dtype=np.float32)


def answers(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": PICTURE})[0]


def prelu(net: Net, slopes: Any) -> str:
    return net.add("PRelu", net.constant(np.asarray(slopes, np.float32)))


def apart(net: Net) -> tuple[bool, list[str]]:
    """(whether there was anything to do, the operators then), answers being the same."""
    before = net.model([1, 8, 32, 32])
    after = onnx.ModelProto.FromString(before.SerializeToString())
    done = slopes_apart(after.graph)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-4, atol=1e-5)
    assert len({node.name for node in after.graph.node}) == len(after.graph.node)
    return done, [node.op_type for node in after.graph.node][:-1]


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_behind_a_convolution(shape: tuple[int, ...], bias: bool) -> None:
    net = Net(3)
    net.conv(3, 8)
    if not bias:
        net.nodes[-1].input.pop()
    prelu(net, SLOPES.reshape(shape))
    net.conv(8, 8, group=8)
    prelu(net, SLOPES[::-1].reshape(shape))
    assert apart(net) == (True, ["Conv", "Relu", "Conv", "Add"] * 2)


def too_steep(net: Net) -> None:
    net.conv(3, 8)
    prelu(net, np.r_[SLOPES[:-1], 1.0].reshape(8, 1, 1))


def read_by_others(net: Net) -> None:
    value = net.conv(3, 8)
    prelu(net, SLOPES.reshape(8, 1, 1))
    net.add("Add", value)


def behind_a_sum(net: Net) -> None:
    net.conv(3, 8)
    net.add("Add", net.last)
    prelu(net, SLOPES.reshape(8, 1, 1))


def by_column(net: Net) -> None:
    net.conv(3, 8)
    prelu(net, np.linspace(0.1, 0.5, 32))


def by_place(net: Net) -> None:
    net.conv(3, 8)
    prelu(net, np.random.default_rng(2).uniform(0, 0.5, (8, 32, 32)))


def falling(net: Net) -> None:
    """A channel that is never below zero has any slope, and all of it would get lost among millions of times as much."""
    net.conv(3, 8)
    net.constants[-1] = onnx.numpy_helper.from_array(np.full(8, 50, np.float32), net.nodes[-1].input[2])
    prelu(net, np.array([-1e6] + [0.1] * 7).reshape(8, 1, 1))


@pytest.mark.parametrize("make", [too_steep, falling, read_by_others, behind_a_sum, by_column, by_place])
def test_others_stay(make: Callable[[Net], None]) -> None:
    net = Net(3)
    make(net)
    expected = [node.op_type for node in net.nodes]
    assert apart(net) == (False, expected)


@pytest.mark.parametrize("taken", ["weight", "slopes", "bias"])
def test_names_that_the_network_has_already_stay_its_own(taken: str) -> None:
    """Two PRelus read one constant, which is named as what replaces the first would be."""
    net = Net(3)
    net.conv(3, 8)
    slopes = net.constant(SLOPES.reshape(8, 1, 1), f"n1/{taken}")
    net.add("PRelu", slopes)
    net.add("Sigmoid")
    net.add("PRelu", slopes)
    assert apart(net) == (True, ["Conv", "Relu", "Conv", "Add", "Sigmoid", "PRelu"])


def test_what_reads_nothing_is_no_hindrance() -> None:
    """Such as random numbers, for which a network is refused in words further on."""
    drawn = onnx.helper.make_node("RandomNormal", [], ["drawn"], name="drawn", shape=[1, 3, 32, 32])
    drawing = onnx.helper.make_graph([drawn], "drawing", [], [])
    assert not slopes_apart(drawing)


@pytest.mark.parametrize("slopes", [[0.2], np.full((8, 1, 1), 0.2), np.full((1, 1, 1), -0.3)])
def test_one_slope_for_all_is_a_leaky_relu(tmp_path: Path, slopes: Any) -> None:
    net = Net(3)
    net.conv(3, 8)
    prelu(net, slopes)
    before, path = net.model([1, 8, 32, 32]), tmp_path / "network.onnx"
    onnx.save(before, path)
    tidy(str(path))
    after = onnx.load(path)
    assert [node.op_type for node in after.graph.node] == ["Conv", "LeakyRelu", "Identity"]
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-5)


@pytest.mark.parametrize(("slopes", "written"), [(SLOPES, True), (np.full(8, 0.2), False)])
def test_a_form_is_written_where_it_is_another(tmp_path: Path, slopes: Any, written: bool) -> None:
    net = Net(3)
    net.conv(3, 8)
    prelu(net, slopes.reshape(8, 1, 1))
    before = net.model([1, 8, 32, 32])
    onnx.save(before, tmp_path / "network.onnx")
    tidy(str(tmp_path / "network.onnx"))
    request = {"network": str(tmp_path / "network.onnx"), "formed": str(tmp_path / "formed.onnx")}
    assert ort.form(request, lambda *_: None) == {"formed": written}
    assert (tmp_path / "formed.onnx").exists() == written
    if written:
        formed = onnx.load(tmp_path / "formed.onnx")
        np.testing.assert_allclose(answers(formed), answers(before), rtol=1e-4, atol=1e-5)
        read = {name for node in formed.graph.node for name in node.input}
        assert {i.name for i in formed.graph.initializer} <= read
