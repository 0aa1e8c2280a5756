"""Answers of the gRPC gateway that clients have not taken: receives who got how much, hands on whose call is given up for it.

The library keeps an answer until its client has read it, and twice: a few clients that never do would fill the board's memory. How much of one is
read nobody is told, only when all of it is; so a call is overdue by the time since it was answered.
"""

from __future__ import annotations

import threading
import time

from edgefleet_agent.runtime.grpc_messages import CallError
from edgefleet_agent.runtime.grpc_runtime import Call
from edgefleet_agent.runtime.heap import Heap
from edgefleet_agent.runtime.untaken import UNREAD, Untaken

_COPIES = 2  # as bytes of Python's, and as the library's own


class Answers:
    """Any thread answers; one ticks.

    Args:
        room_bytes: for all of them.
    """

    def __init__(self, room_bytes: int, heap: Heap) -> None:
        self._untaken, self._lock, self._heap = Untaken[Call](room_bytes), threading.Lock(), heap

    def hold(self, call: Call, answer_bytes: int) -> None:
        """An answer is about to go; those that have waited for a while make room for it.

        Raises:
            CallError: there is none.
        """
        now, size = time.monotonic(), answer_bytes * _COPIES
        with self._lock:
            if not self._untaken.fits(size):
                for late in self._untaken.stalled(now):
                    self._untaken.remove(late)
                    late.give_up()
                    if self._untaken.fits(size):
                        break
            if not self._untaken.fits(size):
                raise CallError("RESOURCE_EXHAUSTED", UNREAD)
            self._untaken.add(call, size, size, now)
        call.when_over(lambda: self._taken(call, answer_bytes))

    def tick(self) -> None:
        """Give up calls whose answers nobody takes. Call about once a second."""
        now = time.monotonic()
        with self._lock:
            overdue = self._untaken.overdue(now)
        for call in overdue:
            call.give_up()

    def _taken(self, call: Call, answer_bytes: int) -> None:
        with self._lock:
            self._untaken.remove(call)
        self._heap.held(answer_bytes)
