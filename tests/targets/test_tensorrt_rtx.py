"""TensorRT-RTX for real: engines are built without a GPU; onnxruntime answers to what they were built from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import edgefleet_controller.compile
import pytest
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.errors import ManifestError, ModelError
from support import trained
from support.networks import Net, project

ASK = """
import sys
sys.path.append(sys.argv[1])
import onnx, tensorrt_rtx_bindings as trt
from children.tensorrt import LACKS
log = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
names = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
print(sorted({name for name in names if not parser.supports_operator(name)} ^ set(LACKS)))
"""


def test_the_operators_that_are_refused_are_those_that_the_parser_does_not_know(workshop) -> None:
    python = Toolchains(workshop.cache).ensure("tensorrt-rtx").python
    package = str(Path(edgefleet_controller.compile.__file__).parent)
    told = subprocess.run([python, "-s", "-c", ASK, package], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.strip().splitlines()[-1] == "[]"


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
