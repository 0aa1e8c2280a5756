"""IREE for real: this host's code runs, other processors' code is what it says it is."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import numpy as np
import pytest
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.errors import ModelError
from support import trained
from support.networks import Net, project

EM = {"x86_64": 62, "aarch64": 183, "armv7l": 40, "riscv64": 243}  # e_machine of an ELF header


def machines(module: Path) -> set[int]:
    """Which machines the shared libraries inside a module are for."""
    content = module.read_bytes()
    found, at = set(), content.find(b"\x7fELF")
    while at >= 0:
        found.add(int.from_bytes(content[at + 18 : at + 20], "little"))
        at = content.find(b"\x7fELF", at + 4)
    return found


def test_a_trained_network_answers_and_is_timed_as_float_does(workshop, version: ModelVersion) -> None:
    result = workshop.compile(version, "iree", arch=platform.machine(), precision="fp32")
    figures = result.figures
    assert (result.quality, figures.agreement, figures.stand_in, figures.unmeasured) == ("passed", 1.0, "", ())
    assert figures.sqnr_db > 80
    assert figures.p50_ms > 0
    assert machines(workshop.shipped(result)) == {EM[platform.machine()]}


@pytest.mark.parametrize("arch", ["aarch64", "armv7l", "riscv64"])
def test_another_processors_code_is_made_here_and_this_hosts_answers_in_its_place(workshop, arch: str) -> None:
    version = workshop.version(trained.digits)
    result = workshop.compile(version, "iree", arch=arch, precision="fp32")
    figures = result.figures
    assert machines(workshop.shipped(result)) == {EM[arch]}
    assert figures.agreement == 1.0
    assert "compiled by IREE for this host's processor" in figures.stand_in
    assert figures.unmeasured == ("latency", "memory")
    assert figures.p50_ms is None
    again = workshop.compile(version, "iree", arch=arch, precision="fp32")
    assert (again.cached, again.artifact.digest) == (True, result.artifact.digest)


def test_the_same_network_gives_the_same_module_again(workshop, tmp_path: Path) -> None:
    version = workshop.version(trained.digits)
    first = workshop.compile(version, "iree", precision="fp32", options={"features": "+avx2"})
    for folder in (workshop.folder / "cache" / "compiled").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = workshop.compile(version, "iree", precision="fp32", options={"features": "+avx2"})
    assert not again.cached
    assert again.artifact.digest == first.artifact.digest


def test_folders_whose_names_have_spaces_are_no_obstacle(
    workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IREE hands paths to a shell as they are."""
    folder = tmp_path / "the home of; John Doe"
    folder.mkdir()
    (folder / "toolchains").symlink_to(workshop.cache / "toolchains")
    monkeypatch.setattr(workshop, "cache", folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    result = workshop.compile(workshop.version(trained.digits), "iree", precision="fp32", options={"features": "+fma"})
    assert result.quality == "passed"


def test_an_operator_that_iree_lacks_is_named_with_its_node(workshop, tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("MaxRoiPool", net.constant(np.array([[0, 0, 0, 8, 8]], np.float32)), pooled_shape=[2, 2])
    net.add("Flatten")
    version = import_model(project(tmp_path, net.model([1, 32])), tmp_path, workshop.layout, cache=tmp_path)
    with pytest.raises(ModelError, match=rf"iree has no operator MaxRoiPool \(node '{lost}'\) for these types"):
        workshop.compile(version, "iree", precision="fp32")
