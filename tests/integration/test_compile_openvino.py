"""What OpenVINO is given: operators that it fuses, and no rounding between those."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import openvino
import pytest
from edgefleet_controller.manifests import Model
from edgefleet_shared import artifact
from safetensors.numpy import save_file
from support.compiling import Bench, class_here
from support.networks import Net, project


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def topology(bench: Bench, digest: str) -> tuple[list[str], dict[str, list[str]], Any]:
    """(types of operators, for each type those of whoever reads it, the model) of a compiled artifact."""
    layer = bench.layout.manifest(digest).layer(artifact.MODEL_LAYER)
    with zipfile.ZipFile(bench.layout.path(layer.digest)) as archive:
        xml, weights = (archive.read(name) for name in ("model.xml", "model.bin"))
    net = ElementTree.fromstring(xml)
    types = {one.get("id"): str(one.get("type")) for one in net.iter("layer")}
    readers: dict[str, list[str]] = {}
    for edge in net.iter("edge"):
        readers.setdefault(types[edge.get("from-layer")], []).append(types[edge.get("to-layer")])
    model = openvino.Core().read_model(xml, openvino.Tensor(np.frombuffer(weights, np.uint8)))
    return list(types.values()), readers, model


@pytest.fixture
def gated() -> Any:
    net = Net(3)
    net.conv(3, 16, stride=2)
    net.add("HardSwish")
    net.conv(16, 16)
    net.add("Mul", net.add("HardSigmoid", alpha=1 / 6, beta=0.5))
    gate_of = net.conv(16, 16)
    net.add("Mul", net.add("HardSigmoid", alpha=0.2, beta=0.5), first=gate_of)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(16, 10)
    return net.model([1, 10], opset=14)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_gates_are_operators_that_it_fuses_and_answer_alike(bench: Bench, gated: Any, precision: str) -> None:
    version = bench.version(project(bench.folder, gated))
    spec = {"accuracy": {"min_agreement": 0.5}, "search": {"effort": "fixed", "prefer": "size"}}
    result = bench.compile(version, class_here("openvino", precision=precision, **spec))
    types, _, model = topology(bench, result.artifact.digest)
    assert "HardSigmoid" not in types
    assert types.count("HSwish") == 1
    assert types.count("Clamp") == 1
    assert "HSigmoid" in types
    assert [port.get_any_name() for port in model.outputs] == ["scores"]
    assert result.figures.sqnr_db is not None
    assert result.figures.sqnr_db > (80 if precision == "fp32" else 15)


@pytest.mark.parametrize("gate", [("HardSigmoid", {"alpha": 1 / 6}), ("HardSigmoid", {}), ("HardSwish", {})], ids=str)
def test_a_gate_that_comes_out_keeps_its_name(bench: Bench, gate: tuple[str, dict[str, float]]) -> None:
    net = Net(5)
    net.conv(3, 16, stride=2)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(16, 10)
    model = net.model([1, 10], opset=14)
    last = model.graph.node[-1]
    last.CopyFrom(onnx.helper.make_node(gate[0], list(last.input), ["scores"], name="last", **gate[1]))
    version = bench.version(project(bench.folder, model))
    result = bench.compile(version, class_here("openvino", precision="fp32", accuracy={"min_agreement": 0.5}))
    types, _, compiled = topology(bench, result.artifact.digest)
    assert "HardSigmoid" not in types
    assert [port.get_any_name() for port in compiled.outputs] == ["scores"]
    assert result.figures.sqnr_db is not None
    assert result.figures.sqnr_db > 80


def test_what_is_summed_for_an_activation_goes_there_unrounded_and_pools_are_behind(bench: Bench) -> None:
    net = Net(4)
    net.conv(3, 16)
    net.add("LeakyRelu", alpha=0.1)
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.conv(16, 16)
    net.add("HardSwish")
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(16, 10)
    version = bench.version(project(bench.folder, net.model([1, 10], opset=14)))
    spec = {"accuracy": {"min_agreement": 0.5}, "search": {"effort": "fixed", "prefer": "size"}}
    _, readers, _ = topology(bench, bench.compile(version, class_here("openvino", **spec)).artifact.digest)
    assert set(readers["Convolution"]) == {"Add", "ShapeOf"}  # its bias, which is brought into shape
    assert sorted(readers["Add"]) == ["FakeQuantize", "HSwish", "PReLU"]  # the dense layer's sum is what comes out
    assert set(readers["PReLU"]) == {"FakeQuantize"}
    assert set(readers["MaxPool"]) == {"Convolution"}


def test_an_input_that_nothing_reads_is_there_in_int8_too(bench: Bench) -> None:
    net = Net(6)
    net.conv(3, 16, stride=2)
    net.add("LeakyRelu", alpha=0.3)
    net.add("Pad", net.constant(np.array([0, 0, 0, 0, 0, 16, 0, 0])))  # what OpenVINO reads is changed for it
    net.conv(32, 64, stride=2)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(64, 10)
    model = net.model([1, 10])
    model.graph.input.append(onnx.helper.make_tensor_value_info("length", onnx.TensorProto.INT64, [1]))
    (bench.folder / "net.onnx").write_bytes(model.SerializeToString())
    spec: dict[str, Any] = {"version": "1", "source": {"path": "net.onnx"}, "acceptance": {"min_agreement": 0.5}}
    for seed, (split, count) in enumerate({"calibration": 8, "holdout": 32, "golden": 8}.items()):
        chance = np.random.default_rng(seed)
        samples = {"image": chance.normal(size=(count, 3, 32, 32)).astype(np.float32), "length": np.arange(count)}
        save_file(samples, bench.folder / f"{split}.safetensors")
        spec[split] = {"path": f"{split}.safetensors"}
    version = bench.version(Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": spec}))
    asked = {"accuracy": {"min_agreement": 0.5}, "search": {"effort": "fixed", "prefer": "size"}}
    result = bench.compile(version, class_here("openvino", **asked))
    assert result.precision == "int8"
    compiled = topology(bench, result.artifact.digest)[2]
    assert sorted(port.get_any_name() for port in compiled.inputs) == ["image", "length"]
