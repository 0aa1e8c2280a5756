"""Stage 9, health: events on their way. Receives event bodies, hands on numbered events until the controller has stored them.

Bounded: when the line is down for long the oldest go first, and a ``Dropped`` event says how many. A new start of the agent is a
new ``boot`` with its own numbers; what matters of before is retained in ``reported``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from edgefleet_shared.clock import Clock
from edgefleet_shared.messages import Ack, Body, Dropped, Event, Health, encode


class Spool:
    """Unacknowledged events of one boot.

    Args:
        publish: sends an event's bytes; called again for all of them after a reconnect.
        limit: how many are kept.
    """

    def __init__(self, device: str, boot: str, publish: Callable[[bytes], None], clock: Clock, limit: int) -> None:
        self._device, self._boot, self._publish, self._clock = device, boot, publish, clock
        self._limit = limit
        self._waiting: deque[tuple[int, bool, bytes]] = deque()
        self._sequence = 0
        self._dropped = self._dropped_up_to = 0
        self.up = False

    def add(self, body: Body) -> None:
        """Number an event and send it."""
        if len(self._waiting) >= self._limit:
            self._drop_one()
        self._append(body)

    def _append(self, body: Body) -> None:
        self._sequence += 1
        event = Event(device=self._device, boot=self._boot, sequence=self._sequence, at=self._clock.now(), body=body)
        content = encode(event)
        self._waiting.append((self._sequence, isinstance(body, Health), content))
        if self.up:
            self._publish(content)

    def _drop_one(self) -> None:
        # Health figures age fastest; outcomes are given up last.
        index = next((i for i, (_, is_health, _) in enumerate(self._waiting) if is_health), 0)
        self._dropped_up_to = max(self._dropped_up_to, self._waiting[index][0])
        del self._waiting[index]
        self._dropped += 1

    def came_up(self) -> None:
        """The line is there: everything that was not acknowledged goes out (again)."""
        self.up = True
        for _, _, content in self._waiting:
            self._publish(content)
        if self._dropped:
            # Last, so that it is stored after everything that was kept: it tells the controller to wait for no more.
            dropped, self._dropped = self._dropped, 0
            self._append(Dropped(count=dropped, up_to=self._dropped_up_to))

    def acknowledge(self, ack: Ack) -> None:
        """The controller has stored everything up to a number."""
        if ack.boot != self._boot:
            return
        while self._waiting and self._waiting[0][0] <= ack.sequence:
            self._waiting.popleft()

    def __len__(self) -> int:
        return len(self._waiting)
