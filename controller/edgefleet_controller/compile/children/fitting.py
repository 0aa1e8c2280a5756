"""Stage 2, compile: which way int8 weights are rounded. Pure: receives float weights, scales and what their operator reads, hands on whole numbers.

Rounding every weight to the nearest whole number is best for the weights and not for what comes out: errors add up over a channel's weights, and what these
read is alike. Here one weight after the other is rounded and those still to come make up for its error, as in OBQ and GPTQ (Frantar & Alistarh 2022, 2023); no
weight goes further than to the whole number above or below it, as in AdaRound (Nagel et al. 2020), so that few samples can't lead it astray and neighbours
overflow no more than nearest ones would (:mod:`.weights`, ``pairs``). The largest weight of a channel stays where the scale has it.
"""

from __future__ import annotations

import numpy as np

from .moments import Moments
from .weights import Array

DAMPING = 0.05  # of the mean variance, which is added to every tap's: samples are few, and boards see others
BLOCK = 16  # taps whose errors are carried on together


def fitted(weight: Array, scales: Array, axis: int, moments: Moments, *, centred: bool) -> Array:
    """The weight as int8 holds it, with errors that make up for each other.

    Args:
        weight: float32; its axis ``axis`` counts output channels, all others are taps.
        scales: one per output channel, or one alone.
        centred: whether a bias takes up what the mean of the output loses, so that only what varies counts.

    Returns:
        float32, in the shape of ``weight``: whole numbers times the scales.
    """
    moved = np.moveaxis(weight, axis, 0)
    rows = moved.reshape(len(moved), -1).astype(np.float64)
    by = np.broadcast_to(scales.astype(np.float64).reshape(-1, 1), (len(rows), 1))
    groups, taps = moments.mean.shape
    if rows.shape[1] != taps or len(rows) % groups:
        raise ValueError(f"a weight of shape {weight.shape} does not have {groups} groups of {taps} taps")
    mean, power = moments.mean.astype(np.float64), moments.covariance.astype(np.float64)
    if not centred:
        power = power + mean[:, :, None] * mean[:, None, :]
    each = len(rows) // groups
    if each == 1:  # depthwise: all groups at once
        whole = _rounded((rows / by)[:, None, :], power)[:, 0, :]
    else:
        parts = (rows / by).reshape(groups, each, taps)
        whole = np.concatenate([_rounded(part[None], one[None])[0] for part, one in zip(parts, power, strict=True)])
    found: Array = np.moveaxis((whole * by).reshape(moved.shape), 0, axis).astype(np.float32)
    return found


def _rounded(values: Array, power: Array) -> Array:
    """Whole numbers for weights in units of their scales. Args: groups x rows x taps; groups x taps x taps."""
    _, _, taps = values.shape
    variance = np.einsum("gii->gi", power)
    floor = np.maximum(DAMPING * variance.mean(axis=1, keepdims=True), 1e-12)
    order = np.argsort(-variance, axis=1, kind="stable")  # what is read loudest first: the others make up for it
    power = np.take_along_axis(np.take_along_axis(power, order[:, :, None], 1), order[:, None, :], 2)
    power = power + np.eye(taps) * floor[:, :, None]
    carried = np.linalg.cholesky(np.linalg.inv(power)).transpose(0, 2, 1)  # upper
    # Taps first from here on, so that what is done to one of them lies together.
    left = np.ascontiguousarray(np.take_along_axis(values, order[:, None, :], 2).transpose(2, 0, 1))
    low, high, near = np.floor(left), np.ceil(left), np.round(left)
    pinned = np.abs(left) == np.abs(left).max(axis=0)
    np.copyto(low, near, where=pinned)
    np.copyto(high, near, where=pinned)
    whole = near  # of the same size, and no longer needed
    for begin in range(0, taps, BLOCK):
        end = min(begin + BLOCK, taps)
        errors = np.empty((end - begin, *left.shape[1:]))
        for tap in range(begin, end):
            whole[tap] = np.clip(np.round(left[tap]), low[tap], high[tap])
            error = errors[tap - begin] = (left[tap] - whole[tap]) / carried[:, tap, tap, None]
            left[tap + 1 : end] -= error * carried[:, tap, tap + 1 : end].T[:, :, None]
        left[end:] -= (carried[:, begin:end, end:].transpose(0, 2, 1) @ errors.transpose(1, 0, 2)).transpose(1, 0, 2)
    whole = whole.transpose(1, 2, 0)
    found: Array = np.empty_like(whole)
    np.put_along_axis(found, order[:, None, :], whole, 2)
    return found
