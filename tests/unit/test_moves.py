"""Joins, nearest and largest neighbours are taken where they take least time, in int8 or in float, and no answer changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children import qdq, statistics
from edgefleet_controller.compile.children.measure import SampleFile
from safetensors.numpy import save_file
from support.networks import Net

RECIPE = {
    "ranges": "minmax", "weights": "pairs", "granularity": "channel", "activations": "uint8", "scope": "all", "correct_bias": True, "in_float": [],
    "fit_weights": True, "fused_activations": False, "gates_in_int8": False, "aligned_channels": False,
}  # fmt: skip
PICTURES = np.random.default_rng(1).normal(size=(6, 3, 32, 32)).astype(np.float32)


def session(model: onnx.ModelProto, folder: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = folder is not None
    if folder is not None:
        options.profile_file_prefix = str(folder / "profile")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answers(model: onnx.ModelProto) -> Any:
    running = session(model)
    return np.concatenate([running.run(None, {"image": one[None]})[0] for one in PICTURES])


def ran(model: onnx.ModelProto, folder: Path) -> list[tuple[str, str]]:
    """(operator, type of what it reads) of each kernel that the engine runs."""
    running = session(model, folder)
    running.run(None, {"image": PICTURES[:1]})
    events = json.loads(Path(running.end_profiling()).read_text())
    kernels = [event["args"] for event in events if event.get("name", "").endswith("_kernel_time")]
    return [(one["op_name"], next(iter(one["input_type_shape"][0]), "")) for one in kernels]


def both(
    net: Net, folder: Path, monkeypatch: pytest.MonkeyPatch, **recipe: Any
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network in int8, with moves where the QDQ writer leaves them, and settled."""
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, None, None], opset=14))
    save_file({"image": PICTURES}, folder / "samples")
    known = statistics.collect(model, SampleFile(str(folder / "samples")), lambda *_: None, histograms=False)
    settled = qdq.quantize(model, known, RECIPE | recipe)
    with monkeypatch.context() as patch:
        patch.setattr(qdq, "settle_moves", lambda _: None)
        left = qdq.quantize(model, known, RECIPE | recipe)
    onnx.checker.check_model(settled, full_check=True)
    return left, settled


def pyramid(net: Net) -> None:
    """What two convolutions make, one of them in a quarter of the places, joined for a third, as YOLOv3 has it."""
    net.conv(3, 16)
    wide = net.add("LeakyRelu", alpha=0.1)
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.conv(16, 16)
    net.add("LeakyRelu", alpha=0.1)
    net.add("Resize", "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    net.add("Concat", wide, axis=1)
    net.conv(32, 8)


def test_a_pyramid_is_joined_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(3)
    pyramid(net)
    left, settled = both(net, tmp_path, monkeypatch)
    assert np.array_equal(answers(settled), answers(left))
    before, now = ran(left, tmp_path), ran(settled, tmp_path)
    assert {("Concat", "float"), ("Resize", "float")} <= {*before}
    assert not {"Concat", "MaxPool"} & {op for op, _ in now}
    assert ("Resize", "uint8") in now
    assert "QLinearConcat" in {op for op, _ in now}


def linear(net: Net) -> None:
    net.add("Resize", "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear")


def averaged(net: Net) -> None:
    net.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])


@pytest.mark.parametrize("move", [linear, averaged])
def test_what_computes_stays_behind_no_further_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: Callable[[Net], None]
) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add("LeakyRelu", alpha=0.1)
    move(net)
    net.conv(16, 8)
    left, settled = both(net, tmp_path, monkeypatch)
    assert settled == left


def test_a_join_that_float_reads_too_stays_exact_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(3)
    net.conv(3, 8)
    one = net.add("LeakyRelu", alpha=0.1)
    net.conv(8, 8)
    net.add("LeakyRelu", alpha=0.2)
    joined = net.add("Concat", one, axis=1)
    net.conv(16, 8, 1, pads=[0] * 4)
    last = net.nodes[-1].name
    product = net.last
    net.conv(16, 8, 1, pads=[0] * 4)
    net.nodes[-1].input[0] = joined
    net.add("Add", product)
    left, settled = both(net, tmp_path, monkeypatch, in_float=[last])
    assert np.array_equal(answers(settled), answers(left))


@pytest.mark.parametrize("activation", ["Relu", "Clip", "LeakyRelu", "none"])
@pytest.mark.parametrize("rounded_again", [False, True])
def test_a_pool_behind_a_convolution_in_float_is_in_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: str, rounded_again: bool
) -> None:
    """onnxruntime would round before it, and takes the largest of rounded values one by one where channels come first."""
    net = Net(3)
    net.conv(3, 16, 7, stride=2, pads=[3] * 4)
    first = [net.nodes[-1].name]
    if activation == "Clip":
        net.add("Clip", net.constant(np.float32(0)), net.constant(np.float32(6)))
    elif activation != "none":
        net.add(activation)
        first += [net.last] * (activation == "LeakyRelu")
    net.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    pooled = net.last
    net.conv(16, 8)
    if rounded_again:
        one = net.last
        net.conv(16, 8, 1, pads=[0] * 4)
        net.nodes[-1].input[0] = pooled
        net.add("Add", one)
        net.conv(8, 8)
    left, settled = both(net, tmp_path, monkeypatch, in_float=first)
    assert np.array_equal(answers(settled), answers(left))
    assert ("MaxPool", "uint8") in ran(left, tmp_path)
    assert ("MaxPool", "float") in ran(settled, tmp_path)


def summed(net: Net) -> None:
    one = net.last
    net.conv(16, 16)
    net.add("Add", one)


def summed_and_cut(net: Net) -> None:
    summed(net)
    net.add("Relu")


@pytest.mark.parametrize("make", [summed, summed_and_cut])
def test_a_pool_behind_what_is_made_of_rounded_values_stays_in_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Net], None]
) -> None:
    net = Net(3)
    net.conv(3, 16)
    make(net)
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.conv(16, 8)
    left, settled = both(net, tmp_path, monkeypatch)
    assert np.array_equal(answers(settled), answers(left))
    assert "NhwcMaxPool" in {op for op, _ in ran(settled, tmp_path)}
