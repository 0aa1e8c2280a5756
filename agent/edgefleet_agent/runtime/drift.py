"""Stage 9, health, the runtime's part: receives what single requests were like, hands on how far a model's world has moved.

In the front, and free of numpy: it adds up a few dozen integers a second, checked, because they come from a worker. Two windows follow
one another, so that the figure is about the last minutes and never about nothing.
"""

from __future__ import annotations

import math
from typing import Literal

from edgefleet_shared import drift
from edgefleet_shared.drift import MIN_SAMPLES, Drift, Statistics, TensorDrift, TensorStatistics

from edgefleet_agent.runtime.channel import Observed

WINDOW_SAMPLES = 300  # five minutes at a sample a second


class _Tally:
    """One window."""

    def __init__(self, normal: Statistics) -> None:
        tensors = (*normal.inputs, *normal.outputs)
        self.samples = self.repeated = 0
        self.bins = [[0] * len(tensor.shares) for tensor in tensors]
        self.non_finite = [0] * len(tensors)
        self.means = [0.0] * len(tensors)
        self.measured = [0] * len(tensors)  # samples that have a mean
        self.classes = [0] * len(normal.classes)


class DriftMeter:
    """How far one version's inputs and answers are from its golden set.

    Args:
        normal: what the artifact says; None for one that was packed without.
    """

    def __init__(self, normal: Statistics | None) -> None:
        self._normal = normal
        self._windows = [_Tally(normal)] if normal is not None else []
        self._checksum: int | None = None

    def add(self, seen: Observed) -> None:
        """One request.

        Raises:
            ValueError: it makes no sense for this artifact.
        """
        normal = self._normal
        if normal is None or len(seen.tensors) != len(normal.inputs) + len(normal.outputs):
            raise ValueError("an observation of other tensors than the artifact's")
        now = self._windows[-1]
        for counts, non_finite, mean in seen.tensors:
            if non_finite < 0 or any(count < 0 for count in counts) or (mean is not None and not math.isfinite(mean)):
                raise ValueError("an observation with impossible counts")
        for place, (counts, non_finite, mean) in enumerate(seen.tensors):
            bins = now.bins[place]
            if len(counts) != len(bins):
                raise ValueError("an observation with other bins than the artifact's")
            for number, count in enumerate(counts):
                bins[number] += count
            now.non_finite[place] += non_finite
            if mean is not None:
                now.means[place] += mean
                now.measured[place] += 1
        if 0 <= seen.answer < len(now.classes):
            now.classes[seen.answer] += 1
        now.repeated += seen.checksum == self._checksum
        self._checksum = seen.checksum
        now.samples += 1
        if now.samples >= WINDOW_SAMPLES:
            self._windows = [now, _Tally(normal)]

    def figures(self) -> Drift:
        """How far it has moved by now."""
        normal, windows = self._normal, self._windows
        if normal is None:
            return Drift(samples=0, note="the artifact does not say what is normal")
        samples = sum(window.samples for window in windows)
        if samples < MIN_SAMPLES:
            return Drift(samples=samples, note=f"not enough: {samples} of {MIN_SAMPLES} requests looked at")
        tensors, moved = list[TensorDrift](), list[float]()
        for place, (kind, tensor) in enumerate(_kinds(normal)):
            found = self._tensor(place, kind, tensor)
            if found is not None:
                tensors.append(found)
                moved.append(max(found.psi, drift.psi_of_non_finite(found.non_finite)))
        if not tensors:
            few = not any(tensor.edges for _, tensor in _kinds(normal))
            return Drift(
                samples=samples, note="the golden set holds too few numbers" if few else "no value was a number"
            )
        classes = [sum(counts) for counts in zip(*(window.classes for window in windows), strict=True)]
        return Drift(
            samples=samples,
            psi=max(moved),
            classes=drift.divergence(normal.classes, classes) if sum(classes) else None,
            repeated=sum(window.repeated for window in windows) / samples,
            tensors=tuple(tensors),
        )

    def _tensor(self, place: int, kind: Literal["input", "output"], normal: TensorStatistics) -> TensorDrift | None:
        if not normal.edges:
            return None
        windows = self._windows
        counts = [sum(bins) for bins in zip(*(window.bins[place] for window in windows), strict=True)]
        finite, non_finite = sum(counts), sum(window.non_finite[place] for window in windows)
        measured = sum(window.measured[place] for window in windows)
        if non_finite and not finite:
            return TensorDrift(
                name=normal.name, kind=kind, psi=drift.psi_of_non_finite(1.0), shift=None, non_finite=1.0
            )
        if not finite or not measured:
            return None
        mean = sum(window.means[place] for window in windows) / measured
        return TensorDrift(
            name=normal.name, kind=kind, psi=drift.psi(normal.shares, counts), shift=drift.shift(normal, mean),
            non_finite=non_finite / (finite + non_finite),
        )  # fmt: skip


def _kinds(normal: Statistics) -> list[tuple[Literal["input", "output"], TensorStatistics]]:
    return [("input", tensor) for tensor in normal.inputs] + [("output", tensor) for tensor in normal.outputs]
