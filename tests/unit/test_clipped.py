"""Activations of rounded values are Clips of their levels: no step through float, and the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import qdq
from edgefleet_controller.compile.children.slopes import slopes_apart
from support.int8 import RECIPE, answers, db, kernels, known_of
from support.networks import Net


def relu(net: Net) -> str:
    return net.add("Relu")


def clip(low: float | None, high: float | None) -> Callable[[Net], str]:
    def add(net: Net) -> str:
        limits = ["" if limit is None else net.constant(np.float32(limit)) for limit in (low, high)]
        return net.add("Clip", *(limits if limits[1] else limits[:1]))

    return add


def before_it_is_activated(activate: Callable[[Net], str]) -> onnx.ModelProto:
    """A residual network that activates first: what a shortcut takes is read by the activation as well."""
    net = Net(3)
    value = net.conv(3, 8)
    activate(net)
    net.conv(8, 8)
    value = net.add("Add", value)
    activate(net)
    net.conv(8, 8)
    net.add("Add", value)
    return onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activate", [relu, clip(0, 6), clip(0, None), clip(None, 2), clip(-1, 2)])
def test_they_answer_as_those_in_float_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activate: Callable[[Net], str], symmetric: bool
) -> None:
    model = before_it_is_activated(activate)
    recipe = RECIPE | ({"activations": "symmetric"} if symmetric else {})
    known, wanted = known_of(model, tmp_path), answers(model)
    levels = qdq.quantize(model, known, recipe)
    onnx.checker.check_model(levels, full_check=True)
    monkeypatch.setattr(qdq, "clip_levels", lambda _: None)
    in_float = db(answers(qdq.quantize(model, known, recipe)), wanted)
    assert in_float > 20
    assert db(answers(levels), wanted) > in_float - 0.5


def test_the_engine_goes_to_float_no_more(tmp_path: Path) -> None:
    """Where a value is read by an activation and by a convolution: so PRelus are computed."""
    net = Net(3)
    for inputs in (3, 8):
        net.conv(inputs, 8)
        net.add("PRelu", net.constant(np.linspace(-0.4, 0.7, 8, dtype=np.float32).reshape(8, 1, 1)))
    net.conv(8, 8)
    model = net.model([1, 8, 32, 32])
    assert slopes_apart(model.graph)
    model = onnx.shape_inference.infer_shapes(model)
    quantized = qdq.quantize(model, known_of(model, tmp_path), RECIPE)
    assert db(answers(quantized), answers(model)) > 25
    ran = kernels(quantized, tmp_path)
    assert ran.count("Clip") == 2
    assert ran.count("QuantizeLinear") == ran.count("DequantizeLinear") == 1


def test_what_is_served_is_right(tmp_path: Path) -> None:
    model = before_it_is_activated(relu)
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info("n1", onnx.TensorProto.FLOAT, [1, 8, 32, 32]))
    quantized = qdq.quantize(model, known_of(model, tmp_path), RECIPE)
    assert db(answers(quantized), answers(model)) > 35  # of what the activation makes


def test_what_a_layer_in_float_reads_stays(tmp_path: Path) -> None:
    model = before_it_is_activated(relu)
    quantized = qdq.quantize(model, known_of(model, tmp_path), RECIPE | {"in_float": ["n2"]})
    assert not [node for node in quantized.graph.node if node.name.endswith("/clipped")]
