"""Layers that int8 hurts: an operator goes with its activation, in whatever pieces the network has that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import sensitivity, statistics
from edgefleet_controller.compile.children.measure import SampleFile
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

PICTURES = np.random.default_rng(5).normal(size=(4, 3, 16, 16)).astype(np.float32)
RECIPE = {
    "ranges": "minmax",
    "weights": "full",
    "granularity": "channel",
    "correct_bias": True,
    "fit_weights": True,
    "fused_activations": False,
}
PARTS = [{"output": "y"}]


def network(activation: list[tuple[str, list[str]]]) -> onnx.ModelProto:
    """conv0, then ``activation`` (operators with what they read: ``v`` is the convolution's output, ``2`` a constant, ``n`` the n-th operator's
    output), then conv1, then an addition of both convolutions' outputs."""
    own = np.random.default_rng(6)  # whichever tests ran before
    constants = {
        "w0": own.normal(size=(8, 3, 3, 3)), "w1": own.normal(size=(8, 8, 3, 3)), "2": np.array(2.0),
    }  # fmt: skip
    nodes = [helper.make_node("Conv", ["x", "w0"], ["v"], name="conv0", pads=[1] * 4)]
    last = "v"
    for number, (op, reads) in enumerate(activation):
        last = f"a{number}"
        nodes.append(helper.make_node(op, reads, [last], name=last))
    nodes += [
        helper.make_node("Conv", [last, "w1"], ["c"], name="conv1", pads=[1] * 4),
        helper.make_node("Add", [last, "c"], ["y"], name="sum"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 8, 16, 16])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def units(model: onnx.ModelProto, tmp_path: Path, parts: Any = PARTS, **recipe: str) -> dict[tuple[str, ...], float]:
    save_file({"x": PICTURES}, tmp_path / "samples.safetensors")
    samples = SampleFile(str(tmp_path / "samples.safetensors"))
    known = statistics.collect(model, samples, lambda *_: None, histograms=False)
    found = sensitivity.measure(model, known, [samples[0]], RECIPE | recipe, parts, lambda *_: None)
    return {tuple(one["nodes"]): one["noise"] for one in found}


@pytest.mark.parametrize(
    ("activation", "with_it"),
    [
        ([("LeakyRelu", ["v"])], ("a0",)),
        ([("Sigmoid", ["v"]), ("Mul", ["v", "a0"])], ("a0", "a1")),
        ([("Add", ["v", "2"]), ("Clip", ["a0"]), ("Mul", ["v", "a1"])], ("a0", "a1", "a2")),
        ([], ()),
    ],
)
def test_a_weighted_operator_and_its_activation_are_one_unit(
    tmp_path: Path, activation: list[tuple[str, list[str]]], with_it: tuple[str, ...]
) -> None:
    found = units(network(activation), tmp_path)
    assert set(map(frozenset, found)) == {frozenset({"conv0", *with_it}), frozenset({"conv1"}), frozenset({"sum"})}
    assert all(noise > 0 for noise in found.values())


def test_a_sum_of_two_branches_is_nobodys_activation(tmp_path: Path) -> None:
    assert ("sum",) in units(network([("LeakyRelu", ["v"])]), tmp_path)


def test_products_of_computed_values_are_a_kind_that_is_split_where_it_is_loud(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["m0"], name="m0"),
        helper.make_node("MatMul", ["m0", "x"], ["y"], name="m1"),
    ]
    shape = [1, 3, 16, 16]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert set(units(onnx.shape_inference.infer_shapes(model), tmp_path)) == {("m0",), ("m1",)}


