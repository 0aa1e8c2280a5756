"""Stage 5, transport: which chunks of a blob are safe on the disk. Receives what a fetch made safe, hands it on to the next start.

Hashing is the other way to know, and a start of a board that hashes 50 MB/s would spend most of a minute on what came of a large model, each
time; one that is never on for longer would never get any further. A record lies beside the blob, under a name that garbage collection
takes for an unfinished one's.

The record is written after the chunks were synced, so no cut leaves one that promises too much. It is a hint all the same: a card that rots, or a hand
that truncates, can't be told by it. Whoever goes by it hashes the whole before the blob is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.files import FileSystem
from edgefleet_shared.malformed import MALFORMED


class _Record(msgspec.Struct, frozen=True):
    """``bits``: one for each chunk of ``chunk_bytes``, the first one lowest; set where it is safe."""

    chunk_bytes: int
    bits: bytes


def _path(blob: Path) -> Path:
    return blob.with_name(f".safe-{blob.name}")


def read(blob: Path, count: int, chunk_bytes: int, *, files: FileSystem) -> set[int] | None:
    """The numbers of the safe chunks.

    Args:
        blob: where it lies, or will.
        count, chunk_bytes: how many chunks it has, and how long they are but for the last.

    Returns:
        None where nothing is known: there is no record, a damaged one, or one of other chunks.

    Raises:
        EnvironmentProblem: the disk can't be read, for another reason than that it broke.
    """
    try:
        content = atomic.unless_lost(lambda: atomic.read(_path(blob), files=files))
        record = msgspec.json.decode(content or b"", type=_Record)
    except (FileNotFoundError, *MALFORMED):
        return None
    if record.chunk_bytes != chunk_bytes or len(record.bits) != -(-count // 8):
        return None
    bits = int.from_bytes(record.bits, "little")
    return {number for number in range(count) if bits >> number & 1}


def write(blob: Path, safe: Iterable[int], count: int, chunk_bytes: int, *, files: FileSystem) -> None:
    """Remember ``safe``, which are synced. Arguments as of :func:`read`.

    Raises:
        EnvironmentProblem: the disk refused; what was remembered before still is.
    """
    bits = bytearray(-(-count // 8))
    for number in safe:
        bits[number // 8] |= 1 << number % 8
    record = _Record(chunk_bytes, bytes(bits))
    atomic.write(_path(blob), msgspec.json.encode(record), files=files)


def forget(blob: Path, *, files: FileSystem) -> None:
    """Nothing of it is known to be safe any more, durably.

    Raises:
        EnvironmentProblem: the disk refused.
    """
    atomic.remove(_path(blob), files=files)


def lies_whole(blob: Path, count: int, chunk_bytes: int, *, files: FileSystem) -> bool:
    """Whether all chunks are known to be safe; a record that can't be read knows nothing."""
    try:
        safe = read(blob, count, chunk_bytes, files=files)
    except EnvironmentProblem:
        return False
    return safe is not None and len(safe) == count
