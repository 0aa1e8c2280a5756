"""TensorRT-RTX for real: engines are built without a GPU; onnxruntime answers to what they were built from."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_controller.source import ModelVersion, import_model
from edgefleet_shared.errors import ManifestError, ModelError
from support import trained
from support.networks import Net, project


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_an_engine_of_a_trained_network_is_built(workshop, version: ModelVersion, precision: str) -> None:
    result = workshop.compile(version, "tensorrt-rtx", precision=precision, options={"capabilities": "8.6,8.9"})
    figures = result.figures
    assert workshop.shipped(result).stat().st_size > 10_000
    assert figures.agreement >= 0.9
    assert figures.stand_in.startswith("onnxruntime")
    assert figures.unmeasured == ("latency", "memory")


def test_a_gpu_that_it_does_not_build_for_is_refused(workshop) -> None:
    version = workshop.version(trained.digits)
    with pytest.raises(ManifestError, match=r"builds for no GPU of capability 8\.7"):
        workshop.compile(version, "tensorrt-rtx", precision="fp16", options={"capabilities": "8.7"})
    with pytest.raises(ManifestError, match=r"expected such as 8\.6,8\.9"):
        workshop.compile(version, "tensorrt-rtx", precision="fp16", options={"capabilities": "ampere"})


def test_an_operator_that_the_parser_lacks_is_named_with_its_node(workshop, tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Det")
    version = import_model(project(tmp_path, net.model([1, 8])), tmp_path, workshop.layout, cache=tmp_path)
    with pytest.raises(ModelError, match=rf"tensorrt has no operator Det \(node '{lost}'\)"):
        workshop.compile(version, "tensorrt-rtx", precision="fp16")
