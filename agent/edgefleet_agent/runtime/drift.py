"""Stage 9, health, the runtime's part: receives what single requests were like, hands on how far a model's world has moved.

In the front, and free of numpy: it adds up a few dozen integers a second, checked, because they come from a worker. Two windows follow
one another, so that the figure is about the last minutes and never about nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgefleet_shared import drift
from edgefleet_shared.drift import (
    MIN_SAMPLES,
    ChannelDrift,
    ChannelStatistics,
    Drift,
    Statistics,
    TensorDrift,
    TensorStatistics,
)

from edgefleet_agent.runtime.channel import Observed

WINDOW_SAMPLES = 300  # five minutes at a sample a second


@dataclass
class _Sums:
    """What was counted of a tensor, or of one channel of it. ``measured`` are the samples that have a mean."""

    bins: list[int]
    non_finite: int = 0
    mean: float = 0.0
    measured: int = 0

    def add(self, other: _Sums) -> None:
        self.bins = [one + more for one, more in zip(self.bins, other.bins, strict=True)]
        self.non_finite += other.non_finite
        self.mean += other.mean
        self.measured += other.measured


class _Tally:
    """One window."""

    def __init__(self, parts: list[TensorStatistics | ChannelStatistics], classes: int) -> None:
        self.samples = self.repeated = 0
        self.sums = [_Sums([0] * len(part.shares)) for part in parts]
        self.classes = [0] * classes


class DriftMeter:
    """How far one version's inputs and answers are from its golden set.

    Args:
        normal: what the artifact says; None for one that was packed without.
    """

    def __init__(self, normal: Statistics | None) -> None:
        self._normal = normal
        self._parts = list[TensorStatistics | ChannelStatistics]()
        for _, tensor in _kinds(normal) if normal is not None else ():
            self._parts += [tensor, *tensor.channels]
        self._windows = [self._window()]
        self._checksum: int | None = None

    def _window(self) -> _Tally:
        return _Tally(self._parts, len(self._normal.classes) if self._normal else 0)

    def add(self, seen: Observed) -> None:
        """One request.

        Raises:
            ValueError: it makes no sense for this artifact.
        """
        if self._normal is None or len(seen.tensors) != len(self._parts):
            raise ValueError("an observation of other tensors than the artifact's")
        for part, (counts, non_finite, mean) in zip(self._parts, seen.tensors, strict=True):
            if non_finite < 0 or any(count < 0 for count in counts) or (mean is not None and not math.isfinite(mean)):
                raise ValueError("an observation with impossible counts")
            if len(counts) != len(part.shares):
                raise ValueError("an observation with other bins than the artifact's")
        now = self._windows[-1]
        for sums, (counts, non_finite, mean) in zip(now.sums, seen.tensors, strict=True):
            sums.add(_Sums(counts, non_finite, mean or 0.0, int(mean is not None)))
        if 0 <= seen.answer < len(now.classes):
            now.classes[seen.answer] += 1
        now.repeated += seen.checksum == self._checksum
        self._checksum = seen.checksum
        now.samples += 1
        if now.samples >= WINDOW_SAMPLES:
            self._windows = [now, self._window()]

    def figures(self) -> Drift:
        """How far it has moved by now."""
        normal, windows = self._normal, self._windows
        if normal is None:
            return Drift(samples=0, note="the artifact does not say what is normal")
        samples = sum(window.samples for window in windows)
        if samples < MIN_SAMPLES:
            return Drift(samples=samples, note=f"not enough: {samples} of {MIN_SAMPLES} requests looked at")
        tensors, moved = list[TensorDrift](), list[float]()
        sums = iter(self._sums())
        for kind, tensor in _kinds(normal):
            whole, channels = next(sums), [next(sums) for _ in tensor.channels]
            found = _tensor(kind, tensor, whole, channels)
            if found is not None:
                tensors.append(found)
                moved += [found.psi, drift.psi_of_non_finite(tensor.non_finite, found.non_finite)]
                moved += [channel.psi for channel in found.channels]
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

    def _sums(self) -> list[_Sums]:
        """Of both windows, for each part."""
        found = self._window().sums
        for window in self._windows:
            for total, sums in zip(found, window.sums, strict=True):
                total.add(sums)
        return found


def _tensor(
    kind: Literal["input", "output"], normal: TensorStatistics, sums: _Sums, channels: list[_Sums]
) -> TensorDrift | None:
    """How far a tensor has moved; None where nothing can be said."""
    if not normal.edges:
        return None
    finite = sum(sums.bins)
    if sums.non_finite and not finite:
        psi = drift.psi_of_non_finite(normal.non_finite, 1.0)
        return TensorDrift(name=normal.name, kind=kind, psi=psi, shift=None, non_finite=1.0)
    moved = _moved(normal, sums)
    if moved is None:
        return None
    parts = [_moved(part, counted) for part, counted in zip(normal.channels, channels, strict=True)]
    return TensorDrift(
        name=normal.name, kind=kind, psi=moved.psi, shift=moved.shift,
        non_finite=sums.non_finite / (finite + sums.non_finite),
        channels=tuple(part for part in parts if part is not None) if None not in parts else (),
    )  # fmt: skip


def _moved(normal: TensorStatistics | ChannelStatistics, sums: _Sums) -> ChannelDrift | None:
    if not sum(sums.bins) or not sums.measured:
        return None
    return ChannelDrift(psi=drift.psi(normal.shares, sums.bins), shift=drift.shift(normal, sums.mean / sums.measured))


def _kinds(normal: Statistics) -> list[tuple[Literal["input", "output"], TensorStatistics]]:
    return [("input", tensor) for tensor in normal.inputs] + [("output", tensor) for tensor in normal.outputs]
