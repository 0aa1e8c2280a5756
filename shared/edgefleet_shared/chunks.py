"""Stage 5, transport: chunks as MQTT carries them. Pure but for :func:`sent_bytes`: receives a piece of a blob, hands on its message, and back.

A message is the piece itself, or its DEFLATE stream (RFC 1951) where that is shorter. Which of them it is needs no mark: both ends know how long
the piece is, and only a stream is shorter than that. What is signed, stored and carried by hand is the piece; a message proves nothing until
what came out of it hashes to what was signed (docs/adr/0014).
"""

from __future__ import annotations

import zlib
from pathlib import Path

from edgefleet_shared import atomic
from edgefleet_shared.artifact import CHUNK_BYTES

LEVEL = 9
RAW = -15  # no header and no checksum: the piece's hash is signed


def pack(piece: bytes) -> bytes:
    """The message for a piece."""
    machine = zlib.compressobj(LEVEL, zlib.DEFLATED, RAW)
    packed = machine.compress(piece) + machine.flush()
    return packed if len(packed) < len(piece) else piece


def unpack(message: bytes, length: int) -> bytes | None:
    """The piece of ``length`` bytes that a message carries; None where it carries none. Never more than ``length`` bytes and one are made."""
    if len(message) >= length:
        return message if len(message) == length else None
    machine = zlib.decompressobj(RAW)
    try:
        piece = machine.decompress(message, length + 1)
    except zlib.error:
        return None
    whole = machine.eof and not machine.unused_data and len(piece) == length
    return piece if whole else None


def sent_bytes(path: Path, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many bytes of messages a file is."""
    return sum(len(pack(piece)) for piece in atomic.pieces(path, size_bytes=chunk_bytes))
