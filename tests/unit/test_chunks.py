from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from edgefleet_shared import chunks

SPARSE = (
    (np.random.default_rng(0).integers(-20, 20, 50_000) * (np.random.default_rng(1).random(50_000) < 0.2))
    .astype(np.int8)
    .tobytes()
)


@pytest.mark.parametrize("piece", [b"", b"a", b"\0" * 100_000, SPARSE, os.urandom(5000), SPARSE[:17]])
def test_a_piece_comes_back_whole_and_its_message_is_never_longer(piece: bytes) -> None:
    message = chunks.pack(piece)
    assert len(message) <= len(piece)
    assert chunks.unpack(message, len(piece)) == piece


def test_sparse_weights_cost_a_fraction_and_noise_costs_itself() -> None:
    assert len(chunks.pack(SPARSE)) < 0.4 * len(SPARSE)
    noise = os.urandom(5000)
    assert chunks.pack(noise) == noise


def test_a_stream_that_would_fill_memory_is_cut_off_at_the_length_of_the_piece() -> None:
    machine = zlib.compressobj(9, zlib.DEFLATED, chunks.RAW)
    bomb = machine.compress(b"\0" * 50_000_000) + machine.flush()
    assert len(bomb) < 60_000
    assert chunks.unpack(bomb, 60_000) is None


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"no stream at all",
        chunks.pack(SPARSE)[:-10],
        chunks.pack(SPARSE) + b"more",
        chunks.pack(SPARSE[:-1]),
        SPARSE + b"x",
    ],
    ids=["empty", "rubbish", "cut off", "something behind it", "one byte short", "too long"],
)
def test_what_is_not_one_whole_piece_is_none(message: bytes) -> None:
    assert chunks.unpack(message, len(SPARSE)) is None


def test_a_files_sent_bytes_are_those_of_its_messages(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_bytes(SPARSE)
    pieces = [SPARSE[i : i + 4096] for i in range(0, len(SPARSE), 4096)]
    assert chunks.sent_bytes(file, 4096) == sum(len(chunks.pack(piece)) for piece in pieces)
