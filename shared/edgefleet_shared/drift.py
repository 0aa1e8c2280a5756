"""Stage 9, health: how far what a model sees and says has moved from its golden set. Pure: receives counts, hands on figures.

What is normal stands in the artifact (:class:`Statistics`, computed by :func:`edgefleet_shared.golden.statistics` where it is packed); what is
so is counted by the runtime. The *population stability index* of credit scoring (Siddiqi, "Credit Risk Scorecards", 2006): over
the bins of a histogram, the sum of (q - p) ln(q / p); by custom below 0.1 nothing has moved, above 0.25 much has. Pictures are also looked at
channel by channel: a camera that swaps red and blue moves nothing else. The *shift* is by how
many standard deviations of the golden samples' means the mean has moved. For classifiers the Jensen-Shannon divergence of the classes, 0
to 1. Too few samples give no figure: a handful of pictures is always far from the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

MIN_SAMPLES = 50
# A bin that nothing fell into counts as this share, so that one value out of range is no infinite drift.
MIN_SHARE = 1e-3
# Golden answers for each class, on average, below which their histogram says nothing about classes.
MIN_GOLDEN_PER_CLASS = 4


class ChannelStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One channel of a tensor of pictures; the fields are :class:`TensorStatistics`', between the same edges."""

    shares: tuple[float, ...]
    mean: float
    spread: float


class TensorStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor over the golden set: ``shares`` of its values between the ascending ``edges`` (one more than those; no edges where the set
    holds too few numbers to say what is normal), ``mean`` and
    ``spread`` (standard deviation) of the samples' means, ``non_finite`` the share of values that are NaN or infinite, which the other figures
    leave out. ``channels`` of pictures lie along ``axis``."""

    name: str
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    mean: float
    spread: float
    non_finite: float = 0.0
    axis: int = 0
    channels: tuple[ChannelStatistics, ...] = ()


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What is normal for a model. ``classes`` are the shares of the golden answers' classes; empty where they say nothing."""

    samples: int
    inputs: tuple[TensorStatistics, ...]
    outputs: tuple[TensorStatistics, ...]
    classes: tuple[float, ...] = ()


class ChannelDrift(msgspec.Struct, frozen=True, kw_only=True):
    """How far one channel of a tensor has moved."""

    psi: float
    shift: float | None


class TensorDrift(msgspec.Struct, frozen=True, kw_only=True):
    """How far one tensor has moved. ``shift`` None where the golden set does not vary; ``non_finite`` is the share of values that are
    NaN or infinite, which the other figures leave out; where all are, ``psi`` is of that alone. ``channels`` are told of pictures."""

    name: str
    kind: Literal["input", "output"]
    psi: float
    shift: float | None
    non_finite: float
    channels: tuple[ChannelDrift, ...] = ()


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How far a model's world has moved, over the last ``samples`` requests that were looked at. ``psi`` is the greatest of its tensors'
    and their channels', with values that are no numbers as one more bin; None while nothing can be said, with the reason in ``note``; ``repeated`` the share of inputs equal to the one before."""

    samples: int
    note: str = ""
    psi: float | None = None
    classes: float | None = None
    repeated: float | None = None
    tensors: tuple[TensorDrift, ...] = ()


def psi(expected: Sequence[float], counts: Sequence[int]) -> float:
    """The population stability index of counts against expected shares of the same bins; counts must not all be 0."""
    total = sum(counts)
    found = 0.0
    for share, count in zip(expected, counts, strict=True):
        p, q = max(share, MIN_SHARE), max(count / total, MIN_SHARE)
        found += (q - p) * math.log(q / p)
    return found


def psi_of_non_finite(expected: float, share: float) -> float:
    """What a bin of values that are NaN or infinite adds to the index."""
    p, q = max(expected, MIN_SHARE), max(share, MIN_SHARE)
    return (q - p) * math.log(q / p)


def divergence(expected: Sequence[float], counts: Sequence[int]) -> float:
    """The Jensen-Shannon divergence (base 2) of counts from expected shares: 0 the same, 1 nothing in common."""
    total = sum(counts)
    found = 0.0
    for p, count in zip(expected, counts, strict=True):
        q = count / total
        middle = (p + q) / 2
        found += sum(x * math.log2(x / middle) for x in (p, q) if x > 0) / 2
    return min(1.0, max(0.0, found))


def shift(reference: TensorStatistics | ChannelStatistics, mean: float) -> float | None:
    """By how many of the golden samples' standard deviations a mean of means has moved; None where they do not vary."""
    return abs(mean - reference.mean) / reference.spread if reference.spread > 0 else None
