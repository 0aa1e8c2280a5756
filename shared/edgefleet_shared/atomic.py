"""Durable writes: the only place in the agent where a file comes to be, grows, gets its name or goes.

Temporary file in the same folder, write, fsync, rename, fsync the folder (thin-edge.io's ``fs.rs``, RAUC). After
:func:`write` returns, the file holds the new bytes whatever is cut; before, it holds the old ones. What the disk does is behind
a port (:mod:`edgefleet_shared.files`), so that every operation can be cut or made to fail.
A folder has one owner (see ``lock``), whose temporary names are always the same; what several may write at once, a cache or a layout,
goes through :func:`write_shared`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from edgefleet_shared.errors import ArtifactError, ConflictError, EnvironmentProblem
from edgefleet_shared.files import DISK, FileSystem

T = TypeVar("T")

PIECE_BYTES = 256 * 1024  # what is held in memory of a file that is read piece by piece


@contextmanager
def disk_errors(path: Path, deed: str = "write") -> Iterator[None]:
    """Translate what a disk can answer into errors that say which path. To "read" what is not there stays FileNotFoundError."""
    try:
        yield
    except OSError as exc:
        if deed == "read" and isinstance(exc, FileNotFoundError):
            raise
        hints = {
            errno.ENOSPC: "free some space, or files where df -i shows none, then try again; nothing was lost",
            errno.EDQUOT: "the quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "check the owner and the mode of the folder",
            errno.EPERM: "check the owner and the mode of the folder",
            errno.EIO: "the disk or its driver failed; see the kernel's log",
        }
        hint = hints.get(exc.errno or 0, "")
        raise EnvironmentProblem(f"can't {deed} {path}: {exc.strerror or exc}", hint=hint) from exc


# What a disk answers about blocks that it can't give back any more: the device, and file systems that find their own records damaged.
_BROKEN = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})


def is_broken(error: EnvironmentProblem) -> bool:
    """Whether the disk itself failed, rather than being full, read-only or closed to us: another try helps only if it was a moment's doing."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _BROKEN


# What is answered where a folder, a pipe, a device or a link to itself lies under a file's name.
_NO_FILE = frozenset({errno.EISDIR, errno.ENXIO, errno.ELOOP})
# What is answered where a name can't be given because a folder, or a file in a folder's way, has it.
_TAKEN = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST})
ASIDES = 8  # of one name that are kept, where they can't take each other's place


def is_no_file(error: EnvironmentProblem) -> bool:
    """Whether something else than a file lies there: no other try helps."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_FILE


def unless_lost(read: Callable[[], T]) -> T | None:
    """What ``read`` returns; None when the disk broke over it, and over it again, or no file lies there: for what can be done without, or made
    anew.

    Raises:
        whatever else ``read`` does.
    """
    for _ in range(2):
        try:
            return read()
        except EnvironmentProblem as exc:
            if not is_broken(exc) and not is_no_file(exc):
                raise
    return None


def read(path: Path, *, files: FileSystem = DISK) -> bytes:
    """A file's bytes.

    Raises:
        FileNotFoundError: there is none. EnvironmentProblem: it can't be read.
    """
    return b"".join(pieces(path, files=files))


def read_or_damaged(path: Path, given_up: bool, *, files: FileSystem = DISK) -> bytes:
    """A file's bytes. Raises like :func:`read`, but ArtifactError where no file lies there, or the disk broke over it and was ``given_up``."""
    try:
        return read(path, files=files)
    except EnvironmentProblem as exc:
        if not is_no_file(exc) and not (given_up and is_broken(exc)):
            raise
        raise ArtifactError(f"{exc.message}, however often", hint="the agent begins a new one") from exc


