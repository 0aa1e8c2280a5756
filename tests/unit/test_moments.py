"""What weighted operators read: every tap in its place, whatever strides, pads, groups and axes there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children import gathered, moments
from edgefleet_controller.compile.children.fitting import fitted
from edgefleet_controller.compile.children.moments import Gathering, Moments
from edgefleet_controller.compile.children.weights import channel_scales, rounded
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(2)


def one_operator(op: str, x: tuple[int, ...], weight: tuple[int, ...], **attributes: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="it", **attributes)], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(RNG.normal(size=weight).astype(np.float32), "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def answers(model: onnx.ModelProto, x: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


CASES = [
    ("Conv", (1, 6, 8, 7), (4, 6, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("Conv", (1, 6, 9, 9), (6, 1, 3, 3), {"group": 6, "pads": [1] * 4}),
    ("Conv", (1, 6, 9, 9), (12, 1, 3, 3), {"group": 6, "dilations": [2, 2]}),
    ("Conv", (1, 6, 9, 9), (4, 3, 3, 3), {"group": 2}),
    ("Conv", (1, 3, 7, 8), (4, 3, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", (1, 3, 7, 8), (4, 3, 4, 2), {"auto_pad": "SAME_LOWER"}),
    ("Conv", (1, 5, 9), (4, 5, 3), {"pads": [1, 1]}),
    ("Conv", (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {}),
    ("Gemm", (1, 7), (5, 7), {"transB": 1}),
    ("Gemm", (1, 7), (7, 5), {}),
    ("MatMul", (1, 6, 7), (7, 5), {}),
]


@pytest.mark.parametrize(("op", "shape", "weight", "attributes"), CASES)
def test_moments_tell_what_comes_out_on_average(
    op: str, shape: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    model = one_operator(op, shape, weight, **attributes)
    gathering, outputs = Gathering(model), []
    for _ in range(5):  # so few places that all are looked at
        x = RNG.normal(1.0, 1.0, shape).astype(np.float32)
        gathering.add({"x": x})
        outputs.append(answers(model, x))
    found = gathering.moments()[gathering.of["it"]]
    out = np.concatenate(outputs).astype(np.float64)
    values = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)
    across = op == "MatMul" or (op == "Gemm" and not attributes.get("transB"))
    channels = out.shape[-1] if op != "Conv" else out.shape[1]
    by_channel = np.moveaxis(out, -1 if op != "Conv" else 1, 0).reshape(channels, -1)
    rows = (values.T if across else values).reshape(channels, -1)
    group = np.arange(channels) // (channels // len(found.mean))
    means = (rows * found.mean[group]).sum(axis=1)
    assert means == pytest.approx(by_channel.mean(axis=1), abs=1e-3)
    power = np.einsum("oi,oij,oj->o", rows, found.covariance[group].astype(np.float64), rows)
    assert power == pytest.approx(by_channel.var(axis=1), rel=1e-3, abs=1e-3)


def test_operators_that_read_the_same_in_one_way_share_moments() -> None:
    nodes = [helper.make_node("MatMul", ["x", w], [f"y{w}"], name=w) for w in ("q", "k")]
    nodes.append(helper.make_node("MatMul", ["yq", "k"], ["z"], name="other"))
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), name) for name in ("q", "k")]
    gathering = Gathering(onnx.ModelProto(graph=helper.make_graph(nodes, "g", [], [], weights)))
    assert gathering.of["q"] == gathering.of["k"] != gathering.of["other"]


def test_what_is_not_a_number_counts_as_nothing() -> None:
    gathering = Gathering(one_operator("Gemm", (1, 2), (2, 3)))
    gathering.add({"x": np.array([[np.inf, 2.0]], np.float32)})
    gathering.add({"x": np.array([[np.nan, 4.0]], np.float32)})
    assert gathering.moments()[gathering.of["it"]].mean.tolist() == [[0.0, 3.0]]


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("seed", range(6))
def test_reads_that_are_the_same_in_every_sample_do_not_vary(seed: int, size: float) -> None:
    """A side input that never changes: squares of large numbers leave a remainder, which may lie below zero, and no matrix of that is a variance's."""
    model = one_operator("Gemm", (1, 37), (37, 5))
    gathering, x = (
        Gathering(model),
        np.random.default_rng(seed).normal(size=(1, 37)).astype(np.float32) * np.float32(size),
    )
    for _ in range(40):
        gathering.add({"x": x})
    found = gathering.moments()[gathering.of["it"]]
    assert found.mean == pytest.approx(x, rel=1e-6)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    scales = channel_scales(weight, 1, "full")
    nearest = rounded(weight, scales, 1)
    assert np.allclose(fitted(weight, scales, 1, found, centred=True), nearest, atol=1e-6)
    # So it is where two operators share the weight.
    both = moments.named({"a": "one", "b": "one"}, {"one": found}, ["a", "b"])
    assert both is not None
    assert np.allclose(fitted(weight, scales, 1, both, centred=True), nearest, atol=1e-6)


