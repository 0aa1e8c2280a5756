"""RKNN-Toolkit2 for real: it compiles for chips that are not here, and its simulator answers."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import rknn_settled
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.errors import ManifestError, ModelError
from support import trained
from support.networks import Net, project, project_of_numbers, resize_input


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_trained_network_is_compiled_and_the_simulator_answers(
    workshop, version: ModelVersion, precision: str
) -> None:
    result = workshop.compile(version, "rknn", arch="aarch64", precision=precision, options={"chip": "rk3588"})
    figures = result.figures
    assert workshop.shipped(result).read_bytes()[:4] == b"RKNN"
    assert figures.agreement >= 0.9
    assert figures.cosine > (0.97 if precision == "int8" else 0.999)
    assert figures.stand_in == "RKNN-Toolkit2's simulator of the NPU"
    assert figures.unmeasured == ("latency", "memory")
    assert result.precision == precision
    config = workshop.layout.config(workshop.layout.manifest(result.artifact.digest))
    assert (config.engine, config.contract.allowed_providers) == ("rknn", ("NPU",))


def test_each_chip_has_a_file_of_its_own(workshop) -> None:
    version = workshop.version(trained.digits)
    files = {
        workshop.shipped(workshop.compile(version, "rknn", arch="aarch64", options={"chip": chip})).read_bytes()
        for chip in ("rk3566", "rk3588")
    }
    assert len(files) == 2


def test_the_first_file_after_an_update_and_in_other_folders_is_the_same(workshop, tmp_path: Path, monkeypatch) -> None:
    """The toolkit writes what lay in memory before; compiling modules leaves other things there, and so do longer paths."""
    version = workshop.version(trained.digits)
    before = workshop.shipped(workshop.compile(version, "rknn", arch="aarch64")).read_bytes()
    shutil.rmtree(Path(rknn_settled.__file__).parent / "__pycache__", ignore_errors=True)
    shutil.rmtree(workshop.folder / "cache" / "compiled")
    home = tmp_path / "somebody" / "elses" / "home"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    again = workshop.compile(version, "rknn", arch="aarch64")
    assert not again.cached
    assert workshop.shipped(again).read_bytes() == before


def test_a_chip_of_the_older_toolkit_is_refused_with_where_to_go(workshop) -> None:
    version = workshop.version(trained.digits)
    with pytest.raises(ManifestError, match=r"target rknn knows no chip 'rk1808'.*the target rk1808"):
        workshop.compile(version, "rknn", arch="aarch64", options={"chip": "rk1808"})


def test_an_operator_that_the_toolkit_lacks_is_named_with_its_node(workshop, tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Det")
    version = import_model(project(tmp_path, net.model([1, 8])), tmp_path, workshop.layout, cache=tmp_path)
    with pytest.raises(ModelError, match=rf"rknn has no operator Det \(node '{lost}'\)"):
        workshop.compile(version, "rknn", arch="aarch64")


def test_names_that_are_longer_than_the_toolkit_keeps_and_names_like_its_own_are_no_obstacle(
    workshop, tmp_path: Path
) -> None:
    net = Net()
    net.conv(3, 8, stride=4)
    net.nodes[-1].output[:] = ["StatefulPartitionedCall/" * 20]
    net.add("Relu", first="StatefulPartitionedCall/" * 20)
    net.nodes[-1].output[:] = ["in0"]
    net.add("Flatten", first="in0")
    net.dense(512, 6)
    model = net.model([1, 6])
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"image": "i" * 300, "scores": "o" * 300}.get(name, name) for name in names]
    model.graph.input[0].name, model.graph.output[0].name = "i" * 300, "o" * 300
    manifest = project(tmp_path, model, inputs=[{"name": "i" * 300, "mean": [127.5], "std": [64.0]}])
    version = import_model(manifest, tmp_path, workshop.layout, cache=tmp_path)
    result = workshop.compile(
        version, "rknn", arch="aarch64", precision="fp16", options={"chip": "rk3588"}, accuracy={"min_agreement": 0.9}
    )
    assert result.quality == "passed"
    assert result.figures.sqnr_db > 40


def test_an_output_that_the_toolkit_drops_is_told(workshop, tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8, stride=4)
    picture = net.last
    net.add("Shape")
    net.add("Cast", to=onnx.TensorProto.FLOAT)
    net.nodes[-1].output[:] = ["sizes"]
    net.last = picture
    net.add("Flatten")
    net.dense(512, 6)
    model = net.model([1, 6])
    model.graph.output.append(onnx.helper.make_tensor_value_info("sizes", onnx.TensorProto.FLOAT, [4]))
    manifest = project(tmp_path, model, output={"kind": "raw"}, acceptance={"tolerance_abs": 0.1})
    version = import_model(manifest, tmp_path, workshop.layout, cache=tmp_path)
    with pytest.raises(
        ModelError, match="rknn gives 1 of the network's 2 outputs: it drops what is the same for every"
    ):
        workshop.compile(version, "rknn", arch="aarch64", precision="fp16", options={"chip": "rk3588"})


@pytest.mark.parametrize("axes", [1, 3])
def test_what_is_no_picture_is_answered_too(workshop, tmp_path: Path, axes: int) -> None:
    net = Net()
    weight = net.rng.normal(size=(8, 3, *[3] * axes)).astype(np.float32) / 5
    net.add("Conv", net.constant(weight), strides=[2] * axes, pads=[1] * 2 * axes)
    net.add("Relu")
    net.add("Flatten")
    net.dense(8 * 4**axes, 6)
    model = net.model([1, 6])
    resize_input(model, 1, 3, *[8] * axes)
    version = import_model(project_of_numbers(tmp_path, model), tmp_path, workshop.layout, cache=tmp_path)
    result = workshop.compile(version, "rknn", arch="aarch64", precision="fp16", options={"chip": "rk3588"})
    assert result.quality == "passed"
    assert result.figures.sqnr_db > 40
