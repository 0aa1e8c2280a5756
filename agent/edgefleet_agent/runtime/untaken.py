"""Answers that their clients do not read: receives how much of each is left, hands on which connections to give up for it. Pure.

The kernel has an answer at once as a rule. What it has no room for stays in this process for as long as the client does not read, so a few that
never do would fill the board's memory with answers. Times are :func:`time.monotonic`'s.
"""

from __future__ import annotations

from typing import Generic, TypeVar

SMALL_BYTES = 64 * 1024  # what is no larger always has room, a body too: one for each connection fills no memory
STALLED_S = 1.0  # a client that has read nothing for so long makes room for the answer to another
TAKE_LIMIT_S = 30.0  # and after that its connection is closed in any case
UNREAD = "too many large answers wait for clients that do not read them"

_Who = TypeVar("_Who")


class _Rest:
    __slots__ = ("left", "moved_at", "size")

    def __init__(self, size: int, left: int, now: float) -> None:
        self.size, self.left, self.moved_at = size, left, now


class Untaken(Generic[_Who]):
    """The answers that are not wholly with the kernel yet, one for each connection.

    Args:
        room_bytes: for all of them.
    """

    def __init__(self, room_bytes: int) -> None:
        self._room_bytes = room_bytes
        self._rest: dict[_Who, _Rest] = {}
        self.held_bytes = 0

    def __contains__(self, who: _Who) -> bool:
        return who in self._rest

    def add(self, who: _Who, size: int, left: int, now: float) -> None:
        """``who`` was written ``size`` bytes, of which ``left`` wait for its client; all of them stay in memory until none does."""
        rest = self._rest.setdefault(who, _Rest(0, left, now))
        rest.size, rest.left = rest.size + size, left
        self.held_bytes += size

    def remove(self, who: _Who) -> None:
        """Its client has read them, or never will."""
        rest = self._rest.pop(who, None)
        if rest is not None:
            self.held_bytes -= rest.size

    def is_overdue(self, who: _Who, left: int, now: float) -> bool:
        """Whether its client has read nothing for longer than anybody waits; ``left`` is what is left now."""
        rest = self._rest[who]
        if left != rest.left:
            rest.left, rest.moved_at = left, now
        return now - rest.moved_at > TAKE_LIMIT_S

    def fits(self, size: int) -> bool:
        """Whether there is room for another answer."""
        return size <= SMALL_BYTES or not self._rest or self.held_bytes + size <= self._room_bytes

    def overdue(self, now: float) -> list[_Who]:
        """Those of whom that is so where nobody tells what is left."""
        return [who for who, rest in self._rest.items() if self.is_overdue(who, rest.left, now)]

    def stalled(self, now: float) -> list[_Who]:
        """Whose clients have read nothing for a while, the longest first."""
        found = [who for who, rest in self._rest.items() if now - rest.moved_at > STALLED_S]
        return sorted(found, key=lambda who: self._rest[who].moved_at)
