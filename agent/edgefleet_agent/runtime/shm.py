"""Shared memory between front and one worker: receives tensors' bytes, hands on the same bytes without a pipe in between.

Two anonymous memory files per worker process, each cut into equally many slots: *inputs*, which the front alone may write, and
*answers*, which the worker writes. A slot carries one request: its inputs wherever the front put them, its outputs from offset 0,
each on a 64-byte line. The files are sealed against resizing, so that a worker gone mad can't make the front's mapping fault; of
inputs it gets a descriptor that reads only, and has mapped and closed it before it runs anything that it distrusts, so that it can't change what it
was asked; everything else that it says is checked before use. Pages exist only once touched, and are given back when they have not
been needed for a while (a file sealed against writing could not be cut holes into).
Source: memfd_create(2), fcntl(2) "File sealing", madvise(2) MADV_REMOVE, mmap(2): what was opened for reading is never mapped writable.
"""

from __future__ import annotations

import fcntl
import mmap
import os

ALIGNMENT = 64
PAGE_BYTES = mmap.PAGESIZE
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4
UNUSED_S = 60.0  # how long pages beyond the common size are kept for the next large request


def aligned(offset: int) -> int:
    return (offset + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


class Arena:
    """The mapping of one memory file. It lives for as long as anything looks into it.

    Args:
        fd: the file; owned by the caller.
        slot_count, slot_bytes: its division; both sides agree on them.
        writable: False for a descriptor that reads only.
        shown_writable: whether ``slots`` are; default ``writable``.
    """

    def __init__(
        self, fd: int, slot_count: int, slot_bytes: int, *, writable: bool, shown_writable: bool | None = None
    ) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, slot_count * slot_bytes, mmap.MAP_SHARED, protection)
        view = memoryview(self._map)
        if not (writable if shown_writable is None else shown_writable):
            view = view.toreadonly()
        self._slot_bytes = slot_bytes
        self.slots = [view[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slot_count)]

    def give_back(self, index: int, kept_bytes: int) -> None:
        """Let the kernel have the pages of a slot beyond its first ``kept_bytes``; they read as zeros and come back when they are touched.

        Raises:
            OSError: it does not do that here.
        """
        begin = -(-kept_bytes // PAGE_BYTES) * PAGE_BYTES
        if begin < self._slot_bytes:
            self._map.madvise(mmap.MADV_REMOVE, index * self._slot_bytes + begin, self._slot_bytes - begin)

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


def seal(fd: int) -> None:
    """Let nobody seal or unseal the file from here on."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL)


def reading(fd: int) -> int:
    """Another descriptor of the file, through which nobody can write, nor map what can be written; the caller closes it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


class Unused:
    """Which slots have pages that nobody has needed for a while. Pure; times in seconds of one clock.

    Args:
        slot_count: how many there are; each comes up once in :data:`UNUSED_S`.
    """

    def __init__(self, slot_count: int, now: float) -> None:
        self._large = [now] * slot_count
        self._next, self._due = 0, now + UNUSED_S / slot_count

    def saw_large(self, index: int, now: float) -> None:
        """A request of more than the common size is in that slot."""
        self._large[index] = now

    def due(self, now: float) -> int | None:
        """The slot to look after now, None for none."""
        if now < self._due:
            return None
        self._due = now + UNUSED_S / len(self._large)
        index, self._next = self._next, (self._next + 1) % len(self._large)
        return index if now - self._large[index] >= UNUSED_S else None
