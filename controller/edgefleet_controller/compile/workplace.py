"""Stages 1 and 2: the folder that a job works in. Receives what it is for, hands on an empty folder that is gone when the job is over, however that ends.

A job that was killed can't clear up behind itself: samples and answers in float, often gigabytes. Each folder is held by a lock that the kernel
lets go with its process, and whoever begins a job, of any kind, clears away those that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "edgefleet-"
HELD = ".held"


@contextmanager
def work_folder(purpose: str) -> Iterator[Path]:
    """A folder for one job, where temporary files go on this machine, with what it is for in its name.

    Raises:
        OSError: the disk is full, or fails.
    """
    clear_away(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{purpose}-") as folder:
        fd = os.open(Path(folder) / HELD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(fd)


def clear_away(place: Path) -> None:
    """Remove the folders there of jobs that are no more."""
    for folder in place.glob(f"{PREFIX}*"):
        # One without the file was begun this very moment, or is another's; one that can't be opened is not ours.
        with suppress(OSError):
            fd = os.open(folder / HELD, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)