def test_what_varies_little_around_a_large_mean_is_told_as_exactly() -> None:
    gathering = Gathering(one_operator("Gemm", (1, 3), (3, 2)))
    rows = (1e6 + np.arange(24).reshape(8, 3) % 5).astype(np.float32)
    for row in rows:
        gathering.add({"x": row[None]})
    found = gathering.moments()[gathering.of["it"]]
    assert found.covariance[0] == pytest.approx(np.cov(rows.T.astype(np.float64), bias=True), rel=1e-6)
    both = moments.named({"a": "one", "b": "one"}, {"one": found}, ["a", "b"])
    assert both is not None
    assert both.covariance == pytest.approx(found.covariance, rel=1e-5)


def test_reads_whose_squares_no_float_holds_have_no_moments() -> None:
    gathering = Gathering(one_operator("Gemm", (1, 2), (2, 3)))
    for sign in (1, -1):
        gathering.add({"x": np.array([[sign * 1e25, 2.0]], np.float32)})
    found = gathering.moments()
    assert found == {}
    assert moments.named(gathering.of, found, ["it"]) is None


@pytest.mark.parametrize(
    ("op", "weight", "attributes"),
    [
        ("Conv", (4, moments.MOST_TAPS + 1, 1, 1), {}),
        ("ConvTranspose", (4, 4, 3, 3), {}),
        ("Gemm", (7, 5), {"transA": 1}),
        ("MatMul", (2, 7, 5), {}),
    ],
)
def test_what_would_cost_too_much_or_lies_otherwise_is_left_out(op: str, weight: Any, attributes: Any) -> None:
    assert Gathering(one_operator(op, (1, *weight[1:]), weight, **attributes)).of == {}


def test_room_goes_to_operators_of_few_weights_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MOST_BYTES", 8 * 8 * 4 + 1)
    nodes = [helper.make_node("MatMul", [f"{w}x", w], [f"{w}y"], name=w) for w in ("large", "small")]
    weights = [
        numpy_helper.from_array(np.ones((size, 2), np.float32), name) for name, size in (("large", 16), ("small", 8))
    ]
    assert set(Gathering(onnx.ModelProto(graph=helper.make_graph(nodes, "g", [], [], weights))).of) == {"small"}


def test_operators_that_share_a_weight_are_taken_together() -> None:
    one = Moments(np.zeros((1, 2), np.float32), np.eye(2, dtype=np.float32)[None])
    other = Moments(np.full((1, 2), 2.0, np.float32), np.eye(2, dtype=np.float32)[None])
    of, known = {"a": "one", "b": "other", "c": "gone"}, {"one": one, "other": other}
    both = moments.named(of, known, ["a", "b"])
    assert both is not None
    assert both.mean.tolist() == [[1, 1]]
    assert both.covariance.tolist() == [[[2, 1], [1, 2]]]
    assert moments.named(of, known, ["a", "c"]) is None
    assert moments.named(of, known, ["d"]) is None


def test_a_file_gives_back_what_was_gathered(tmp_path: Path) -> None:
    gathering = Gathering(one_operator("Gemm", (1, 2), (2, 3)))
    gathering.add({"x": np.array([[1.0, 2.0]], np.float32)})
    saved = gathered.Statistics({"x": {"minmax": [0.0, 1.0]}}, {"x": [1.0, 2.0]}, gathering.of, gathering.moments())
    gathered.save(saved, str(tmp_path / "statistics.json"))
    loaded = gathered.load(str(tmp_path / "statistics.json"))
    assert loaded[:3] == saved[:3]
    for key, found in loaded.moments.items():
        assert all(np.array_equal(a, b) for a, b in zip(found, saved.moments[key], strict=True))
