"""Long tensors as JSON: piece by piece the same as at once, and nothing that is no tensor gets through the seams."""

from __future__ import annotations

import json
from collections.abc import Generator

import numpy as np
import pytest
from edgefleet_agent.runtime import json_data
from edgefleet_agent.runtime.tensors import NUMPY

SHAPE = [40, 30, 25]


def through(steps: Generator[None, None, bytes]) -> tuple[bytes, int]:
    """(what it came to, how often others had their turn)."""
    turns = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, turns
        turns += 1


def long_bytes(text: bytes, datatype: str, shape: list[int]) -> tuple[bytes, int]:
    assert len(text) > json_data.SMALL_BYTES
    return through(json_data.long_tensor_bytes(memoryview(text), datatype, NUMPY[datatype], shape))


def some(datatype: str) -> np.ndarray:
    random, dtype = np.random.default_rng(3), NUMPY[datatype]
    if dtype.kind == "f":
        return random.normal(size=SHAPE).astype(dtype)
    limits = (0, 2) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return random.integers(*limits, SHAPE, dtype=np.uint64 if datatype == "UINT64" else np.int64).astype(dtype)


@pytest.mark.parametrize("datatype", NUMPY)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_long_text_becomes_the_same_tensor_flat_or_nested_dense_or_spaced(datatype: str, indent: int | None) -> None:
    values = some(datatype)
    for shown in (values, values.ravel()):
        content, turns = long_bytes(json.dumps(shown.tolist(), indent=indent).encode(), datatype, SHAPE)
        assert content == values.tobytes()
        assert turns >= 2


def test_no_turn_is_longer_than_a_piece_however_long_the_text() -> None:
    text = json.dumps(np.arange(1_000_000).tolist()).encode()
    assert long_bytes(text, "INT32", [1_000_000])[1] >= len(text) / json_data.PIECE_BYTES


def nested(replaced: str, by: str) -> bytes:
    return json.dumps(some("UINT8").tolist(), separators=(",", ":")).replace(replaced, by, 1).encode()


NO_TENSOR: dict[str, tuple[bytes, str, list[int], str]] = {
    "a list one shorter and its neighbour one longer": (nested("],[", ",").replace(b",", b"],[", 1), "UINT8", SHAPE, "not nested"),
    "another shape of as many lists": (json.dumps(np.zeros((30, 40, 25)).tolist()).encode(), "FP32", SHAPE, "neither flat nor nested|not nested"),
    "nothing among numbers": (b"[" + b"1," * 50_000 + b"null]", "FP32", [50_001], "are not FP32"),
    "a fraction among whole numbers": (b"[" + b"1," * 50_000 + b"1.5]", "INT32", [50_001], "are not INT32"),
    "truth among numbers": (b"[" + b"1.5," * 50_000 + b"true,1.5]", "FP32", [50_002], "are no numbers"),
    "a number too large at the end": (b"[" + b"1," * 50_000 + b"256]", "UINT8", [50_001], "does not fit"),
    "a number that never ends": (b"[" + b"1" * 5_000_000 + b",1]", "FP32", [2], "characters|no rectangular"),
    "a number alone": (b"1" * 70_000, "FP32", [], "neither flat nor nested"),
    "an empty list among full ones": (b"[[]," + b"[1]," * 30_000 + b"[1]]", "FP32", [30_002, 1], "no rectangular"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_TENSOR)
def test_what_is_no_tensor_is_refused(case: str) -> None:
    text, datatype, shape, why = NO_TENSOR[case]
    with pytest.raises(ValueError, match=why):
        long_bytes(text, datatype, shape)
