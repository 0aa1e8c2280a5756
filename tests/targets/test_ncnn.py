"""ncnn for real: converted by pnnx, run and timed here."""

from __future__ import annotations

import platform
import zipfile
from pathlib import Path

import numpy as np
import pytest
from edgefleet_agent.runtime import engines
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.manifests import Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared import golden
from edgefleet_shared.artifact import GOLDEN_LAYER
from edgefleet_shared.errors import ModelError
from support import trained
from support.networks import Net, project, project_of_numbers, resize_input


def test_a_trained_network_answers_and_is_timed_as_float_does(workshop, version: ModelVersion) -> None:
    result = workshop.compile(version, "ncnn", arch=platform.machine(), precision="fp32")
    figures = result.figures
    assert (result.quality, figures.agreement, figures.stand_in, figures.unmeasured) == ("passed", 1.0, "", ())
    assert figures.sqnr_db > 60
    assert figures.p50_ms > 0
    with zipfile.ZipFile(workshop.shipped(result)) as archive:
        assert archive.namelist() == ["model.param"]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def test_an_arm_class_shares_the_files_and_leaves_its_times_to_the_board(workshop) -> None:
    version = workshop.version(trained.digits)
    here = workshop.compile(version, "ncnn", precision="fp32")
    there = workshop.compile(version, "ncnn", arch="aarch64", precision="fp32")
    assert there.cached
    assert workshop.shipped(there) == workshop.shipped(here)
    assert there.figures.unmeasured == ("latency",)


def test_an_operator_that_ncnn_lacks_is_named_with_its_node(workshop, tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Det")
    version = import_model(project(tmp_path, net.model([1, 8])), tmp_path, workshop.layout, cache=tmp_path)
    with pytest.raises(ModelError, match=rf"ncnn has no operator Det \(node '{lost}'\)"):
        workshop.compile(version, "ncnn", precision="fp32")


def test_the_boards_engine_gives_the_same_answers(workshop) -> None:
    version = workshop.version(trained.digits)
    result = workshop.compile(version, "ncnn", precision="fp32")
    assert_the_board_answers_so(workshop, result)


def assert_the_board_answers_so(workshop, result: CompileResult) -> None:
    manifest = workshop.layout.manifest(result.artifact.digest)
    config = workshop.layout.config(manifest)
    session = engines.find("ncnn").load(workshop.shipped(result), config, threads=1)
    inputs, references = golden.unpack(
        workshop.layout.read(manifest.layer(GOLDEN_LAYER).digest, 10**8), config.encoding
    )
    answers = session.run(inputs)
    assert session.providers == ("CPU",)
    for name, wanted in references.items():
        np.testing.assert_allclose(answers[name], wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def attention(tmp_path: Path) -> Model:
    """A network without a convolution, over words rather than pictures: 16 of 8 numbers, mixed, and one class out of 4."""
    net = Net()
    rows = {name: net.constant(net.rng.normal(size=(8, 8)).astype(np.float32)) for name in ("query", "key", "value")}
    query, key, value = (net.add("MatMul", weight, first="image") for weight in rows.values())
    turned = net.add("Transpose", first=key, perm=[0, 2, 1])
    shares = net.add("Softmax", first=net.add("MatMul", turned, first=query), axis=-1)
    net.add("ReduceMean", first=net.add("MatMul", value, first=shares), axes=[1], keepdims=0)
    net.dense(8, 4)
    model = net.model([1, 4])
    resize_input(model, 1, 16, 8)
    return project_of_numbers(tmp_path, model)


def test_a_network_in_which_nothing_tells_the_batch_axis_answers_here_and_by_the_boards_engine(
    workshop, tmp_path: Path
) -> None:
    version = import_model(attention(tmp_path), tmp_path, workshop.layout, cache=tmp_path)
    result = workshop.compile(version, "ncnn", precision="fp32")
    assert (result.quality, result.figures.agreement) == ("passed", 1.0)
    assert result.figures.sqnr_db > 60
    assert_the_board_answers_so(workshop, result)


def test_an_operator_that_ncnn_has_under_that_name_with_other_parameters_is_named_with_its_node(
    workshop, tmp_path: Path
) -> None:
    net = Net()
    turned = net.add("Transpose", perm=[1, 0, 2])
    weights = [net.constant(net.rng.normal(size=s).astype(np.float32)) for s in ((1, 64, 8), (1, 64, 16), (1, 128))]
    lost = net.add("LSTM", *weights, first=turned, hidden_size=16)
    net.nodes[-1].output[:] = ["", "last"]
    net.add("Squeeze", net.constant(np.array([0], np.int64)), first="last")
    net.dense(16, 4)
    model = net.model([1, 4])
    resize_input(model, 1, 12, 8)
    version = import_model(project_of_numbers(tmp_path, model), tmp_path, workshop.layout, cache=tmp_path)
    with pytest.raises(ModelError, match=rf"ncnn has no operator LSTM \(node '{lost}'\)"):
        workshop.compile(version, "ncnn", precision="fp32")
