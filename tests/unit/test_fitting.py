"""Which way weights are rounded: errors make up for each other in what comes out, and no weight goes far."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from edgefleet_controller.compile.children.fitting import fitted
from edgefleet_controller.compile.children.moments import Moments
from edgefleet_controller.compile.children.weights import channel_scales, rounded


def alike(groups: int, taps: int, count: int = 4000, mean: float = 1.0) -> Any:
    """Reads whose taps go up and down together, as neighbouring pixels do: groups x count x taps."""
    rng = np.random.default_rng(3)
    common = rng.normal(size=(groups, count, 1))
    return mean + common + 0.15 * rng.normal(size=(groups, count, taps))


def moments(reads: Any) -> Moments:
    mean = reads.mean(axis=1)
    second = reads.transpose(0, 2, 1) @ reads / reads.shape[1]
    return Moments(mean.astype(np.float32), (second - mean[:, :, None] * mean[:, None, :]).astype(np.float32))


def noise(lost: Any, reads: Any, *, centred: bool) -> float:
    """Power that lost weights (groups x rows x taps) put on the output; ``centred``: but for what a bias takes up."""
    out = lost @ reads.transpose(0, 2, 1)
    return float(np.mean((out - out.mean(axis=2, keepdims=True) if centred else out) ** 2))


@pytest.mark.parametrize(
    ("shape", "groups"), [((32, 1, 3, 3), 32), ((16, 12, 1, 1), 1), ((8, 20, 3, 3), 1), ((16, 4, 3, 3), 2)]
)
@pytest.mark.parametrize("centred", [True, False])
def test_errors_make_up_for_each_other(shape: tuple[int, ...], groups: int, centred: bool) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    reads = alike(groups, int(np.prod(shape[1:])))
    scales = channel_scales(weight, 0, "full", groups)
    rows = (groups, shape[0] // groups, -1)
    nearest = (weight - rounded(weight, scales, 0)).reshape(rows)
    found = (weight - fitted(weight, scales, 0, moments(reads), centred=centred)).reshape(rows)
    assert noise(found, reads, centred=centred) < 0.3 * noise(nearest, reads, centred=centred)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_matrix_may_count_its_outputs_along_either_axis(axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32)
    scales = channel_scales(weight, axis, "full")
    reads = alike(1, 10)
    found = fitted(weight, scales, axis, moments(reads), centred=True)
    turned = fitted(np.moveaxis(weight, axis, 0), scales, 0, moments(reads), centred=True)
    assert np.array_equal(np.moveaxis(found, axis, 0), turned)


@pytest.mark.parametrize("bits", ["full", "pairs", "reduced"])
@pytest.mark.parametrize("seed", range(4))
def test_a_weight_goes_to_a_whole_number_beside_it_and_the_largest_stays(seed: int, bits: str) -> None:
    weight = np.random.default_rng(seed).standard_t(3, (16, 70, 1, 1)).astype(np.float32)
    scales = channel_scales(weight, 0, bits)
    whole = fitted(weight, scales, 0, moments(alike(1, 70)), centred=True) / scales.reshape(-1, 1, 1, 1)
    exact = weight / scales.reshape(-1, 1, 1, 1)
    assert np.abs(whole - np.round(whole)).max() < 1e-3
    assert np.abs(whole - exact).max() < 1.001
    assert np.abs(whole).max() <= 127.001
    largest = np.abs(weight).argmax(axis=1)[:, None]
    kept, wanted = np.take_along_axis(whole, largest, 1), np.take_along_axis(exact, largest, 1)
    assert np.allclose(kept, np.round(wanted), atol=1e-3)
    # A converter that takes its scales from the weights finds the same.
    if bits == "full":
        assert np.allclose(channel_scales(whole * scales.reshape(-1, 1, 1, 1), 0, bits), scales, rtol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_neighbours_overflow_16_bits_no_more_than_nearest_ones(seed: int) -> None:
    weight = np.random.default_rng(seed).standard_t(3, (16, 12, 3, 3)).astype(np.float32)
    scales = channel_scales(weight, 0, "pairs")
    whole = fitted(weight, scales, 0, moments(alike(1, 108)), centred=True) / scales.reshape(-1, 1, 1, 1)
    rows = np.round(whole).transpose(0, 2, 3, 1).reshape(16, -1)
    left, right = rows[:, :-1], rows[:, 1:]
    assert np.where(left * right > 0, np.abs(left + right), 0).max() * 255 <= 32767


def test_reads_that_never_vary_leave_weights_where_they_are_nearest() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 6, 1, 1)).astype(np.float32)
    scales = channel_scales(weight, 0, "full")
    nothing = Moments(np.zeros((1, 6), np.float32), np.zeros((1, 6, 6), np.float32))
    assert np.array_equal(
        fitted(weight, scales, 0, nothing, centred=True), rounded(weight, scales, 0).astype(np.float32)
    )


def test_moments_of_another_operator_are_refused() -> None:
    with pytest.raises(ValueError, match="does not have 1 groups of 5 taps"):
        fitted(np.ones((4, 6, 1, 1), np.float32), np.ones(4, np.float32), 0, moments(alike(1, 5)), centred=True)
