"""One request and its answer, as a connection and whoever answers on it see them: hands on bodies where they lie, takes back status and bytes."""

from __future__ import annotations

from typing import Any, Protocol

from edgefleet_agent.runtime.body_room import BodyRoom
from edgefleet_agent.runtime.head import Head
from edgefleet_agent.runtime.peer import Peer

JSON = b"application/json"
BINARY = b"application/octet-stream"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"


class Place(Protocol):
    """Where a body may be put as it comes. ``view`` is as long as the body."""

    view: memoryview

    def release(self) -> None:
        """Nobody writes or reads it any more, unless whoever handles the request took it over. May be called again."""
        ...


class Request:
    """A whole request. ``body`` is what came; it lies in ``place``, the handler's own :class:`Place`, when one was lent."""

    __slots__ = ("_room", "body", "head", "held_bytes", "peer", "place")

    def __init__(
        self, head: Head, body: bytes | bytearray | memoryview, place: Any, peer: Peer, room: BodyRoom
    ) -> None:
        self.head, self.body, self.place, self.peer, self._room = head, body, place, peer, room
        self.held_bytes = len(body) if place is None else 0  # of the room for bodies, taken already

    def unpack(self, body: bytes | bytearray | memoryview) -> None:
        """Put the plain body in place of what came. It counts as what it is: it may have to wait for its worker too.

        Raises:
            Refused: all bodies together would be too large.
        """
        self._room.take(len(body) - self.held_bytes)
        self.body, self.held_bytes = body, len(body)

    def release(self) -> None:
        """It is answered, or nobody waits for that any more: what its body took is free."""
        self._room.give_back(self.held_bytes)
        if self.place is not None:
            self.place.release()


class Reply(Protocol):
    def __call__(
        self, status: int, body: bytes, content_type: bytes, header_length: int | None = None, allow: bytes = b""
    ) -> bool:
        """Answer.

        Args:
            header_length: of the inference header in ``body``, None when there is none.
            allow: the methods that the resource takes, told with status 405.

        Returns:
            False when there is no room for that answer, and the client was told so instead.
        """
        ...


class Handler(Protocol):
    """What answers requests."""

    def place(self, head: Head, begun: bytes, peer: Peer) -> Place | None:
        """Where the body of a request with this head should go, of which ``begun`` is there; None for memory of the connection's own."""
        ...

    def handle(self, request: Request, reply: Reply) -> None:
        """Answer through ``reply``, exactly once, now or later."""
        ...
