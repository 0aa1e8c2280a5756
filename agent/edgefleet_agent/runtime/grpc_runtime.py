"""The runtime, as the gRPC gateway asks it: receives a call's request, hands on what the Unix socket answered, or that nobody waits for it any more."""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import grpc

from edgefleet_agent.runtime.control import short_path
from edgefleet_agent.runtime.grpc_messages import Bytes, CallError
from edgefleet_agent.runtime.heap import Heap
from edgefleet_agent.runtime.peer import uid_of_tcp

TIMEOUT_S = 90.0  # the runtime answers or refuses within 60 s
JOINED_BYTES = 1 << 20  # a body up to this is sent in one piece; a larger one is not copied together first


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        with short_path(self._path) as address:
            self.sock.connect(address)


class Call:
    """One call on its way: who asks, and whether anybody still waits for the answer.

    Args:
        ours: host and port where it came in; None for a Unix socket.
    """

    def __init__(self, context: grpc.ServicerContext, ours: tuple[str, int] | None) -> None:
        self._context, self._theirs, self._ours = context, context.peer(), ours
        self._lock = threading.Lock()
        self._asked: socket.socket | None = None
        self._over = not context.add_callback(self._end)

    @functools.cached_property  # the kernel's table is read through; a call may name a region for each of its tensors
    def uid(self) -> int | None:
        """The client's user; None when the kernel does not tell."""
        kind, _, address = self._theirs.partition(":")
        host, _, port = unquote(address).rpartition(":")
        if kind not in ("ipv4", "ipv6") or self._ours is None or not port.isdecimal():
            return None
        return uid_of_tcp((host.strip("[]"), int(port)), self._ours)

    @contextlib.contextmanager
    def asking(self, link: socket.socket) -> Iterator[None]:
        """While the runtime is asked over ``link``, which is shut down when nobody waits for the answer any more.

        Raises:
            CallError: nobody does.
        """
        with self._lock:
            if self._over:
                raise CallError("CANCELLED", "nobody waits for the answer any more")
            self._asked = link
        try:
            yield
        finally:
            with self._lock:
                self._asked = None

    @property
    def is_over(self) -> bool:
        return self._over

    def when_over(self, do: Callable[[], None]) -> None:
        """Have it done once the client has all of the answer, or will never take it; at once where that is so already."""
        if not self._context.add_callback(do):
            do()

    def give_up(self) -> None:
        """Its client does not take the answer."""
        self._context.cancel()

    def _end(self) -> None:
        """It was answered or cancelled, its client is gone, or its time has run out."""
        with self._lock:
            self._over = True
            if self._asked is not None:
                with contextlib.suppress(OSError):
                    self._asked.shutdown(socket.SHUT_RDWR)


class Runtime:
    """The runtime's Unix socket; each calling thread keeps a connection."""

    def __init__(self, path: Path) -> None:
        self._path, self._local = path, threading.local()
        self.heap = Heap()

    def ask(
        self, call: Call, method: str, path: str, body: tuple[Bytes, ...] = (), header_length: int | None = None
    ) -> tuple[int, bytes, int]:
        """One request: (status, body, length of the inference header in it).

        Raises:
            CallError: nobody answers there, or ``call`` is over.
        """
        length = sum(map(len, body))
        headers = {"Content-Length": str(length)}
        if header_length is not None:
            headers["Inference-Header-Content-Length"] = str(header_length)
        sent = (b"".join(body),) if length <= JOINED_BYTES else body
        # A kept connection may have been closed meanwhile, by a runtime that was started again; an inference may be repeated.
        for attempt in (1, 2):
            connection = self._connection()
            try:
                if connection.sock is None:
                    connection.connect()
                with call.asking(connection.sock):
                    connection.request(method, path, sent, headers)
                    response = connection.getresponse()
                    content = response.read()
            except (OSError, http.client.HTTPException) as exc:
                connection.close()
                if call.is_over:
                    raise CallError("CANCELLED", "nobody waits for the answer any more") from exc
                if attempt == 2 or isinstance(exc, TimeoutError):
                    raise CallError("UNAVAILABLE", f"the runtime does not answer: {exc}") from exc
                continue
            break
        self.heap.held(len(content))
        return response.status, content, int(response.getheader("Inference-Header-Content-Length", len(content)))

    def _connection(self) -> _Connection:
        if not hasattr(self._local, "connection"):
            self._local.connection = _Connection(self._path)
        connection: _Connection = self._local.connection
        return connection
