"""Stage 2, compile: training samples for pruning, whatever trains. Pure but for the files that it reads: hands on batches, moved about where they are few."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import safe_open

from . import job
from .measure import Array

FEW = 5000  # pictures below which they are moved about, so that the network is not tuned to the very ones; more make up for it by themselves
SHIFT = 1 / 14  # of a side: how far a picture is moved at most


class Samples:
    """Training samples as the network takes them, a batch at a time.

    The request has ``samples`` (safetensors, one tensor per input, uint8 pictures or float), ``rows`` (JSON file with the numbers of those to
    train on), ``truth`` (JSON file with the class of each row, or null), ``encoding`` (of uint8 pictures).
    """

    def __init__(self, request: job.Request, inputs: list[str]) -> None:
        with safe_open(request["samples"], "np") as file:
            self._arrays = [file.get_tensor(name) for name in inputs]
        with open(request["rows"], encoding="utf-8") as stream:
            self._rows = np.array(json.load(stream))
        self._encoding = request["encoding"]
        self._truth: Array | None = None
        if request["truth"]:
            with open(request["truth"], encoding="utf-8") as stream:
                self._truth = np.array(json.load(stream), np.int64)
        self.few = self._encoding is not None and len(self._rows) < FEW

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self, numbers: Array) -> Array | None:
        return None if self._truth is None else self._truth[numbers]

    def batch(self, numbers: Array) -> list[Array]:
        """The inputs, encoded (as :func:`edgefleet_shared.golden.encode_pictures` does it)."""
        found = []
        for array in self._arrays:
            x = array[self._rows[numbers]]
            if x.dtype == np.uint8:
                own = self._encoding
                x = x[..., ::-1] if own["colour"] == "BGR" else x
                x = (x.astype(np.float32) - np.float32(own["mean"])) / np.float32(own["std"])
                x = x.transpose(0, 3, 1, 2) if own["layout"] == "NCHW" else x
            found.append(np.ascontiguousarray(x))
        return found

    def shown(self, numbers: Array, chance: np.random.Generator) -> list[Array]:
        """The same, moved about where there are few."""
        found = self.batch(numbers)
        return [_moved(x, chance) for x in found] if self.few else found


def batches(count: int, size: int, epochs: int, chance: np.random.Generator) -> Iterator[Any]:
    """Numbers of samples, in another order in each epoch."""
    for _ in range(epochs):
        order = chance.permutation(count)
        for first in range(0, count, size):
            yield order[first : first + size]


def _moved(x: Array, chance: np.random.Generator) -> Array:
    """Pictures (N x C x H x W or N x H x W x C: the axes that are longest) moved a little, each batch another way; edges are repeated."""
    if x.ndim != 4:
        return x
    first = 2 if x.shape[1] <= x.shape[3] else 1
    for axis in (first, first + 1):
        most = round(x.shape[axis] * SHIFT)
        by = int(chance.integers(-most, most + 1))
        places = np.clip(np.arange(x.shape[axis]) - by, 0, x.shape[axis] - 1)
        x = np.take(x, places, axis=axis)
    return np.ascontiguousarray(x)