def test_where_int8_operators_write_int8_a_loud_reader_has_its_maker_with_it(tmp_path: Path) -> None:
    """The values between are spread wide, the weights are not: rounding what is read is what hurts."""
    model = network([("Relu", ["v"])])
    constants = {i.name: i for i in model.graph.initializer}
    wide, narrow = (numpy_helper.to_array(constants[name]).copy() for name in ("w0", "w1"))
    wide[0] *= 300
    narrow[:, 0] = 0
    for name, value in (("w0", wide), ("w1", narrow)):
        constants[name].CopyFrom(numpy_helper.from_array(value, name))
    save_file({"x": PICTURES}, tmp_path / "samples.safetensors")
    samples = SampleFile(str(tmp_path / "samples.safetensors"))
    known = statistics.collect(model, samples, lambda *_: None, histograms=False)
    parts = [{"output": "y", "axis": 1, "begin": 1, "end": 8}]
    for with_makers in (False, True):
        found = sensitivity.measure(model, known, [samples[0]], RECIPE, parts, lambda *_: None, with_makers=with_makers)
        (reader,) = [one for one in found if "conv1" in one["nodes"]]
        assert set(reader["nodes"]) == ({"conv1", "conv0", "a0"} if with_makers else {"conv1"})
        assert reader["weight_bytes"] == 4 * (wide.size * with_makers + narrow.size)


def test_a_layer_is_as_loud_as_the_recipes_scales_make_it(tmp_path: Path) -> None:
    """One scale for all channels leaves nothing of the faint ones."""
    model = network([])
    (weight,) = [i for i in model.graph.initializer if i.name == "w0"]
    spread = 10.0 ** -np.arange(8.0)[:, None, None, None] / 2
    weight.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(weight) * spread).astype(np.float32), "w0"))
    by_channel, by_tensor = (units(model, tmp_path, granularity=told)["conv0",] for told in ("channel", "tensor"))
    assert by_tensor > 1.2 * by_channel


def test_boxes_that_only_change_places_are_no_noise(tmp_path: Path) -> None:
    """16 boxes of one class in the order of scores that differ by less than a step of int8."""
    own = np.random.default_rng(7)  # whichever tests ran before
    weights = {
        "wb": own.normal(size=(4, 3, 4, 4)), "ws": 0.01 * own.normal(size=(1, 3, 4, 4)), "bs": np.array([0.9]), "one": np.array(0.0),
    }  # fmt: skip
    whole = {"by4": [1, 4, 16], "by1": [1, 16], "16": [16], "2": [2], "rows": [1, 16, 4], "seen": [1, 3, 16, 16]}
    nodes = [
        helper.make_node("Conv", ["x", "wb"], ["b"], name="boxes", strides=[4, 4]),
        helper.make_node("Conv", ["x", "ws", "bs"], ["s"], name="scores", strides=[4, 4]),
        helper.make_node("Reshape", ["b", "by4"], ["b4"], name="r0"),
        helper.make_node("Transpose", ["b4"], ["bt"], name="t", perm=[0, 2, 1]),
        helper.make_node("Reshape", ["s", "by1"], ["s1"], name="r1"),
        helper.make_node("TopK", ["s1", "16"], ["best", "places"], name="top", axis=1),
        helper.make_node("Unsqueeze", ["places", "2"], ["p"], name="u0"),
        helper.make_node("Expand", ["p", "rows"], ["p4"], name="e"),
        helper.make_node("GatherElements", ["bt", "p4"], ["found"], name="g", axis=1),
        helper.make_node("Unsqueeze", ["best", "2"], ["score"], name="u1"),
        helper.make_node("Mul", ["score", "one"], ["kind"], name="k"),
        helper.make_node("Concat", ["found", "score", "kind"], ["y"], name="c", axis=2),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, whole["seen"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 16, 6])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
        + [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in whole.items()],
    )  # fmt: skip
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    )
    places = {"output": "y", "axis": 2, "begin": 0, "end": 4}
    by_place, as_boxes = (units(model, tmp_path, parts=[{**places, **more}]) for more in ({}, {"found_from": 0.5}))
    assert by_place["top",] > 1000 * by_place["boxes",]
    assert as_boxes["top",] == 0 < as_boxes["boxes",]
