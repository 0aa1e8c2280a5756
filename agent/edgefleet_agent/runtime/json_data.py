"""A tensor as JSON: receives its text, hands on the tensor's bytes. Pure.

Parsed, JSON takes many times its size: a list of empty lists thirty times, and seconds in which nobody else is heard. So what a text would
become is counted in the text before anything is made of it, and a long one is made a tensor of piece by piece.
Source: KServe Open Inference Protocol v2 (HTTP/REST), "Tensor Data".
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec
import numpy as np

from edgefleet_agent.runtime.tensors import Array, element_count

SMALL_BYTES = 64 * 1024  # of text that is parsed whatever it is, in one piece
MAX_PIECES = 4 << 20  # values and lists of a larger one: some third of a second of work
PIECE_BYTES = 32 * 1024  # a millisecond's work
_NOT_STRUCTURE = b"0123456789+-.eE \t\r\ntrufalsn"  # numbers, spaces, and the letters of true, false and null
_TRUTHS = (b"true", b"false")  # among numbers numpy takes them for 1 and 0

_decode = msgspec.json.Decoder().decode
_decode_whole = msgspec.json.Decoder(list[int]).decode


def tensor_bytes(text: bytes, datatype: str, dtype: np.dtype[Any], shape: list[int]) -> bytes:
    """The values of a ``data`` field, nested or flat, as little-endian bytes in row-major order.

    Args:
        text: the field as it came, valid JSON.
        shape: of the tensor, as its sender says.

    Raises:
        ValueError: it is not that tensor, or too large to be parsed.
    """
    expected = element_count(shape) * dtype.itemsize
    values = _values(text, dtype)
    if values.size == 0 and expected == 0:
        return b""
    if values.ndim > 1 and values.shape != tuple(shape):
        raise ValueError(f"nested data has shape {list(values.shape)}, not {shape}")
    if values.size * dtype.itemsize != expected:
        raise ValueError(f"{values.size} values do not fill shape {shape}")
    return _as(values, datatype, dtype).tobytes()


def long_tensor_bytes(
    text: memoryview, datatype: str, dtype: np.dtype[Any], shape: list[int]
) -> Generator[None, None, bytes]:
    """Like :func:`tensor_bytes`, for a text of more than :data:`SMALL_BYTES`: lets others have their turn at each ``yield``."""
    pieces = [text[at : at + PIECE_BYTES] for at in range(0, len(text), PIECE_BYTES)]
    yield from _bounded(pieces, shape)
    values, filled = np.empty(element_count(shape), dtype), 0
    rest = b""
    for piece in pieces:
        whole, comma, rest_of_piece = bytes(piece).rpartition(b",")
        if not comma:
            rest += rest_of_piece
            if len(rest) > 2 * PIECE_BYTES:
                raise ValueError(f"a value has more than {PIECE_BYTES} characters")
            continue
        made = _as(_values(b"[%s]" % (rest + whole).translate(None, b"[]"), dtype), datatype, dtype)
        values[filled : filled + made.size] = made
        filled, rest = filled + made.size, rest_of_piece
        yield
    made = _as(_values(b"[%s]" % rest.translate(None, b"[]"), dtype), datatype, dtype)
    values[filled : filled + made.size] = made
    return values.tobytes()


def _values(text: bytes, dtype: np.dtype[Any]) -> Array:
    """What a text holds, in whatever type numpy has for it. Raises ValueError."""
    if dtype.kind != "b" and any(word in text for word in _TRUTHS):
        raise ValueError("true and false are no numbers")
    try:
        values: Array = np.asarray(_decode(text))
        if dtype == np.uint64 and values.dtype.kind == "f":
            # Such as have both small values and ones above half their range: numpy takes those for fractions.
            whole = _decode_whole(b"[%s]" % text.translate(None, b"[]"))
            values = np.array(whole, np.uint64).reshape(values.shape)
        return values
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as exc:
        raise ValueError(f"data is no rectangular list of numbers: {exc}") from exc


def _as(values: Array, datatype: str, dtype: np.dtype[Any]) -> Array:
    """The values in the tensor's type. Raises ValueError."""
    allowed = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    if values.dtype.kind not in allowed:
        raise ValueError(f"data are not {datatype} values")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise ValueError(f"a value does not fit {datatype}")
    with np.errstate(over="ignore"):
        made = values.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(made).all():  # JSON has no infinity, so it was a number
        raise ValueError(f"a value does not fit {datatype}")
    return made


def _bounded(pieces: list[memoryview], shape: list[int]) -> Generator[None, None, None]:
    """Refuse what would become more than the tensor. Raises ValueError."""
    # Rectangular lists have one comma fewer than values, however they are nested; and a list for each place of every axis but the last.
    commas = lists = 0
    for number, piece in enumerate(pieces):
        content = bytes(piece)
        commas, lists = commas + content.count(b","), lists + content.count(b"[")
        if b"{" in content or b'"' in content:
            raise ValueError("data is no rectangular list of numbers: it has objects or texts in it")
        if number % 8 == 7:
            yield
    if commas + lists > MAX_PIECES:
        raise ValueError(f"more than {MAX_PIECES} values and lists as JSON; send them in binary, with binary_data_size")
    if commas + 1 != element_count(shape):
        raise ValueError(f"{commas + 1} values do not fill shape {shape}")
    if not lists or lists not in (1, sum(element_count(shape[:axis]) for axis in range(len(shape)))):
        raise ValueError(f"data is neither flat nor nested as shape {shape}")
    expected, at = _structure([commas + 1] if lists == 1 else shape), 0
    for number, piece in enumerate(pieces):
        found = bytes(piece).translate(None, _NOT_STRUCTURE)
        if found != expected[at : at + len(found)]:
            raise ValueError(f"data is no rectangular list of numbers: not nested as shape {shape}")
        at += len(found)
        if number % 8 == 7:
            yield


def _structure(shape: list[int]) -> bytes:
    """The brackets and commas of a tensor's text."""
    inner = b"[" + b"," * (shape[-1] - 1) + b"]"
    for size in reversed(shape[:-1]):
        inner = b"[" + (inner + b",") * (size - 1) + inner + b"]"
    return inner
