"""Gates that came in pieces are whole, and answer as the pieces did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children.tidy import tidy
from support.networks import Net

PICTURE = np.random.default_rng(1).normal(scale=4, size=(1, 3, 32, 32)).astype(np.float32)


def number(net: Net, value: float) -> str:
    return net.constant(np.float32(value))


def saturated(net: Net, summand: float = 3, low: float = 0, high: float = 6, *, swapped: bool = False) -> str:
    first, second = net.last, number(net, summand)
    if swapped:
        first, second = second, first
    net.add("Add", second, first=first)
    return net.add("Clip", number(net, low), number(net, high))


def by_paddle(net: Net, **told: Any) -> None:
    value = net.last
    saturated(net, **told)
    net.add("Mul", net.last, first=value)
    net.add("Div", number(net, 6))


def by_torch(net: Net, **told: Any) -> None:
    value = net.last
    saturated(net, **told)
    net.add("Div", number(net, 6))
    net.add("Mul", net.last, first=value)


def by_a_factor(net: Net, **told: Any) -> None:
    value = net.last
    saturated(net, **told)
    net.add("Mul", value)
    net.add("Mul", net.last, first=number(net, 1 / 6))


def sigmoid(net: Net, **told: Any) -> None:
    saturated(net, **told)
    net.add("Div", number(net, 6))


def answers(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": PICTURE})[0]


def tidied(net: Net, folder: Path, outputs: int = 8) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    before = net.model([1, outputs, 32, 32], opset=17)
    path = str(folder / "network.onnx")
    onnx.save(before, path)
    tidy(path)
    after = onnx.load(path)
    onnx.checker.check_model(after, full_check=True)
    return before, after


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("make", [by_paddle, by_torch, by_a_factor, sigmoid])
def test_gates_are_put_together(tmp_path: Path, make: Callable[..., None], swapped: bool) -> None:
    net = Net(3)
    net.conv(3, 8)
    make(net, swapped=swapped)
    net.conv(8, 8)
    before, after = tidied(net, tmp_path)
    operators = [node.op_type for node in after.graph.node]
    assert operators == ["Conv", "HardSigmoid", *(["Mul"] if make is not sigmoid else []), "Conv", "Identity"]
    np.testing.assert_allclose(answers(after), answers(before), atol=1e-4)
    assert len({node.name for node in after.graph.node}) == len(after.graph.node)


@pytest.mark.parametrize("summand", [2.5, 0.0, -1.0])
def test_a_gate_may_begin_elsewhere(tmp_path: Path, summand: float) -> None:
    net = Net(3)
    net.conv(3, 8)
    by_torch(net, summand=summand)
    before, after = tidied(net, tmp_path)
    assert "HardSigmoid" in [node.op_type for node in after.graph.node]
    np.testing.assert_allclose(answers(after), answers(before), atol=1e-5)


def ends_elsewhere(net: Net) -> None:
    by_torch(net, high=5)


def begins_above(net: Net) -> None:
    by_torch(net, low=0.5)


def read_twice(net: Net) -> None:
    value = net.last
    clip = saturated(net)
    net.add("Mul", value)
    net.add("Div", number(net, 6))
    net.add("Add", clip)


def by_channel(net: Net) -> None:
    value = net.last
    net.add("Add", net.constant(np.linspace(2, 4, 8, dtype=np.float32).reshape(1, 8, 1, 1)))
    net.add("Clip", number(net, 0), number(net, 6))
    net.add("Mul", value)
    net.add("Div", number(net, 6))


def of_another(net: Net) -> None:
    other = net.conv(8, 8)
    net.conv(8, 8)
    saturated(net)
    net.add("Mul", other)
    net.add("Div", number(net, 6))


def the_other_way_round(net: Net) -> None:
    saturated(net)
    net.add("Div", net.last, first=number(net, 6))


@pytest.mark.parametrize(
    "make", [ends_elsewhere, begins_above, read_twice, by_channel, of_another, the_other_way_round]
)
def test_what_is_no_gate_stays(tmp_path: Path, make: Callable[[Net], None]) -> None:
    net = Net(3)
    net.conv(3, 8)
    make(net)
    _, after = tidied(net, tmp_path)
    assert "HardSigmoid" not in [node.op_type for node in after.graph.node]


def test_what_is_served_stays(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 8)
    value = net.last
    clip = saturated(net)
    net.add("Mul", value)
    net.add("Div", number(net, 6))
    model = net.model([1, 8, 32, 32], opset=17)
    model.graph.output.append(onnx.helper.make_tensor_value_info(clip, onnx.TensorProto.FLOAT, [1, 8, 32, 32]))
    path = str(tmp_path / "network.onnx")
    onnx.save(model, path)
    tidy(path)
    assert "Clip" in [node.op_type for node in onnx.load(path).graph.node]
