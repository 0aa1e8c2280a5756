"""Stage 2, compile: files in the work folder and in the cache. Receives tensors or a file, hands on a file at its place.

A full disk is told as that whoever finds it out: the safetensors library has an error of its own for it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file

_TOLD = re.compile(r"\(os error (\d+)\)")
# Of os.link, where the two places lie in different file systems, or in one that knows no second name of a file.
_NO_SECOND_NAME = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def write_tensors(tensors: dict[str, Any], path: Path) -> None:
    """A safetensors file.

    Raises:
        OSError: the disk is full, or fails.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as exc:
        told = _TOLD.search(str(exc))
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from exc


def put(file: Path, place: Path) -> None:
    """The file at another place too: by a second name where that can be, else as a copy.

    Raises:
        OSError: the disk is full, or fails.
    """
    try:
        os.link(file, place)
    except OSError as exc:
        if exc.errno not in _NO_SECOND_NAME:
            raise
        shutil.copyfile(file, place)