def pieces(path: Path, *, files: FileSystem = DISK, size_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """A file's bytes in pieces of ``size_bytes``, only the last one shorter. Raises like :func:`read`."""
    with disk_errors(path, "read"):
        fd = files.open(path, os.O_RDONLY)
        try:
            piece = b""
            while more := files.read(fd, size_bytes - len(piece)):
                piece += more
                if len(piece) == size_bytes:
                    yield piece
                    piece = b""
            if piece:
                yield piece
        finally:
            files.close(fd)


def sync_folder(folder: Path, *, files: FileSystem = DISK) -> None:
    """fsync a folder, so that the names in it survive a power cut."""
    fd = files.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files.fsync(fd)
    finally:
        files.close(fd)


def make_folder(folder: Path, mode: int = 0o755, *, files: FileSystem = DISK) -> None:
    """Create ``folder`` and its parents, each name synced into its parent."""
    with disk_errors(folder):
        if files.is_folder(folder):
            return
        make_folder(folder.parent, mode, files=files)
        with suppress(FileExistsError):
            files.mkdir(folder, mode)
        sync_folder(folder.parent, files=files)


def write(path: Path, content: bytes, mode: int = 0o644, *, files: FileSystem = DISK) -> None:
    """Replace ``path`` by ``content``, durably and in one step.

    Raises:
        EnvironmentProblem: disk full, read-only, broken, no permission. Either the old or the new content is there, whole.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            try:
                _fill(temporary, content, mode, files)
            except OSError as exc:
                if exc.errno not in _NO_FILE | {errno.EACCES}:
                    raise
                _clear(temporary, files)
                _fill(temporary, content, mode, files)
            _name(temporary, path, files)
        except BaseException:
            with suppress(OSError):
                files.unlink(temporary)
            raise
        sync_folder(path.parent, files=files)


def write_shared(path: Path, content: bytes, *, files: FileSystem = DISK) -> None:
    """Like :func:`write`, where several may write ``path`` at once: what the last of them wrote is there, whole. What a killed one
    began may stay under another name.

    Raises:
        EnvironmentProblem: as :func:`write`.
    """
    with incoming(path.parent, files=files) as temporary:
        write_piece(temporary, content, 0, files=files)
        adopt(temporary, path, files=files)


@contextmanager
def incoming(folder: Path, *, files: FileSystem = DISK) -> Iterator[Path]:
    """A name in ``folder`` that no other writer has: a controller's threads, and its children, may store the same bytes at once.

    Raises:
        EnvironmentProblem: what a killed process of the same number left there can't be removed.
    """
    import threading  # the launcher never comes here, and is to stay small

    temporary = folder / f".in-{os.getpid()}-{threading.get_native_id()}"
    try:
        with disk_errors(temporary, "remove"), suppress(FileNotFoundError):
            files.unlink(temporary)
        yield temporary
    except BaseException:
        with suppress(OSError):
            files.unlink(temporary)
        raise


def _clear(path: Path, files: FileSystem) -> None:
    """Remove what is in a temporary file's way; a folder is kept for people."""
    try:
        files.unlink(path)
    except IsADirectoryError:
        set_aside(path, files=files)


def _name(temporary: Path, path: Path, files: FileSystem) -> None:
    """Give a file its name. A folder that has it is none of ours, and is kept for people."""
    try:
        files.replace(temporary, path)
    except IsADirectoryError:
        set_aside(path, files=files)
        files.replace(temporary, path)


def _fill(path: Path, content: bytes, mode: int, files: FileSystem) -> None:
    fd = files.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        files.fchmod(fd, mode)
        _write_all(fd, content, 0, files)
        files.fsync(fd)
    finally:
        files.close(fd)


def write_piece(path: Path, piece: bytes, offset: int, *, files: FileSystem = DISK) -> None:
    """Put a piece into a file that is filled out of order and has no name yet that anybody goes by. Not durable: see ``adopt``.

    Raises:
        EnvironmentProblem: the piece is not, or only partly, there.
    """
    with disk_errors(path):
        fd = files.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            _write_all(fd, piece, offset, files)
        finally:
            files.close(fd)


def sync(path: Path, *, files: FileSystem = DISK) -> None:
    """Make what was written of a file by :func:`write_piece` so far, and its name, survive a power cut.

    Raises:
        EnvironmentProblem: it can't; then the file is gone, see :func:`adopt`.
    """
    with disk_errors(path):
        try:
            _sync_file(path, files)
        except BaseException:
            with suppress(OSError):
                files.unlink(path)
            raise
        sync_folder(path.parent, files=files)


def _sync_file(path: Path, files: FileSystem) -> None:
    fd = files.open(path, os.O_RDONLY)
    try:
        files.fsync(fd)
    finally:
        files.close(fd)


def append(path: Path, piece: bytes, offset: int, *, files: FileSystem = DISK) -> None:
    """Put a piece at ``offset``, the end of what is safe of a file, durably; at 0 the file begins.

    Raises:
        EnvironmentProblem: nobody can tell how much of the piece is there. After a failed fsync not even a second try would:
            begin another file (see :func:`adopt`).
    """
    with disk_errors(path):
        fd = files.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            _write_all(fd, piece, offset, files)
            files.fsync(fd)
        finally:
            files.close(fd)
        if offset == 0:
            sync_folder(path.parent, files=files)


def _write_all(fd: int, content: bytes, offset: int, files: FileSystem) -> None:
    view = memoryview(content)
    while view:
        written = files.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def adopt(temporary: Path, path: Path, *, files: FileSystem = DISK) -> None:
    """Give a file that was filled piece by piece its final name, durably. Both lie in one file system.

    Raises:
        EnvironmentProblem: it can't; then the temporary file is gone, because a disk that failed to sync it once may claim
            the second time that it did (LWN 752063, "PostgreSQL's fsync() surprise").
    """
    with disk_errors(path):
        try:
            _sync_file(temporary, files)
            _name(temporary, path, files)
        except BaseException:
            with suppress(OSError):
                files.unlink(temporary)
            raise
        sync_folder(path.parent, files=files)


def remove(path: Path, *, files: FileSystem = DISK) -> None:
    """Remove a file if it is there, durably."""
    with disk_errors(path, "remove"):
        with suppress(FileNotFoundError):
            files.unlink(path)
        sync_folder(path.parent, files=files)


def set_aside(path: Path, *, files: FileSystem = DISK) -> Path:
    """Keep what is damaged, or no file, for people under ``<name>.damaged``, durably, so that its place is free. Returns where it is: folders that
    can't take each other's place are numbered."""
    with disk_errors(path, "set aside"):
        for number in range(1, ASIDES + 1):
            aside = path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")
            try:
                files.replace(path, aside)
                break
            except OSError as exc:
                if exc.errno not in _TAKEN or number == ASIDES:
                    raise
        sync_folder(path.parent, files=files)
    return aside


@contextmanager
def lock(folder: Path, owner: str) -> Iterator[None]:
    """Hold ``folder`` alone for as long as the context lasts; the kernel drops the lock when the process dies.

    A full or read-only disk does not keep the owner out: then only its name is missing from the lock file.

    Raises:
        ConflictError: another process holds it; the message carries its pid.
        EnvironmentProblem: the folder can't be opened at all.
    """
    make_folder(folder)
    path = folder / ".lock"
    with disk_errors(path, "lock"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as exc:
            if exc.errno not in _NO_FILE | {errno.EROFS, errno.ENOSPC, errno.EDQUOT}:
                raise
            # What is there will do, whatever it is, and the folder itself where nothing is.
            fd = os.open(path if path.exists() else folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = ""
            with suppress(OSError):
                holder = os.read(fd, 64).decode(errors="replace").strip()
            raise ConflictError(
                f"{folder} is in use by {holder or 'another process'}",
                hint="one process owns a state folder; stop that one first",
            ) from exc
        with suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{owner}, pid {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
