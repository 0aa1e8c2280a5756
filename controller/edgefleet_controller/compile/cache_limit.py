"""Stage 2, compile: how large the cache may become. Receives its folder and a limit, removes what was used longest ago.

What was used within a day may be in use by a job, here or in another process, and stays whatever the limit says; no job is that long between two
looks at one thing. Also removed: what writers that were killed left behind, which no lock holds: a clock that is set ahead makes everything old. Not counted: toolchains, packages, pictures; searches' results and seals, which are
small.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

KINDS = (
    "prepared",
    "described",
    "pruned",
    "answers",
    "statistics",
    "quantized",
    "formed",
    "halved",
    "ranked",
    "compiled",
    "sent",
)
UNFINISHED = ".filling-"
SEAL = ".whole"  # in each folder: the digests of its files, by their paths in it
IN_USE_S = 24 * 3600.0


class _Entry(NamedTuple):
    used_at: float
    size_bytes: int
    path: Path


@contextmanager
def looking(cache: Path, *, removing: bool = False) -> Iterator[None]:
    """Nothing is removed while anybody looks whether it is there, and marks it as used if so."""
    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / "looking", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if removing else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def mark_used(path: Path) -> bool:
    """Whether it is there. Call while :func:`looking`."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def filling(path: Path) -> Iterator[None]:
    """The folder is somebody's who lives; the kernel lets go of it with the process."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _clear_unfinished(path: Path) -> None:
    """Remove what is being filled by nobody any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


def keep_within(cache: Path, limit_bytes: int, now: float) -> int:
    """Remove the longest unused until the rest has ``limit_bytes``, or was used within :data:`IN_USE_S`.

    Args:
        now: seconds since 1970, as files have them.

    Returns:
        how many bytes are left.

    Raises:
        OSError: the cache can't be read.
    """
    entries = []
    for kind in KINDS:
        for path in (cache / kind).glob("*"):
            if path.name.startswith(UNFINISHED):
                if now - _used_at(path, now) > IN_USE_S:
                    _clear_unfinished(path)
            else:
                entries.append(_Entry(_used_at(path, now), _size_bytes(path), path))
    left = sum(entry.size_bytes for entry in entries)
    for entry in sorted(entries):
        if left <= limit_bytes or now - entry.used_at <= IN_USE_S:
            break
        if _remove(cache, entry.path, now):
            left -= entry.size_bytes
    return left


def _remove(cache: Path, path: Path, now: float) -> bool:
    """Gone in one step, unless somebody used it meanwhile; then it is cleared away."""
    gone = Path(tempfile.mkdtemp(dir=path.parent, prefix=UNFINISHED))
    with looking(cache, removing=True):
        unused = now - _used_at(path, now) > IN_USE_S
        if unused:
            os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
    return unused


def _used_at(path: Path, now: float) -> float:
    """``now`` for what is gone already: somebody else removed or finished it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return now


def _size_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        if file.name == SEAL:
            continue
        try:
            total += file.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total
