"""A simplified network answers what the one that came answered, but for what float32 rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import job, ort
from onnx import numpy_helper
from safetensors.numpy import save_file
from support.networks import Net


def prepare(net: Net, folder: Path) -> dict[str, Any]:
    onnx.save(net.model([1, 8, 32, 32]), folder / "network.onnx")
    pictures = np.random.default_rng(1).normal(scale=0.1, size=(4, 3, 32, 32)).astype(np.float32)
    save_file({"image": pictures}, folder / "samples.safetensors")
    request: dict[str, Any] = {key: str(folder / f"{key}.onnx") for key in ("network", "simplified", "formed")}
    request |= {"samples": [str(folder / "samples.safetensors")], "references": [str(folder / "answers")]}
    return ort.prepare(request, lambda *_: None)


def saturated(summand: float) -> Net:
    """Scores of a segmentation of pictures that show nothing: all next to zero."""
    net = Net(3)
    net.conv(3, 8)
    net.add("Relu")
    net.conv(8, 8)
    net.add("Add", net.constant(np.float32([summand])))
    net.add("Sigmoid")
    return net


@pytest.mark.parametrize("summand", [0.0, -14.0, -18.0, -60.0])
def test_answers_next_to_zero_are_as_exact_as_float_is(tmp_path: Path, summand: float) -> None:
    assert prepare(saturated(summand), tmp_path)["engine_version"]


@pytest.mark.parametrize("summand", [0.0, -8.0])
def test_a_network_that_answers_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summand: float
) -> None:
    def spoil(path: str) -> None:
        model = onnx.load(path)
        weight = model.graph.initializer[0]
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(ort, "write_types", spoil)
    with pytest.raises(job.Refused, match="simplified, the network answers something else: scores is off by"):
        prepare(saturated(summand), tmp_path)
