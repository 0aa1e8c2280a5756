"""Files of a compile, on disks that are full or are several."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from edgefleet_controller.compile.writing import put, write_tensors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of the test's own")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_samples_that_a_full_disk_does_not_take_are_told_as_that(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write_tensors({"image": np.ones((64, 1024), np.float32)}, small_disk / "samples.safetensors")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(small_disk / "samples.safetensors")


def test_a_file_is_put_into_another_file_system_as_a_copy(tmp_path: Path, small_disk: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"network" * 100)
    put(blob, small_disk / "compiled")
    assert (small_disk / "compiled").read_bytes() == blob.read_bytes()
    put(blob, tmp_path / "compiled")
    assert os.path.samefile(blob, tmp_path / "compiled"), "one file where it can be"


def test_a_copy_that_does_not_fit_is_told_as_that(tmp_path: Path, small_disk: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"network" * 100_000)
    with pytest.raises(OSError, match="No space left"):
        put(blob, small_disk / "compiled")
