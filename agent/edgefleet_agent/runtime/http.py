"""HTTP/1.1 on the runtime's sockets: receives bytes from anyone, hands on whole requests, writes answers in their order.

A body goes from the socket straight to where the handler wants it, so that a picture is in shared memory when its last byte came;
and a head that equals the one before it on the connection is not parsed again.
Every resource that a client can take is bounded here: header and body sizes, time to send them, pipelined requests,
connections, body bytes held at once, answers that nobody reads. Whatever is wrong with a request costs that request or its connection, nothing else.
Not handled here: what a head means (:mod:`head`). Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import lru_cache
from http import HTTPStatus
from typing import cast

from edgefleet_agent.runtime import head as heads
from edgefleet_agent.runtime.answer import error_body
from edgefleet_agent.runtime.body_room import HEAP_BYTES, BodyRoom, announced
from edgefleet_agent.runtime.exchange import JSON, Handler, Place, Request
from edgefleet_agent.runtime.head import Head, Refused
from edgefleet_agent.runtime.job import NO_MEMORY
from edgefleet_agent.runtime.peer import Peer
from edgefleet_agent.runtime.untaken import SMALL_BYTES, UNREAD, Untaken

MAX_PIPELINED = 16
MAX_CONNECTIONS = 1024
SILENT_S = 10.0  # a connection that has been silent for so long may be closed to make room for another
REQUEST_LIMIT_S = 30.0  # from a request's first byte to its last
LINGER_S = 2.0  # how long a client that was hung up on may go on sending: a reset would take its last answer away
LAST_CALL_S = 0.3  # how long a client that was let in may stay silent when the server ends
LOOK_S = 0.01  # how often a server that ends looks whether its clients are gone
JOINED_BYTES = 64 * 1024  # an answer up to this is written in one piece; a larger one is not copied for it
FIRST_READ_BYTES = 2 * 1024  # enough for a head and a small body; what is beyond goes where the body belongs


class Server:
    """What all connections share.

    Args:
        room_bytes: for bodies, and as much for answers that nobody reads.
    """

    def __init__(self, handler: Handler, room_bytes: int) -> None:
        self.handler, self.bodies = handler, BodyRoom(room_bytes)
        self.connections: set[Connection] = set()
        self.untaken = Untaken[Connection](room_bytes)
        self.refused = 0
        self.ending = False  # every answer is its connection's last
        # The loop asks for a buffer and says how much it put there without anything in between, so one serves them all.
        self.first_read = memoryview(bytearray(FIRST_READ_BYTES))

    def connection(self) -> asyncio.BaseProtocol:
        return Connection(self)

    def make_room(self) -> bool:
        """Close the connection that has been silent the longest, if one has been long enough: programs that forget theirs must not keep
        all others out. Returns whether there was one."""
        silent = [c for c in self.connections if c.silent_since is not None]
        found = min(silent, key=lambda c: c.silent_since or 0.0, default=None)
        if found is None or time.monotonic() - (found.silent_since or 0.0) < SILENT_S:
            return False
        found.abandon()
        return True

    def has_room(self, answer_bytes: int) -> bool:
        """Whether an answer can be held until its client reads it; clients that don't read theirs make room."""
        if not self.untaken.fits(answer_bytes):
            for connection in self.untaken.stalled(time.monotonic()):
                connection.abandon()
                if self.untaken.fits(answer_bytes):
                    break
        return self.untaken.fits(answer_bytes)

    def tick(self) -> None:
        """End requests that take too long to arrive. Call about once a second."""
        now = time.monotonic()
        for connection in list(self.connections):
            connection.check_time(now)

    async def close(self, limit_s: float) -> None:
        """End every connection: a request that is there or on its way is answered, a client that is silent is not waited for.

        Call when nobody listens any more; connections that were accepted just before still arrive and are heard.
        """
        now = began = time.monotonic()
        self.ending = True
        for connection in list(self.connections):
            connection.last_call(began)
        while (self.connections and now - began < limit_s) or now - began < LOOK_S:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.check_time(now)
        for connection in list(self.connections):
            connection.abandon()


