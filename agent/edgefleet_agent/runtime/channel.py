"""What front and worker say to each other: small messages over a SOCK_SEQPACKET pair, tensors in shared memory.

One message is one packet, so there is no framing to get wrong, and the end of either process is an end of file.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from edgefleet_shared.errors import EdgefleetError

# The kernel's default send buffer is 208 KiB; a model's config without its chunk hashes is a few KiB.
MAX_MESSAGE_BYTES = 128 * 1024
MAX_WORDS = 2000  # characters; a library may name every tensor that it knows
Words = Annotated[str, msgspec.Meta(max_length=MAX_WORDS)]


class Start(msgspec.Struct, tag=1, array_like=True):
    """front -> worker: what to load. ``manifest`` is the artifact's digest. ``config`` is the ModelConfig as JSON, without chunk hashes; ``input_bytes`` and
    ``answer_bytes`` are a slot's, of which one request commonly touches the first ``touch_bytes``; its front kills it above ``memory_bytes``."""

    layout: str
    manifest: str
    model_digest: str
    model_size: int
    golden_digest: str
    config: bytes
    threads: int
    slot_count: int
    input_bytes: int
    answer_bytes: int
    touch_bytes: int
    memory_bytes: int


class Run(msgspec.Struct, tag=2, array_like=True):
    """front -> worker: compute what lies in ``slot``; for each input of the config its offset behind ``base`` there and its shape."""

    number: int
    slot: int
    base: int
    tensors: list[tuple[int, tuple[int, ...]]]


class Ready(msgspec.Struct, tag=3, array_like=True):
    """worker -> front: loaded and warm. Times in ms."""

    providers: tuple[str, ...]
    load_ms: float
    first_ms: float
    unconfined: tuple[str, ...]


class Failed(msgspec.Struct, tag=4, array_like=True):
    """worker -> front: can't load; an error as :meth:`EdgefleetError.as_dict` gives it. The worker ends after it."""

    error: dict[str, Words]


class Done(msgspec.Struct, tag=5, array_like=True):
    """worker -> front: computed. Outputs lie in the slot's answer memory, each aligned, one shape per output."""

    number: int
    slot: int
    shapes: list[tuple[int, ...]]
    compute_ns: int


class Refused(msgspec.Struct, tag=6, array_like=True):
    """worker -> front: the engine refused or failed this request; the worker goes on. ``unserved``: the request is none that the model takes."""

    number: int
    slot: int
    message: Words
    unserved: bool = False


class Observed(msgspec.Struct, tag=7, array_like=True):
    """worker -> front: what one request was like, by the artifact's statistics: for each of their inputs and outputs, and after it for each of its channels, how many of the values
    that were looked at fell into each bin, how many are no number, and the mean of the others (None where there are none); the
    answer's class, -1 without one; a checksum of the inputs' values."""

    tensors: list[tuple[list[int], int, float | None]]
    answer: int
    checksum: int


ToWorker = Start | Run
FromWorker = Ready | Failed | Done | Refused | Observed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


def failed(error: EdgefleetError) -> Failed:
    """What a worker says that can't load."""
    return Failed({name: text[:MAX_WORDS] for name, text in error.as_dict().items()})
