"""What a gRPC message would become: receives its bytes, hands on whether it may be taken apart. Pure.

Two bytes on the line may be a part that takes a hundred once it is an object: a message of 60 MB took six gigabytes and a minute and a half in which
nobody else was heard. So what it would become is counted in its bytes before anything is made of it, as with JSON (:mod:`json_data`).
Source: Protocol Buffers, "Encoding"; the numbers of fields are those of :file:`open_inference.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from edgefleet_agent.runtime.protocol import MAX_PART_BYTES, MAX_TENSORS

MAX_PARTS = 16 * MAX_TENSORS  # of a request, its inputs and their contents; each input of a real one has some six
_INPUTS, _RAW_CONTENTS, _CONTENTS = 5, 7, 5
_VALUE_BYTES = {1: 1, 2: 4, 3: 8, 4: 4, 5: 8}  # of the typed contents that are as short as a byte on the line
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5


class NotAMessage(Exception):
    """It is no protobuf, or has groups, which no message here has."""


class TooLarge(Exception):
    """It would become too much; the message goes to the client."""


class _Field(NamedTuple):
    number: int
    content: memoryview  # empty where it has no length of its own
    has_length: bool


def check_request(message: bytes, most_bytes: int) -> None:
    """Look at a ModelInferRequest.

    Args:
        most_bytes: how many its typed values may take.

    Raises:
        NotAMessage, TooLarge: it must not be parsed.
    """
    parts = values_bytes = 0
    beside = len(message)
    for field in _fields(memoryview(message)):
        parts = _one_more(parts)
        if not field.has_length:
            continue
        if field.number == _RAW_CONTENTS:
            beside -= len(field.content)
        elif field.number == _INPUTS:
            for inner in _fields(field.content):
                parts = _one_more(parts)
                if inner.number == _CONTENTS and inner.has_length:
                    beside -= len(inner.content)
                    for values in _fields(inner.content):
                        parts = _one_more(parts)
                        values_bytes += _VALUE_BYTES.get(values.number, 0) * _varints(values.content)
    if values_bytes > most_bytes:
        raise TooLarge(f"the typed values would take {values_bytes} bytes, {most_bytes} are allowed; send raw contents")
    if beside > MAX_PART_BYTES:
        raise TooLarge(f"the request has {beside} bytes beside its contents, {MAX_PART_BYTES} are allowed")


def check_question(message: bytes) -> None:
    """Look at a message that has no tensors. Raises TooLarge."""
    if len(message) > MAX_PART_BYTES:
        raise TooLarge(f"the message has {len(message)} bytes, {MAX_PART_BYTES} are allowed")


def _one_more(parts: int) -> int:
    if parts >= MAX_PARTS:
        raise TooLarge(f"the request has more than {MAX_PARTS} parts")
    return parts + 1


def _varints(content: memoryview) -> int:
    """How many numbers there are: each ends with a byte below 128."""
    return int(np.count_nonzero(np.frombuffer(content, np.uint8) < 128)) if content else 0


def _fields(message: memoryview) -> Iterator[_Field]:
    """The fields of a message, in order. Raises NotAMessage."""
    at, none = 0, memoryview(b"")
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        length = {_EIGHT: 8, _FOUR: 4}.get(kind, 0)
        if kind in (_VARINT, _LENGTH):
            value, at = _varint(message, at)
            length = value if kind == _LENGTH else 0
        elif not length:
            raise NotAMessage(f"a field of kind {kind}")
        if not number or at + length > len(message):
            raise NotAMessage("it ends in the middle of a field" if number else "a field of number 0")
        yield _Field(number, message[at : at + length] if kind == _LENGTH else none, kind == _LENGTH)
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(number, where it ends). Raises NotAMessage."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise NotAMessage("a number without end")
