"""A tensor as JSON: receives its text, hands on the tensor's bytes. Pure.

Parsed, JSON takes many times its size: a list of empty lists thirty times, and seconds in which nobody else is heard. So what a text would
become is counted in the text before anything is made of it.
Source: KServe Open Inference Protocol v2 (HTTP/REST), "Tensor Data".
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from edgefleet_agent.runtime.tensors import element_count

SMALL_BYTES = 64 * 1024  # of text that is parsed whatever it is
MAX_PIECES = (
    4 << 20
)  # values and lists of a larger one: some 200 MB while they are made a tensor of, a third of a second

_decode = msgspec.json.Decoder().decode


def tensor_bytes(text: bytes, datatype: str, dtype: np.dtype[Any], shape: list[int]) -> bytes:
    """The values of a ``data`` field, nested or flat, as little-endian bytes in row-major order.

    Args:
        text: the field as it came.
        shape: of the tensor, as its sender says.

    Raises:
        ValueError: it is not that tensor, or too large to be parsed.
    """
    if len(text) > SMALL_BYTES:
        _bounded(text, shape)
    expected = element_count(shape) * dtype.itemsize
    try:
        values = np.asarray(_decode(text))
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as exc:
        raise ValueError(f"data is no rectangular list of numbers: {exc}") from exc
    if values.size == 0 and expected == 0:
        return b""
    if values.ndim > 1 and values.shape != tuple(shape):
        raise ValueError(f"nested data has shape {list(values.shape)}, not {shape}")
    if values.size * dtype.itemsize != expected:
        raise ValueError(f"{values.size} values do not fill shape {shape}")
    allowed = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    if values.dtype.kind not in allowed:
        raise ValueError(f"data are not {datatype} values")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise ValueError(f"a value does not fit {datatype}")
    with np.errstate(over="ignore"):
        return values.astype(dtype).tobytes()


def _bounded(text: bytes, shape: list[int]) -> None:
    """Refuse what would become more than the tensor. Raises ValueError."""
    # Rectangular lists have one comma fewer than values, however they are nested; and a list for each place of every axis but the last.
    commas, lists = text.count(b","), text.count(b"[")
    if commas + lists > MAX_PIECES:
        raise ValueError(f"more than {MAX_PIECES} values and lists as JSON; send them in binary, with binary_data_size")
    if commas + 1 != element_count(shape):
        raise ValueError(f"{commas + 1} values do not fill shape {shape}")
    if lists not in (1, sum(element_count(shape[:axis]) for axis in range(len(shape)))):
        raise ValueError(f"data is neither flat nor nested as shape {shape}")
    if b"{" in text or b'"' in text:
        raise ValueError("data is no rectangular list of numbers: it has objects or texts in it")
