"""The memory between front and worker: who may write it, and that what nobody needs goes back to the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest
from edgefleet_agent.runtime import shm
from edgefleet_agent.runtime.shm import PAGE_BYTES, UNUSED_S, Arena, Unused

SLOTS, SLOT_BYTES = 3, 8 * PAGE_BYTES


@pytest.fixture
def file() -> Iterator[int]:
    made = shm.create(SLOTS, SLOT_BYTES)
    yield made
    os.close(made)


def held_pages(file: int) -> int:
    return os.fstat(file).st_blocks * 512 // PAGE_BYTES


def test_whoever_got_the_reading_descriptor_can_not_write_by_it(file: int) -> None:
    shm.seal(file)
    reader = shm.reading(file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(reader, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(reader, SLOTS * SLOT_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    place = libc.mmap(None, PAGE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, reader, 0)
    refused = libc.mprotect(ctypes.c_void_p(place), PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE)
    assert (refused, os.strerror(ctypes.get_errno())) == (-1, "Permission denied")
    libc.munmap(ctypes.c_void_p(place), ctypes.c_size_t(PAGE_BYTES))
    os.close(reader)


def test_what_lies_beyond_the_common_size_of_a_slot_goes_back_and_nothing_else(file: int) -> None:
    front = Arena(file, SLOTS, SLOT_BYTES, writable=True)
    shm.seal(file)
    reader = shm.reading(file)
    worker = Arena(reader, SLOTS, SLOT_BYTES, writable=False)
    os.close(reader)
    for slot in front.slots:
        slot[:] = b"x" * SLOT_BYTES
    assert held_pages(file) == SLOTS * 8
    front.give_back(1, PAGE_BYTES + 1)
    assert held_pages(file) == SLOTS * 8 - 6
    assert bytes(worker.slots[1]) == b"x" * 2 * PAGE_BYTES + bytes(6 * PAGE_BYTES)
    assert bytes(worker.slots[0]) == bytes(worker.slots[2]) == b"x" * SLOT_BYTES
    front.give_back(2, SLOT_BYTES)
    assert bytes(worker.slots[2]) == b"x" * SLOT_BYTES
    front.slots[1][:] = b"y" * SLOT_BYTES
    assert bytes(worker.slots[1]) == b"y" * SLOT_BYTES


def test_answers_are_shown_to_the_front_for_reading_only_though_it_gives_their_pages_back(file: int) -> None:
    front = Arena(file, SLOTS, SLOT_BYTES, writable=True, shown_writable=False)
    worker = Arena(file, SLOTS, SLOT_BYTES, writable=True)
    worker.slots[0][:] = b"x" * SLOT_BYTES
    with pytest.raises(TypeError):
        front.slots[0][0] = 1
    front.give_back(0, 0)
    assert held_pages(file) == 0


def test_each_slot_comes_up_once_in_a_while_unless_something_large_was_in_it() -> None:
    unused, step = Unused(3, 0.0), UNUSED_S / 3
    assert unused.due(step - 1) is None
    assert unused.due(step) is None  # slot 0: it was new too short a time ago
    assert unused.due(step) is None  # and nothing more is due
    assert unused.due(2 * step) is None
    assert unused.due(3 * step) == 2
    assert unused.due(4 * step) == 0
    unused.saw_large(1, 4 * step)
    assert unused.due(5 * step) is None
    assert [unused.due(n * step) for n in (6, 7, 8)] == [2, 0, 1]
