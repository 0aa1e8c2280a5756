"""Shared memory between front and one worker: receives tensors' bytes, hands on the same bytes without a pipe in between.

Two anonymous memory files per worker process, each cut into equally many slots: *inputs*, which the front alone may write, and
*answers*, which the worker writes. A slot carries one request: its inputs wherever the front put them, its outputs from offset 0,
each on a 64-byte line. The files are sealed against resizing, so that a worker gone mad can't make the front's mapping fault, and
inputs against writing, so that it can't change what it was asked; everything else that it says is checked before use. Pages
exist only once touched.
Source: memfd_create(2), fcntl(2) "File sealing". F_SEAL_FUTURE_WRITE needs Linux 5.1; before it only the worker's mapping is read-only.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

ALIGNMENT = 64
PAGE_BYTES = mmap.PAGESIZE
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 1, 2, 4, 16


def aligned(offset: int) -> int:
    return (offset + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


class Arena:
    """The mapping of one memory file. It lives for as long as anything looks into it.

    Args:
        fd: the file; owned by the caller.
        slot_count, slot_bytes: its division; both sides agree on them.
        writable: False for the side that only reads.
    """

    def __init__(self, fd: int, slot_count: int, slot_bytes: int, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        view = memoryview(mmap.mmap(fd, slot_count * slot_bytes, mmap.MAP_SHARED, protection))
        self.slots = [view[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slot_count)]

    def touch(self, length: int) -> None:
        """Have the kernel make and map the first ``length`` bytes of every slot now and not during a request.

        The worker does that, for both files: a page of shared memory that was read once exists.
        """
        for slot in self.slots:
            for page in range(0, min(length, len(slot)), PAGE_BYTES):
                if slot.readonly:
                    slot[page]
                else:
                    slot[page] = 0


def create(slot_count: int, slot_bytes: int) -> int:
    """A new memory file of ``slot_count * slot_bytes`` zero bytes that keeps its size; the caller closes the descriptor."""
    fd = os.memfd_create("edgefleet-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, slot_count * slot_bytes)
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    return fd


def seal(fd: int, *, against_writing: bool) -> None:
    """Let nobody seal or unseal the file from here on; ``against_writing``: nor write to it but through mappings made before."""
    if against_writing:
        with contextlib.suppress(OSError):  # a kernel before 5.1: the worker maps it read-only, but could map it again
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL)
