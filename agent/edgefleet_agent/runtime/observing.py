"""Stage 9, health, the worker's part: receives the tensors of a request now and then, hands on what they were like.

Behind the request path: at most once a second (ten times a second until the first figure can be given), some thousand values of each tensor
are picked out before the answer goes, and counted after it has gone.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator

import numpy as np
from edgefleet_shared.drift import MIN_SAMPLES, Statistics, TensorStatistics

from edgefleet_agent.runtime.channel import Observed
from edgefleet_agent.runtime.tensors import Array

PERIOD_S, FIRST_PERIOD_S = 1.0, 0.1
KEPT_PLACES = 16  # sizes of tensors; a model that takes any size may be asked with many
MAX_VALUES = 4096  # of a tensor; its mean is then good to a sixtieth of the spread of its values


class Observer:
    """Looks at one request at a time.

    Args:
        normal: what the artifact counts by; None looks at nothing.
    """

    def __init__(self, normal: Statistics | None) -> None:
        self._normal = normal
        self._tensors = [*normal.inputs, *normal.outputs] if normal else []
        self._edges = [np.asarray(t.edges) for t in self._tensors]
        self._places: dict[tuple[int, ...], tuple[Array, Array]] = {}
        self._picked: list[tuple[Array, Array]] = []
        self._answer = -1
        self._looks = 0
        self._due_at = 0.0

    def is_due(self) -> bool:
        """Whether this request is to be looked at."""
        return self._normal is not None and time.monotonic() >= self._due_at

    @property
    def has_something(self) -> bool:
        return bool(self._picked)

    def look(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        """Pick values out of a request and its answer; of a batch the first sample."""
        assert self._normal is not None
        self._looks += 1
        self._due_at = time.monotonic() + (FIRST_PERIOD_S if self._looks <= MIN_SAMPLES else PERIOD_S)
        self._picked = [
            self._pick(tensors.get(normal.name), normal.axis)
            for normals, tensors in ((self._normal.inputs, inputs), (self._normal.outputs, outputs))
            for normal in normals
        ]
        self._answer = -1
        if self._normal.classes:
            scores = outputs[self._normal.outputs[0].name][:1]
            # The largest of scores among which one is no number is none.
            self._answer = int(np.argmax(scores)) if scores.size and np.isfinite(scores).all() else -1

    def _pick(self, tensor: Array | None, axis: int) -> tuple[Array, Array]:
        """Values of the first sample, and the channel of each where the tensor's lie along ``axis``."""
        if tensor is None or not tensor.size:
            return np.empty(0), np.empty(0)
        sample = tensor[0] if tensor.ndim else tensor
        key = (axis, *sample.shape)
        if key not in self._places:
            places = np.arange(sample.size)
            if sample.size > MAX_VALUES:
                # By chance, but always the same ones: a step would see one channel, or one column.
                places = np.sort(np.random.default_rng(sample.size).choice(sample.size, MAX_VALUES, replace=False))
            if len(self._places) >= KEPT_PLACES:
                self._places.clear()
            channels = np.unravel_index(places, sample.shape)[axis - 1] if 0 < axis <= sample.ndim else np.empty(0)
            self._places[key] = places, channels
        places, channels = self._places[key]
        return sample.reshape(-1)[places].astype(np.float64), channels

    def observed(self) -> Observed:
        """What was picked, counted; once for each look."""
        assert self._normal is not None
        picked, self._picked = self._picked, []
        inputs = len(self._normal.inputs)
        return Observed(
            [
                part
                for tensor, edges, (values, channels) in zip(self._tensors, self._edges, picked, strict=True)
                for part in _parts(tensor, edges, values, channels)
            ],
            self._answer,
            zlib.crc32(b"".join(values.tobytes() for values, _ in picked[:inputs])),
        )


def _parts(
    normal: TensorStatistics, edges: Array, values: Array, channels: Array
) -> Iterator[tuple[list[int], int, float | None]]:
    """The whole tensor, then each of its channels."""
    yield _counted(values, edges)
    for channel in range(len(normal.channels)):
        yield _counted(values[channels == channel] if channels.size else channels, edges)


def _counted(values: Array, edges: Array) -> tuple[list[int], int, float | None]:
    finite = values[np.isfinite(values)]
    counts = np.bincount(np.searchsorted(edges, finite, side="right"), minlength=len(edges) + 1)
    with np.errstate(over="ignore"):
        mean = float(finite.mean()) if finite.size else math.nan
    return counts.tolist(), int(values.size - finite.size), mean if math.isfinite(mean) else None
