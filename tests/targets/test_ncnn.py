"""ncnn for real: converted by pnnx, run and timed here."""

from __future__ import annotations

import platform
import zipfile
from pathlib import Path

import numpy as np
import pytest
from edgefleet_agent.runtime import engines
from edgefleet_controller.source import ModelVersion, import_model
from edgefleet_shared import golden
from edgefleet_shared.artifact import GOLDEN_LAYER
from edgefleet_shared.errors import ModelError
from support import trained
from support.networks import Net, project


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
