"""Stage 5, transport: the second way. Receives missing chunk numbers, hands on chunks by HTTPS with byte ranges (RFC 9110, 14)."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

from edgefleet_shared.errors import TransportError
from edgefleet_shared.mqtt import Endpoint

TIMEOUT_S = 15.0
# A sender that brings less in a window is left for a connection that may do better. The slowest lines that boards have bring three times as much.
LEAST_BYTES, WINDOW_S = 8 * 1024, 30.0


def fetch_chunks(
    endpoint: Endpoint,
    host: str,
    port: int,
    digest: str,
    size: int,
    chunk_bytes: int,
    numbers: list[int],
    take: Callable[[str, int, bytes], None],
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Fetch chunks of one blob, in order, each handed to ``take`` as it is complete. A line that is cut is made anew, and goes on where it was cut: such as
    a vehicle has may never hold for a whole chunk.

    Args:
        wanted: asked whenever something came; once it says no, the rest is left.

    Raises:
        TransportError: the controller can't be reached, refuses, sends something else, or too little before the line is cut.
    """
    link = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=endpoint.tls())
    brought = 0  # by this connection
    try:
        for number in numbers:
            first = number * chunk_bytes
            last = min(first + chunk_bytes, size) - 1
            piece = bytearray()
            while first + len(piece) <= last:
                if not wanted():
                    return
                try:
                    for more in _range(link, digest, first + len(piece), last):
                        piece += more
                        brought += len(more)
                        if not wanted():
                            return
                except (OSError, http.client.HTTPException):
                    if brought < LEAST_BYTES:
                        raise
                    link.close()  # the next request connects
                    brought = 0
            take(digest, number, bytes(piece))
    except (OSError, http.client.HTTPException) as exc:
        raise TransportError(f"can't fetch from {host}:{port}: {exc}") from exc
    finally:
        link.close()


def _range(link: http.client.HTTPSConnection, digest: str, first: int, last: int) -> Iterator[bytes]:
    """Bytes of a blob, as they come.

    Raises:
        OSError, http.client.HTTPException: they come too slowly, or not all.
        TransportError: the controller refuses, or sends something else.
    """
    link.request("GET", f"/v1/blobs/{digest}", headers={"Range": f"bytes={first}-{last}"})
    answer, wanted = _head(link), last - first + 1
    if answer.status != 206 or answer.length not in (None, wanted):
        raise TransportError(
            f"the controller answered {answer.status} to a range of {digest}, with {answer.length} bytes"
        )
    came = 0
    for more in _body(answer, wanted + 1):
        came += len(more)
        if came > wanted:
            raise TransportError(f"the controller answered more than a range of {digest}")
        yield more
    answer.close()  # read1 leaves that to us, and the connection takes no other request before
    if came < wanted:
        raise http.client.IncompleteRead(b"", wanted - came)


def _head(link: http.client.HTTPSConnection) -> http.client.HTTPResponse:
    """The head of the answer. The connection's own limit is on each piece of it: one that drips would never be done, nor ask whether it is wanted.

    Raises:
        OSError, http.client.HTTPException: it did not come within TIMEOUT_S, or is none.
    """
    assert link.sock is not None
    too_late = threading.Timer(TIMEOUT_S, _cut, (link.sock,))
    too_late.daemon = True
    too_late.start()
    try:
        return link.getresponse()
    finally:
        too_late.cancel()


def _body(answer: http.client.HTTPResponse, most_bytes: int) -> Iterator[bytes]:
    """The body up to so many bytes, as it comes: a sender that drips would hold this way for whoever wants something else now.

    Raises:
        OSError, http.client.HTTPException: it comes too slowly, or was cut off.
    """
    left, came, began = most_bytes, 0, time.monotonic()
    while left and (more := answer.read1(left)):
        yield more
        left, came = left - len(more), came + len(more)
        if time.monotonic() - began > WINDOW_S:
            if came < LEAST_BYTES:
                raise TimeoutError(f"{came} bytes came in {WINDOW_S:g} s")
            came, began = 0, time.monotonic()


def _cut(link: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended just now
        socket.socket.shutdown(link, socket.SHUT_RDWR)  # the TLS socket's own would go on in clear
