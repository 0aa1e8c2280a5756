"""Memory for the bodies that clients send: receives how long each is to be, hands on where it may go, or says that there is no room."""

from __future__ import annotations

import mmap

from edgefleet_agent.runtime import head as heads
from edgefleet_agent.runtime.head import Refused
from edgefleet_agent.runtime.job import NO_MEMORY

# For all bodies of all connections, and as much for answers that nobody reads, on a board that has it.
ROOM_BYTES = 256 * 1024 * 1024
ROOM_SHARE = 4  # of the memory that is free when the runtime starts: bodies and answers together leave half of it
HEAP_BYTES = 1 << 20  # a body up to this comes into memory that is there already, and counts once it is announced


def room(available_bytes: int) -> int:
    """Bytes that bodies may take, and answers as many, on a board that has so many free; one body of the largest size in any case."""
    return max(heads.MAX_BODY_BYTES, min(ROOM_BYTES, available_bytes // ROOM_SHARE))


class BodyRoom:
    """What the bodies of all connections take together.

    Args:
        limit_bytes: see :func:`room`.
    """

    __slots__ = ("held_bytes", "limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0

    def take(self, count: int, *, is_small: bool = False) -> None:
        """Hold so many more bytes, or none of them. What ``is_small`` always has room.

        Raises:
            Refused: all bodies together would be too large.
        """
        if self.held_bytes + count > self.limit_bytes and not is_small:
            raise Refused(503, "too many large requests at once")
        self.held_bytes += count

    def give_back(self, count: int) -> None:
        """Hold so many bytes no longer."""
        self.held_bytes -= count


def announced(length: int) -> memoryview:
    """Where a body that is to come may go. Pages of a large one exist once something is in them; of the heap they would at once, for a mere head.

    Raises:
        Refused: there is no room for so many.
    """
    try:
        if length <= HEAP_BYTES:
            return memoryview(bytearray(length))
        return memoryview(mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except (MemoryError, OSError):
        raise Refused(503, NO_MEMORY) from None
