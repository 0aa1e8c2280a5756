"""What is one number for all values is in the weights of convolutions, and the answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children.tidy import tidy
from support.networks import Net

PICTURE = np.random.default_rng(1).normal(size=(1, 3, 32, 32)).astype(np.float32)


def number(net: Net, value: float, shape: tuple[int, ...] = (1,)) -> str:
    return net.constant(np.full(shape, value, np.float32))


def answers(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": PICTURE})[0]


def operators(net: Net, folder: Path, side: int = 32) -> list[str]:
    """Of the tidy network, which has answered like the one that came."""
    before = net.model([1, 8, side, side], opset=17)
    path = str(folder / "network.onnx")
    onnx.save(before, path)
    tidy(path)
    after = onnx.load(path)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-4, atol=1e-4)
    read = {name for node in after.graph.node for name in node.input}
    assert {i.name for i in after.graph.initializer} <= read
    return [node.op_type for node in after.graph.node][:-1]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_factor_and_a_summand_behind_a_convolution(tmp_path: Path, shape: tuple[int, ...], swapped: bool) -> None:
    net = Net(3)
    net.conv(3, 8)
    for op, value in (("Mul", 1.7), ("Add", -0.4)):
        names = [net.last, number(net, value, shape)]
        first, second = reversed(names) if swapped else names
        net.add(op, second, first=first)
    net.add("Relu")
    assert operators(net, tmp_path) == ["Conv", "Relu"]


def test_names_that_the_network_has_already_stay_its_own(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.nodes[-1].input.pop()
    net.add("Add", number(net, 0.3))
    net.add("Relu")
    net.nodes[-1].output[0] = net.last = "n0/bias"
    net.add("Sigmoid")
    assert operators(net, tmp_path) == ["Conv", "Relu", "Sigmoid"]


def over_lines(folder: Path, steps: list[tuple[str, tuple[int, ...]]], pads: int) -> list[str]:
    """The operators of a network that makes two axes three, where it does, and convolves over a line; its answers stay."""
    weight = np.random.default_rng(2).normal(size=(2, 3, 3)).astype(np.float32)
    constants, nodes, last = [onnx.numpy_helper.from_array(weight, "weight")], [], "image"
    for place, (op, shape) in enumerate(steps):
        constants.append(onnx.numpy_helper.from_array(np.full(shape, 2, np.float32), f"number{place}"))
        nodes.append(onnx.helper.make_node(op, [last, f"number{place}"], [f"step{place}"]))
        last = f"step{place}"
    nodes.append(onnx.helper.make_node("Conv", [last, "weight"], ["out"], pads=[pads, pads]))
    line, out = (onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("image", [3, 8]), ("out", [1, 2, None])))
    graph = onnx.helper.make_graph(nodes, "lines", [line], [out], constants)
    before = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = str(folder / "network.onnx")
    onnx.save(before, path)
    tidy(path)
    after = onnx.load(path)
    picture = {"image": PICTURE[0, 0, :3, :8]}
    have, want = (
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, picture)[0]
        for one in (after, before)
    )
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    return [node.op_type for node in after.graph.node]


@pytest.mark.parametrize(
    ("steps", "pads"),
    [
        ([("Mul", (1, 1, 1))], 0),
        ([("Mul", (1, 1, 1)), ("Add", ())], 1),
        ([("Mul", ()), ("Add", (1, 1, 1))], 1),
    ],
)
def test_a_number_that_adds_an_axis_stays(tmp_path: Path, steps: list[tuple[str, tuple[int, ...]]], pads: int) -> None:
    assert over_lines(tmp_path, steps, pads) == [*(op for op, _ in steps), "Conv"]


def test_differences_and_quotients_too_and_where_there_was_no_bias(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.nodes[-1].input.pop()
    net.add("Div", number(net, -0.8))
    net.add("Sub", number(net, 0.4))
    assert operators(net, tmp_path) == ["Conv"]


@pytest.mark.parametrize("group", [1, 2, 8])
def test_behind_a_transposed_convolution(tmp_path: Path, group: int) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.add("Relu")
    weight = net.constant(net.rng.normal(size=(8, 8 // group, 2, 2)).astype(np.float32))
    net.add("ConvTranspose", weight, kernel_shape=[2, 2], strides=[2, 2], group=group)
    net.add("Mul", number(net, 3.0))
    net.add("Add", number(net, 0.5))
    assert operators(net, tmp_path, 64) == ["Conv", "Relu", "ConvTranspose"]


@pytest.mark.parametrize("group", [1, 8])
def test_behind_an_activation_it_goes_into_all_that_read_it(tmp_path: Path, group: int) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.add("Relu")
    net.add("Mul", number(net, 1.7))
    value = net.add("Add", number(net, -0.4))
    one = net.conv(8, 8, 1, group=group)
    net.last = value
    net.conv(8, 8, 1)
    net.add("Add", one)
    assert operators(net, tmp_path) == ["Conv", "Relu", "Conv", "Conv", "Add"]


def test_of_what_the_network_is_given_the_factor_goes_and_a_summand_before_a_frame_of_zeros_stays(
    tmp_path: Path,
) -> None:
    net = Net(3)
    net.add("Sub", number(net, 0.5))
    net.add("Div", number(net, 0.25))
    net.conv(3, 8)
    assert operators(net, tmp_path) == ["Sub", "Conv"]


@pytest.mark.parametrize("op", ["Add", "Sub"])
def test_a_factor_passes_a_summand_that_stays(tmp_path: Path, op: str) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.add("Relu")
    net.add("Mul", number(net, 1.7))
    net.add(op, number(net, -0.4))
    net.conv(8, 8)
    assert operators(net, tmp_path) == ["Conv", "Relu", "Add", "Conv"]


def test_a_weight_that_others_read_is_theirs_still(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.conv(8, 8)
    net.add("Mul", number(net, 2.0))
    net.add("Relu")
    shared = net.nodes[1]
    net.add("Conv", shared.input[1], shared.input[2], pads=[1] * 4)
    assert operators(net, tmp_path) == ["Conv", "Conv", "Relu", "Conv"]


def read_twice(net: Net) -> None:
    value = net.conv(3, 8)
    net.add("Mul", number(net, 2.0))
    net.add("Add", value)
    net.add("Relu")


def read_by_others(net: Net) -> None:
    net.conv(3, 8)
    value = net.add("Relu")
    scaled = net.add("Mul", number(net, 2.0))
    net.conv(8, 8)
    net.add("Add", scaled)
    net.add("Add", value)


def too_far(net: Net) -> None:
    net.conv(3, 8)
    net.add("Relu")
    net.add("Div", number(net, 255.0))
    net.conv(8, 8)


def of_another_shape(net: Net) -> None:
    net.conv(3, 8)
    net.add("Relu")
    net.add("Mul", net.constant(np.linspace(1, 2, 32, dtype=np.float32)))
    net.conv(8, 8)


def the_other_way_round(net: Net) -> None:
    net.conv(3, 8)
    net.add("Abs")
    net.add("Add", number(net, 1.0))
    net.add("Div", net.last, first=number(net, 2.0))
    net.conv(8, 8)
    net.add("Sub", net.last, first=number(net, 2.0))


@pytest.mark.parametrize("make", [read_twice, read_by_others, too_far, of_another_shape, the_other_way_round])
def test_what_can_not_go_stays(tmp_path: Path, make: Callable[[Net], None]) -> None:
    net = Net(3)
    make(net)
    expected = [node.op_type for node in net.nodes]
    assert operators(net, tmp_path) == expected


def test_what_a_branch_reads_stays(tmp_path: Path) -> None:
    net = Net(3)
    value = net.conv(3, 8)
    net.add("Mul", number(net, 2.0))
    scaled = net.add("Relu")
    info = onnx.helper.make_tensor_value_info
    branches = [
        onnx.helper.make_graph(
            [onnx.helper.make_node(op, [value, scaled], [name], name=name)], name, [],
            [info(name, onnx.TensorProto.FLOAT, [1, 8, 32, 32])],
        )
        for name, op in (("then", "Add"), ("else", "Sub"))
    ]  # fmt: skip
    net.add("If", first=net.constant(np.array(True)), then_branch=branches[0], else_branch=branches[1])
    assert operators(net, tmp_path) == ["Conv", "Mul", "Relu", "If"]


@pytest.mark.parametrize("seed", range(12))
def test_any_chain_answers_the_same(tmp_path: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    net = Net(seed)
    net.conv(3, 8)
    for _ in range(12):
        match chance.integers(5):
            case 0:
                net.conv(8, 8, int(chance.choice([1, 3])), group=int(chance.choice([1, 8])))
            case 1:
                net.add(str(chance.choice(["Relu", "HardSwish", "Abs"])))
            case 2:
                shape = [(), (1,), (1, 8, 1, 1)][chance.integers(3)]
                net.add(str(chance.choice(["Mul", "Div"])), number(net, float(chance.uniform(0.3, 3)), shape))
            case _:
                net.add(str(chance.choice(["Add", "Sub"])), number(net, float(chance.normal())))
    found = operators(net, tmp_path)
    assert not {("Conv", "Add"), ("Conv", "Sub")} & {*pairwise(found)}
