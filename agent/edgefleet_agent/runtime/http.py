"""HTTP/1.1 on the runtime's sockets: receives bytes from anyone, hands on whole requests, writes answers in their order.

Every resource that a client can take is bounded here: header and body sizes, time to send them, pipelined requests,
connections, body bytes held at once. Whatever is wrong with a request costs that request or its connection, nothing else.
Parsing is llhttp's, by httptools. Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import httptools

from edgefleet_agent.runtime.protocol import error_body

MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_HELD_BYTES = 256 * 1024 * 1024  # all bodies of all connections
MAX_PIPELINED = 16
MAX_CONNECTIONS = 1024
REQUEST_LIMIT_S = 30.0  # from a request's first byte to its last

_KEPT_HEADERS = frozenset({b"inference-header-content-length", b"content-encoding"})


class Request:
    """A whole request. ``path`` has no query; ``headers`` are only those that matter here, lower-case names."""

    __slots__ = ("body", "headers", "method", "path")

    def __init__(self, method: str, path: str, headers: dict[bytes, bytes], body: bytes) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body


# reply(status, body, content type, length of the inference header or None)
Reply = Callable[[int, bytes, bytes, "int | None"], None]
Handler = Callable[[Request, Reply], None]

JSON = b"application/json"
BINARY = b"application/octet-stream"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"


class Server:
    """What all connections share.

    Args:
        handler: called with each request; calls its reply exactly once, now or later.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections: set[Connection] = set()
        self.held_bytes = 0
        self.refused = 0

    def connection(self) -> asyncio.Protocol:
        return Connection(self)

    def tick(self) -> None:
        """End requests that take too long to arrive. Call about once a second."""
        now = time.monotonic()
        for connection in list(self.connections):
            connection.check_time(now)

    def close(self) -> None:
        """Close idle connections; the others close after their answer."""
        for connection in list(self.connections):
            connection.finish()


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._busy = False
        self._closing = False  # nothing more is read; what was taken is still answered
        self._paused_reading = False
        self._paused_writing = False
        self._request_began = 0.0
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._pieces: list[bytes] = []
        self._body_bytes = 0

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class
        self._server.connections.add(self)
        if len(self._server.connections) > MAX_CONNECTIONS:
            self._refuse(503, f"more than {MAX_CONNECTIONS} connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.held_bytes -= self._body_bytes
        self._forget_waiting()
        self._reset()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if not self._request_began:
            self._request_began = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            # RFC 9110, 7.8: an offer to upgrade may be ignored. CONNECT can't be: what follows would be no HTTP.
            if self._parser.get_method() == b"CONNECT":
                self._closing = True
                self._next()
                return
            self._parser = httptools.HttpRequestParser(self)
            if rest := data[exc.args[0] :]:
                self.data_received(rest)
        except httptools.HttpParserCallbackError as exc:
            # httptools wraps what a callback raised; ours raise _Refused, anything else is our own bug and must be heard.
            if not isinstance(exc.__context__, _Refused):
                raise
            self._refuse(exc.__context__.status, str(exc.__context__))
        except httptools.HttpParserError as exc:
            self._refuse(400, f"not HTTP: {exc}")

    def eof_received(self) -> bool:
        """The client sends no more; it still gets the answers to what it sent."""
        self._closing = True
        return self._busy or bool(self._waiting)

    def pause_writing(self) -> None:
        self._paused_writing = True

    def resume_writing(self) -> None:
        self._paused_writing = False
        self._next()

    # --- httptools

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > MAX_URL_BYTES:
            raise _Refused(414, f"the URL is longer than {MAX_URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise _Refused(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        name = name.lower()
        if name in _KEPT_HEADERS:
            self._headers[name] = value.strip()
        elif name == b"content-length":
            if value.isdigit() and int(value[:20]) > MAX_BODY_BYTES:
                raise _Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        elif name == b"expect":
            if value.strip().lower() != b"100-continue":
                raise _Refused(417, "only Expect: 100-continue is known here")
            if self._transport is not None and not self._busy:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._server.held_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            raise _Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        if self._server.held_bytes > MAX_HELD_BYTES:
            raise _Refused(503, "too many large requests at once")
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        path = self._url.partition(b"?")[0].decode("latin-1")
        request = Request(self._parser.get_method().decode("latin-1"), path, self._headers, body)
        self._waiting.append((request, self._parser.should_keep_alive()))
        self._request_began = 0.0
        self._reset()
        if not self._busy:
            self._next()
        if len(self._waiting) > MAX_PIPELINED and not self._paused_reading and self._transport is not None:
            self._paused_reading = True
            self._transport.pause_reading()

    # --- answers

    def _next(self) -> None:
        while self._waiting and not self._busy and not self._paused_writing and self._transport is not None:
            request, keep_alive = self._waiting.popleft()
            self._busy = True
            if self._paused_reading and len(self._waiting) <= MAX_PIPELINED // 2:
                self._paused_reading = False
                self._transport.resume_reading()
            self._handle(request, keep_alive)
        if self._closing and not self._busy and not self._waiting and self._transport is not None:
            self._transport.close()

    def _handle(self, request: Request, keep_alive: bool) -> None:
        held = len(request.body)

        def reply(status: int, body: bytes, content_type: bytes, header_length: int | None) -> None:
            nonlocal held
            self._server.held_bytes -= held
            held = 0
            self._busy = False
            if self._transport is None or self._transport.is_closing():
                return
            self._write(status, body, content_type, header_length, keep_alive and not self._closing)
            if not keep_alive:
                self._closing = True
                self._forget_waiting()
            self._next()

        encoding = request.headers.get(b"content-encoding")
        if encoding:
            try:
                request.body = _decompress(request.body, encoding)
            except _Refused as exc:
                reply(exc.status, error_body(str(exc)), JSON, None)
                return
        self._server.handler(request, reply)

    def _forget_waiting(self) -> None:
        self._server.held_bytes -= sum(len(request.body) for request, _ in self._waiting)
        self._waiting.clear()

    def _write(
        self, status: int, body: bytes, content_type: bytes, header_length: int | None, keep_alive: bool
    ) -> None:
        assert self._transport is not None
        extra = b"" if header_length is None else b"Inference-Header-Content-Length: %d\r\n" % header_length
        head = b"%sContent-Type: %s\r\n%s%sContent-Length: %d\r\n\r\n" % (
            _STATUS_LINES[status], content_type, extra, b"" if keep_alive else b"Connection: close\r\n", len(body),
        )  # fmt: skip
        self._transport.write(head + body)

    def _refuse(self, status: int, message: str) -> None:
        """Answer that this connection can't go on, after what it asked before has been answered."""
        self._server.refused += 1
        self._server.held_bytes -= self._body_bytes
        self._reset()
        self._request_began = 0.0
        if self._transport is None or self._closing:
            return
        self._closing = True
        if not self._busy and not self._waiting:
            self._write(status, error_body(message), JSON, None, keep_alive=False)
            self._transport.close()

    def check_time(self, now: float) -> None:
        if self._request_began and now - self._request_began > REQUEST_LIMIT_S and not self._paused_reading:
            self._refuse(408, f"the request did not arrive within {REQUEST_LIMIT_S:g} s")

    def finish(self) -> None:
        self._closing = True
        self._next()


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _decompress(body: bytes, encoding: bytes) -> bytes:
    """gzip or deflate (RFC 9110, 8.4.1), bounded: a small body may claim to be a large one."""
    encoding = encoding.lower()
    if encoding == b"identity":
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise _Refused(415, "Content-Encoding must be gzip or deflate")
    machine = zlib.decompressobj(wbits=31 if encoding == b"gzip" else 15)
    try:
        plain = machine.decompress(body, MAX_BODY_BYTES)
    except zlib.error as exc:
        raise _Refused(400, f"the body is not {encoding.decode()}: {exc}") from exc
    if machine.unconsumed_tail:
        raise _Refused(413, f"the body unpacks to more than {MAX_BODY_BYTES} bytes")
    if not machine.eof:
        raise _Refused(400, f"the {encoding.decode()} body is cut off")
    return plain


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
