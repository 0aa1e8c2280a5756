"""Shared memory between front and one worker: receives tensors' bytes, hands on the same bytes without a pipe in between.

One anonymous memory file per worker process, cut into slots; a slot carries one request: its inputs from offset 0, its
outputs behind them, each tensor on a 64-byte line. The file is sealed against resizing, so that a worker gone mad can't make
the front's mapping fault; everything else that a worker says is checked before use. Pages exist only once touched.
"""

from __future__ import annotations

import fcntl
import mmap
import os

ALIGNMENT = 64
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


def aligned(offset: int) -> int:
    return (offset + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


class Arena:
    """The mapping of one memory file.

    Args:
        fd: the file; owned by the caller.
        slot_count, slot_bytes: its division; both sides agree on them.
    """

    def __init__(self, fd: int, slot_count: int, slot_bytes: int) -> None:
        self.slot_count, self.slot_bytes = slot_count, slot_bytes
        self._map = mmap.mmap(fd, slot_count * slot_bytes)
        self._view = memoryview(self._map)
        self.slots = [self._view[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slot_count)]

    def close(self) -> None:
        for slot in self.slots:
            slot.release()
        self._view.release()
        self._map.close()


def create(slot_count: int, slot_bytes: int) -> int:
    """A new sealed memory file of ``slot_count * slot_bytes`` zero bytes; the caller closes the descriptor."""
    fd = os.memfd_create("edgefleet-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, slot_count * slot_bytes)
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)
    return fd
