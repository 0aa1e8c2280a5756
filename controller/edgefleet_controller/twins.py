"""Stage 9, health: identities that more than one machine shows. Receives which start of an agent came online as which board, hands on which are two.

Each start of an agent has a name of its own, given once. A board that is started again never comes back as an earlier start; two
machines with one identity do so all the time, because each one's connection ends the other's. Pure.
"""

from __future__ import annotations

from collections import deque

RETURNS = 3  # of earlier starts within WINDOW_S: fewer may be what a broker repeats
WINDOW_S = 600.0
REMEMBERED = 8  # starts of a board: more copies than that return too seldom to be in each other's way


class Twins:
    """Not for several threads."""

    def __init__(self) -> None:
        self._starts: dict[str, deque[str]] = {}
        self._returns: dict[str, deque[float]] = {}

    def online(self, device: str, boot: str, now: float) -> None:
        """A start of a board's agent came online, at ``now`` seconds."""
        starts = self._starts.setdefault(device, deque(maxlen=REMEMBERED))
        if starts and starts[-1] == boot:
            return
        if boot in starts:
            starts.remove(boot)
            self._returns.setdefault(device, deque(maxlen=RETURNS)).append(now)
        starts.append(boot)

    def are_there(self, device: str, now: float) -> bool:
        """Whether more than one machine showed the board's identity within the last :data:`WINDOW_S`."""
        returns = self._returns.get(device, deque[float]())
        return len(returns) == RETURNS and now - returns[0] <= WINDOW_S
