"""Stage 9, health: how events lie in a segment. Pure: receives a file's bytes, hands on what of them is whole, and where something was.

A record is crc32, length, sequence, content. A segment begins with a header record (sequence 0, the boot). The first event of each later append
is marked, so that it can be told what a cut left of the last append from what rotted of an earlier one: that had been safe, and is missing.
The mark is a space behind the event's JSON: an agent of before, which may come back, knows of no other records than these (ADR 0010).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

RECORD = struct.Struct("<IIQ")  # crc32 of the rest, length of the content, sequence
_MARK = b" "


class _Header(msgspec.Struct, frozen=True):
    boot: str


class _Booted(msgspec.Struct):
    """As much of an event as says whose it is."""

    boot: str


class Hole(NamedTuple):
    """Where records of a boot's lane were: between two numbers that are whole. ``sure`` once something was appended after them."""

    after: int
    before: int
    sure: bool


class Found(NamedTuple):
    """What is whole in a segment: its boot, each event's number and offset, and the holes between them."""

    boot: str
    sequences: list[int]
    offsets: list[int]
    holes: list[Hole]


def record(sequence: int, content: bytes, *, marked: bool = False) -> bytes:
    """An event's bytes in a segment; ``marked`` when an append to it begins with them."""
    content = content + _MARK if marked else content
    rest = RECORD.pack(0, len(content), sequence)[4:] + content
    return struct.pack("<I", zlib.crc32(rest)) + rest


def unmarked(body: bytes) -> bytes:
    """An event as it was given."""
    return body.removesuffix(_MARK)


def header(boot: str) -> bytes:
    """What a segment begins with."""
    return record(0, msgspec.json.encode(_Header(boot)))


def record_at(content: bytes, offset: int) -> tuple[int, bytes] | None:
    """(sequence, content) of the record at ``offset``; None when none is whole there."""
    if offset + RECORD.size > len(content):
        return None
    checksum, length, sequence = RECORD.unpack_from(content, offset)
    end = offset + RECORD.size + length
    # A run of zeros is no record: its checksum would be that of twelve zeros, which is not zero.
    if end > len(content) or zlib.crc32(memoryview(content)[offset + 4 : end]) != checksum:
        return None
    return sequence, content[offset + RECORD.size : end]


def find(content: bytes) -> Found | None:
    """What is whole in a segment's bytes; None when no event is."""
    sequences, offsets, holes = list[int](), list[int](), list[Hole]()
    boot, after = "", 0
    torn = False  # since the last event that is whole
    for offset, sequence, body in _whole(content):
        torn = torn or offset > after
        after = offset + RECORD.size + len(body)
        if not sequence:
            boot = boot or msgspec.json.decode(body, type=_Header).boot
            continue
        boot = boot or msgspec.json.decode(body, type=_Booted).boot
        if torn:
            holes.append(Hole(sequences[-1] if sequences else 0, sequence, sure=False))
            torn = False
        if body.endswith(_MARK):
            holes = [hole._replace(sure=True) for hole in holes]
        sequences.append(sequence)
        offsets.append(offset)
    return Found(boot, sequences, offsets, holes) if sequences else None


def _whole(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(offset, sequence, content) of every record that is whole, numbers ascending; what is between them is passed over."""
    offset = last = 0
    while offset + RECORD.size <= len(content):
        found = record_at(content, offset)
        if found is None or 0 < found[0] <= last:
            offset += 1
            continue
        sequence, body = found
        yield offset, sequence, body
        last = max(last, sequence)
        offset += RECORD.size + len(body)
