"""Durable writes: the only place in the agent where a file comes to be.

Temporary file in the same folder, write, fsync, rename, fsync the folder (thin-edge.io's ``fs.rs``, RAUC). After
:func:`write` returns, the file holds the new bytes whatever is cut; before, it holds the old ones.
Not handled here: several writers of one file (each folder has one owner, see ``lock``).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgefleet_shared.errors import ConflictError, EnvironmentProblem


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translate "no space", "read-only" and "no permission" into errors that say which path."""
    try:
        yield
    except OSError as exc:
        hints = {
            errno.ENOSPC: "free some space, then try again; nothing was lost",
            errno.EDQUOT: "the quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "check the owner and the mode of the folder",
            errno.EPERM: "check the owner and the mode of the folder",
        }
        if exc.errno in hints:
            raise EnvironmentProblem(f"can't write {path}: {exc.strerror}", hint=hints[exc.errno]) from exc
        raise


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path, mode: int = 0o755) -> None:
    """Create ``folder`` and its parents, each name synced into its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent, mode)
    with disk_errors(folder):
        folder.mkdir(mode=mode, exist_ok=True)
        sync_folder(folder.parent)


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``content``, durably and in one step.

    Raises:
        EnvironmentProblem: disk full, read-only, no permission. The old content is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            os.fchmod(fd, mode)
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        os.close(fd)
        os.replace(temporary, path)
        sync_folder(path.parent)


def adopt(temporary: Path, path: Path) -> None:
    """Give a file that was filled piece by piece its final name, durably. Both lie in one file system."""
    with disk_errors(path):
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there, durably."""
    with disk_errors(path):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def lock(folder: Path, owner: str) -> Iterator[None]:
    """Hold ``folder`` alone for as long as the context lasts; the kernel drops the lock when the process dies.

    Raises:
        ConflictError: another process holds it; the message carries its pid.
    """
    make_folder(folder)
    path = folder / ".lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.read(fd, 64).decode(errors="replace").strip() or "another process"
            raise ConflictError(
                f"{folder} is in use by {holder}", hint="one process owns a state folder; stop that one first"
            ) from exc
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{owner}, pid {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
