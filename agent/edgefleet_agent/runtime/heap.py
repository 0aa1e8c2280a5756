"""Memory that large messages took: receives that one went, hands what it left back to the kernel once no more come.

glibc keeps what was freed, for each thread that ever took some: a flood of messages of megabytes would stay resident for good, and be taken once more
by the next thread. So all threads take from one place. Other C libraries have no such functions, and keep less. Source: malloc_trim(3), mallopt(3).
"""

from __future__ import annotations

import ctypes

LARGE_BYTES = 1 << 20  # of a message that is worth it
_M_ARENA_MAX = -8


class Heap:
    """Of this process, made before its threads are. Any thread may say what went; one ticks."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)
        if self._trim is not None:
            library.mallopt(_M_ARENA_MAX, 1)
        self._went = self._left = False

    def held(self, size: int) -> None:
        """A message of ``size`` bytes was here, and is about to go."""
        if size > LARGE_BYTES:
            self._went = True

    def tick(self) -> None:
        """Call about once a second."""
        if self._went:
            self._went, self._left = False, True
        elif self._left and self._trim is not None:
            self._left = False
            self._trim(0)
