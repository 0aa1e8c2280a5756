"""Blobs that come over the HTTP API: receives a stream of bytes, hands on a blob that hashes to its name, or an error."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from edgefleet_shared import atomic
from edgefleet_shared.artifact import Layout, hex_of
from edgefleet_shared.errors import InputError


async def receive(pieces: AsyncIterator[bytes], digest: str, layout: Layout, max_bytes: int) -> int:
    """Stream to a file beside the blob's place; it gets its name only when its bytes hash to it. Returns its size in bytes.

    Raises:
        InputError: too many bytes, or others than the digest's. EnvironmentProblem: the disk refuses.
    """
    target = layout.path(digest)
    state, size = hashlib.sha256(), 0
    with atomic.disk_errors(target), tempfile.NamedTemporaryFile(dir=target.parent, prefix=".put-") as file:
        async for piece in pieces:
            size += len(piece)
            if size > max_bytes:
                raise InputError(f"a blob may have {max_bytes} bytes")
            state.update(piece)
            file.write(piece)
        if state.hexdigest() != hex_of(digest):
            raise InputError(f"the bytes hash to sha256:{state.hexdigest()}, not to {digest}")
        file.flush()
        kept = Path(file.name).with_suffix(".whole")
        kept.hardlink_to(file.name)
    try:
        atomic.adopt(kept, target)
    finally:
        kept.unlink(missing_ok=True)
    return size
