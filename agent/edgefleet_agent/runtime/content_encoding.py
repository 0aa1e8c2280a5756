"""Bodies that clients pack: receives a body and the name of its coding, hands on the plain body, bounded in size, piece by piece."""

from __future__ import annotations

import zlib
from collections.abc import Generator

from edgefleet_agent.runtime.head import MAX_BODY_BYTES, Refused

PIECE_BYTES = 1 << 20  # of the plain body: a millisecond's work
FIRST_BYTES = 64 * 1024  # before others have their turn: what each of those that wait for theirs has in memory


def decompress(
    body: bytes | bytearray | memoryview, encoding: str
) -> Generator[None, None, bytes | bytearray | memoryview]:
    """gzip or deflate (RFC 9110, 8.4.1), bounded: a small body may claim to be a large one. Lets others have their turn at each ``yield``.

    Raises:
        Refused: another coding, not of this coding, cut off, followed by something, or more than :data:`MAX_BODY_BYTES`.
    """
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refused(415, "Content-Encoding must be gzip or deflate")
    machine = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    plain = bytearray()
    rest, most = body, FIRST_BYTES
    while True:
        try:
            piece = machine.decompress(rest, most)
        except zlib.error as exc:
            raise Refused(400, f"the body is not {encoding}: {exc}") from exc
        plain += piece
        rest = machine.unconsumed_tail
        if len(plain) > MAX_BODY_BYTES:
            raise Refused(413, f"the body unpacks to more than {MAX_BODY_BYTES} bytes")
        if machine.eof or (not rest and len(piece) < most):
            break
        most = PIECE_BYTES
        yield
    if not machine.eof:
        raise Refused(400, f"the {encoding} body is cut off")
    if machine.unused_data:  # dropped, it would be another request than its sender meant
        raise Refused(400, f"{len(machine.unused_data)} bytes follow the {encoding} body; it must be one member")
    return plain