class Connection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._peer = Peer(None)
        self._waiting: deque[Request] = deque()
        self._answered: Request | None = None  # the one that is being answered
        self._closing = False  # nothing more is read; what was taken is still answered
        self._heard_all = False  # the client sends no more
        self._paused_reading = False
        self._paused_writing = False
        self._request_began = 0.0
        self._hung_up = 0.0
        self._called = 0.0  # when its last call began
        self._asked_last = 0.0  # when it came, or was answered last
        self._last_raw, self._last_head = b"", Head()
        self._pending = b""  # a head that is not whole yet
        self._head: Head | None = None  # of the request whose body is coming
        self._place: Place | None = None
        self._target = memoryview(b"")  # where its body goes
        self._filled = 0
        self._coming_bytes = 0  # of the body that is not whole yet

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class
        self._peer = Peer(transport.get_extra_info("socket"))
        # Otherwise an answer waits until the loop has done what else it has to do.
        self._transport.set_write_buffer_limits(high=0)
        self._asked_last = time.monotonic()
        self._server.connections.add(self)
        if len(self._server.connections) > MAX_CONNECTIONS and not self._server.make_room():
            self._refuse(503, f"more than {MAX_CONNECTIONS} connections")
        if self._server.ending:
            self.last_call(time.monotonic())

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._transport = None

    def _forget(self) -> None:
        self._server.connections.discard(self)
        self._server.untaken.remove(self)
        self._forget_body()
        self._forget_waiting()

    @property
    def silent_since(self) -> float | None:
        """Since when it has asked nothing (:func:`time.monotonic`); None while it asks, or waits for an answer."""
        busy = self._answered is not None or bool(self._waiting) or self._request_began or self._closing
        return None if busy else self._asked_last

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._filled < len(self._target) and not self._closing:
            return self._target[self._filled :]
        return self._server.first_read

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            return
        try:
            if self._filled < len(self._target):
                self._filled += nbytes
                if self._place is None and len(self._target) > HEAP_BYTES:
                    self._hold(nbytes)
                if self._filled == len(self._target):
                    self._body_complete()
            else:
                self._take(bytes(self._server.first_read[:nbytes]))
        except Refused as exc:
            self._refuse(exc.status, str(exc))

    def eof_received(self) -> bool:
        """The client sends no more; it still gets the answers to what it sent."""
        self._heard_all = True
        if self._request_began and not self._closing:
            self._refuse(400, "the request is cut off")
        self._closing = True
        return self._answered is not None or bool(self._waiting)

    def pause_writing(self) -> None:
        self._paused_writing = True

    def resume_writing(self) -> None:
        self._paused_writing = False
        self._server.untaken.remove(self)
        self._asked_last = time.monotonic()
        if self._hung_up:
            self._hung_up = self._asked_last  # it could not hear it before
        self._next()

    # --- requests in

    def _take(self, data: bytes) -> None:
        """Whatever came while no body has a target: heads, small bodies, pieces of chunked bodies."""
        if not self._request_began:
            self._request_began = time.monotonic()
        while data and not self._closing:
            if self._head is not None:
                self._chunk(self._head, data)
                return
            if self._last_raw and not self._pending and data.startswith(self._last_raw):
                data = self._begin_body(self._last_head, data[len(self._last_raw) :])
                continue
            data = self._pending + data if self._pending else data
            self._pending = b""
            if data[:1] in b"\r\n":
                data = data.lstrip(b"\r\n")  # RFC 9112, 2.2
                continue
            end = data.find(heads.END) + len(heads.END)
            if end < len(heads.END):
                heads.check_begun(data)
                self._pending = data
                return
            raw, data = data[:end], data[end:]
            head = heads.parse(raw)
            self._last_raw, self._last_head = (b"", head) if head.chunked else (raw, head)
            data = self._begin_body(head, data)
        if not data and self._head is None and not self._pending:
            self._request_began = 0.0

    def _begin_body(self, head: Head, data: bytes) -> bytes:
        """A head is there, and ``data`` behind it; returns what of that belongs to the next request."""
        length = head.content_length
        if (
            head.expects_continue
            and self._transport is not None
            and self._answered is None
            and len(data) < max(length, 1)
        ):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if head.chunked:
            self._head = head
            return data
        if len(data) >= length:
            self._hold(length)
            if len(data) == length:
                self._request_began = 0.0  # nothing of another one is there
            self._complete(head, data[:length], None)
            return data[length:]
        self._head = head
        # A place is for one body at a time, and the one that is being answered has it.
        self._place = None if self._answered is not None else self._server.handler.place(head, data, self._peer)
        if self._place is None:
            self._hold(len(data) if length > HEAP_BYTES else length)
        self._target = announced(length) if self._place is None else self._place.view
        self._target[: len(data)] = data
        self._filled = len(data)
        return b""

    def _body_complete(self) -> None:
        assert self._head is not None
        head, body, place = self._head, self._target, self._place
        self._head, self._target, self._place, self._filled = None, memoryview(b""), None, 0
        self._request_began = 0.0
        self._complete(head, body, place)

    def _chunk(self, head: Head, data: bytes) -> None:
        assert head.parser is not None
        try:
            self._hold(head.parser.feed(data))
        except MemoryError:
            raise Refused(503, NO_MEMORY) from None
        if not head.parser.done:
            return
        self._head = None
        self._request_began = 0.0
        if head.parser.followed:
            head.keep_alive = False  # what came behind is lost, so its sender must send it again
        self._complete(head, head.parser.body, None)

    def _hold(self, count: int) -> None:
        coming = self._coming_bytes + count
        # Who sends what is large by the dozen must not keep those out who ask for little.
        is_small = coming <= SMALL_BYTES and self._answered is None and not self._waiting
        self._server.bodies.take(count, is_small=is_small)
        self._coming_bytes = coming

    def _complete(self, head: Head, body: bytes | bytearray | memoryview, place: Place | None) -> None:
        self._coming_bytes = 0  # counted with its request from here on
        request = Request(head, body, place, self._peer, self._server.bodies)
        if self._answered is None and not self._waiting and not self._paused_writing:
            self._handle(request)
            return
        self._waiting.append(request)
        if len(self._waiting) > MAX_PIPELINED and not self._paused_reading and self._transport is not None:
            self._paused_reading = True
            self._transport.pause_reading()

    # --- answers out

    def _next(self) -> None:
        while self._waiting and self._answered is None and not self._paused_writing and self._transport is not None:
            request = self._waiting.popleft()
            if self._paused_reading and len(self._waiting) <= MAX_PIPELINED // 2:
                self._paused_reading = False
                self._transport.resume_reading()
            self._handle(request)
        if self._closing and self._answered is None and not self._waiting:
            self._hang_up()

    def _handle(self, request: Request) -> None:
        self._answered = request
        self._server.handler.handle(request, self._reply)

    def _reply(
        self, status: int, body: bytes, content_type: bytes, header_length: int | None = None, allow: bytes = b""
    ) -> bool:
        request = self._answered
        assert request is not None
        self._answered = None
        self._asked_last = time.monotonic()
        request.release()
        if self._transport is None or self._transport.is_closing():
            return True
        head = request.head
        if self._server.ending and not self._waiting and not self._request_began:
            self._closing = True
        keep_alive = head.keep_alive and not (self._closing and not self._waiting)
        fits = self._server.has_room(len(body))
        if not fits:
            status, body, content_type, header_length = 503, error_body(UNREAD), JSON, None
        self._write(status, body, content_type, header_length, keep_alive, head, allow)
        if not head.keep_alive:
            self._closing = True
            self._forget_waiting()
        if self._waiting or self._closing:
            self._next()
        return fits

    def _forget_waiting(self) -> None:
        for request in self._waiting:
            request.release()
        self._waiting.clear()

    def _forget_body(self) -> None:
        """Give back what the body that is coming has taken."""
        self._server.bodies.give_back(self._coming_bytes)
        place, self._place = self._place, None
        self._head, self._target, self._filled, self._coming_bytes = None, memoryview(b""), 0, 0
        self._pending, self._request_began = b"", 0.0
        if place is not None:
            place.release()

    def _write(
        self,
        status: int,
        body: bytes,
        content_type: bytes,
        header_length: int | None,
        keep_alive: bool,
        asked: Head | None = None,
        allow: bytes = b"",
    ) -> None:
        assert self._transport is not None
        # A client of HTTP/1.0 takes the connection for closed unless it is told (RFC 9112, 9.3); one of HTTP/1.1 the other way round.
        connection = (b"keep-alive" if asked is not None and asked.is_old else b"") if keep_alive else b"close"
        head = _answer_head(status, content_type, header_length, connection, len(body), allow)
        if asked is not None and asked.method == "HEAD":
            body = b""
        if len(body) > JOINED_BYTES:
            self._transport.writelines((head, body))
        else:
            self._transport.write(head + body)
        if self._paused_writing:
            left = self._transport.get_write_buffer_size()
            self._server.untaken.add(self, len(head) + len(body), left, time.monotonic())

    def _refuse(self, status: int, message: str) -> None:
        """Answer that this connection can't go on, after what it asked before has been answered."""
        self._server.refused += 1
        self._forget_body()
        if self._transport is None or self._closing:
            return
        self._closing = True
        if self._answered is None and not self._waiting:
            self._write(status, error_body(message), JSON, None, keep_alive=False)
            self._hang_up()

    def _hang_up(self) -> None:
        """Say goodbye, then listen until the client does (RFC 9112, 9.6); whatever it still sends is dropped."""
        if self._transport is None or self._hung_up:
            return
        self._hung_up = time.monotonic()
        if self._heard_all:
            self._transport.close()
            return
        self._transport.write_eof()
        if self._paused_reading:
            self._paused_reading = False
            self._transport.resume_reading()

    def check_time(self, now: float) -> None:
        if self in self._server.untaken:
            if self._transport is not None and self._server.untaken.is_overdue(
                self, self._transport.get_write_buffer_size(), now
            ):
                self.abandon()
        elif self._hung_up and now - self._hung_up > (LAST_CALL_S if self._called else LINGER_S):
            self.abandon()
        if self._request_began and now - self._request_began > REQUEST_LIMIT_S and not self._paused_reading:
            self._refuse(408, f"the request did not arrive within {REQUEST_LIMIT_S:g} s")
        silent = self._answered is None and not self._waiting and not self._request_began
        if self._called and now - self._called > LAST_CALL_S and silent:
            self._closing = True
            self._next()

    def last_call(self, now: float) -> None:
        """The server ends: what is asked until :data:`LAST_CALL_S` from now is answered still."""
        self._called = now

    def abandon(self) -> None:
        """Close, whatever the client may still want; also what it has not read of an answer is let go."""
        self._forget()
        if self._transport is not None:
            self._transport.abort()


@lru_cache(64)
def _answer_head(
    status: int, content_type: bytes, header_length: int | None, connection: bytes, length: int, allow: bytes
) -> bytes:
    extra = b"" if header_length is None else b"Inference-Header-Content-Length: %d\r\n" % header_length
    extra += b"Allow: %s\r\n" % allow if allow else b""
    kept = b"Connection: %s\r\n" % connection if connection else b""
    fixed = b"%sContent-Type: %s\r\n%s%s" % (_STATUS_LINES[status], content_type, extra, kept)
    return b"%sContent-Length: %d\r\n\r\n" % (fixed, length)


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
