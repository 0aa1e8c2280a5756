"""hls4ml for real: C++ for Vitis is written, and its C simulation, compiled by g++, answers."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.errors import ModelError
from support import trained
from support.networks import Net, project


def test_a_trained_network_becomes_a_project_whose_simulation_answers(workshop) -> None:
    version = workshop.version(trained.digits)
    # Digits are 0 to 255, and sums of them more: 14 bits before the point.
    wide = {"total_bits": 24, "integer_bits": 15}
    result = workshop.compile(version, "hls4ml", precision="fp16", options=wide)
    figures = result.figures
    assert figures.agreement >= 0.95
    assert "C simulation" in figures.stand_in
    assert figures.unmeasured == ("latency", "memory")
    with zipfile.ZipFile(workshop.shipped(result)) as archive:
        names = archive.namelist()
        assert {"firmware/network.cpp", "firmware/parameters.h", "build_prj.tcl"} <= set(names)
        assert not any(name.endswith((".so", ".yml", ".sh")) for name in names)


def test_an_operator_that_hls4ml_lacks_is_named_with_its_node(workshop, tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Det")
    version = import_model(project(tmp_path, net.model([1, 8])), tmp_path, workshop.layout, cache=tmp_path)
    with pytest.raises(ModelError, match=rf"hls4ml has no operator Det \(node '{lost}'\)"):
        workshop.compile(version, "hls4ml", precision="fp16")
