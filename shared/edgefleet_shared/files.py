"""The file-system port: what durable writing needs of a disk, one method per operation that can fail or be cut.

Receives paths and bytes, hands on what the kernel says. :class:`Disk` is the real adapter; a recording one enumerates what a
power cut can leave behind, a failing one answers as a broken disk does. Paths are absolute or relative as for ``os``; every
method raises ``OSError`` as ``os`` does.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Protocol


class FileSystem(Protocol):
    """The operations, named after the system calls."""

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """A descriptor of this port; ``flags`` are those of ``os.open``. Raises OSError with EISDIR for a folder, unless they ask for one, and with
        ENXIO for what is neither: nobody waits for the other end of a pipe."""
        ...

    def close(self, fd: int) -> None: ...

    def read(self, fd: int, size_bytes: int) -> bytes:
        """Up to that many bytes from where the last read ended; empty at the end."""
        ...

    def pwrite(self, fd: int, piece: memoryview, offset: int) -> int:
        """Returns how many bytes were written, which may be fewer."""
        ...

    def fchmod(self, fd: int, mode: int) -> None: ...

    def fsync(self, fd: int) -> None:
        """A file's bytes, or a folder's names, survive a power cut from now on."""
        ...

    def replace(self, source: Path, target: Path) -> None: ...

    def unlink(self, path: Path) -> None: ...

    def mkdir(self, path: Path, mode: int) -> None: ...

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, in any order."""
        ...

    def is_folder(self, path: Path) -> bool: ...

    def size_bytes(self, path: Path) -> int | None:
        """The size of a file; None where there is no file."""
        ...

    def free_bytes(self, folder: Path) -> int:
        """What an ordinary user may still write."""
        ...


class Disk:
    """The real one."""

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)
        kind = os.fstat(fd).st_mode
        if stat.S_ISREG(kind) or (stat.S_ISDIR(kind) and flags & os.O_DIRECTORY):
            return fd
        os.close(fd)
        refused = errno.EISDIR if stat.S_ISDIR(kind) else errno.ENXIO
        raise OSError(refused, os.strerror(refused) if refused == errno.EISDIR else "it is no file", str(path))

    def close(self, fd: int) -> None:
        os.close(fd)

    def read(self, fd: int, size_bytes: int) -> bytes:
        return os.read(fd, size_bytes)

    def pwrite(self, fd: int, piece: memoryview, offset: int) -> int:
        return os.pwrite(fd, piece, offset)

    def fchmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path, mode: int) -> None:
        os.mkdir(path, mode)

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def is_folder(self, path: Path) -> bool:
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def size_bytes(self, path: Path) -> int | None:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def free_bytes(self, folder: Path) -> int:
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize


DISK = Disk()
