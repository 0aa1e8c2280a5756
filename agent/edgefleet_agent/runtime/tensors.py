"""Datatypes of the Open Inference Protocol: receives a name such as FP32, hands on its numpy type and its size.

Source: KServe Open Inference Protocol v2, "Tensor Data Types". BYTES and BF16 have no fixed numpy type and no network
that edgefleet ships takes them, so they are refused with a reason instead of guessed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}

_NAMES = {dtype: name for name, dtype in NUMPY.items()}


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a numpy type.

    Raises:
        KeyError: the protocol has none.
    """
    return _NAMES[np.dtype(dtype).newbyteorder("<") if dtype.byteorder == ">" else np.dtype(dtype)]


def element_count(shape: tuple[int, ...] | list[int]) -> int:
    """How many elements a tensor of ``shape`` has; an empty shape is a scalar."""
    count = 1
    for size in shape:
        count *= size
    return count
