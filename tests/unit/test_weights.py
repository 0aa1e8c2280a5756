"""int8 weights: no sum of two products overflows, no bias is lost, rounding takes nothing from the mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children.weights import (
    bias_shift,
    channel_scales,
    correct_biases,
    rounded,
    wide_enough,
)
from onnx import TensorProto, helper, numpy_helper


def neighbours(weight: Any, scales: Any) -> Any:
    """Sums of two neighbours of one sign as integers, in the order in which kernels pack them: input channels at one tap."""
    integers = np.round(rounded(weight, scales, 0) / scales.reshape(-1, *[1] * (weight.ndim - 1)))
    rows = integers.transpose(0, 2, 3, 1).reshape(len(integers), -1)
    left, right = rows[:, :-1], rows[:, 1:]
    return np.where(left * right > 0, np.abs(left + right), 0)


@pytest.mark.parametrize("seed", range(20))
def test_no_pair_of_neighbours_overflows_16_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(3, (16, 12, 3, 3)).astype(np.float32)  # heavy tails: large neighbours do meet
    sums = neighbours(weight, channel_scales(weight, 0, "pairs"))
    assert sums.max() * 255 <= 32767
    assert neighbours(weight, channel_scales(weight, 0, "full")).max() * 255 > 32767, "else this shows nothing"


def test_pairs_keep_more_of_the_weights_than_seven_bits_do() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64, 1, 1)).astype(np.float32)
    noise = {
        bits: float(np.mean((rounded(weight, channel_scales(weight, 0, bits), 0) - weight) ** 2))
        for bits in ("full", "pairs", "reduced")
    }
    assert noise["full"] < noise["pairs"] < 0.6 * noise["reduced"]


def test_taps_over_one_grey_channel_are_neighbours() -> None:
    weight = (
        np.random.default_rng(0).standard_t(3, (16, 1, 3, 3)).astype(np.float32)
    )  # as a depthwise one's shape, and is none
    assert neighbours(weight, channel_scales(weight, 0, "pairs", groups=1)).max() * 255 <= 32767
    assert neighbours(weight, channel_scales(weight, 0, "pairs", groups=16)).max() * 255 > 32767


def test_a_depthwise_tap_has_no_neighbour() -> None:
    weight = np.full((4, 1, 3, 3), 1.0, np.float32)
    assert np.array_equal(channel_scales(weight, 0, "pairs"), channel_scales(weight, 0, "full"))


def test_a_dead_channels_bias_still_fits_its_int32() -> None:
    scales = wide_enough(np.array([1e-12, 0.01], np.float32), np.array([3.0, 3.0], np.float32), 0.02)
    assert (3.0 / (0.02 * scales) <= 2.0**31).all()
    assert scales[1] == np.float32(0.01)


@pytest.mark.parametrize("group", [1, 4])
def test_a_corrected_bias_gives_back_the_mean_that_rounding_took(group: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(8, 8 // group, 1, 1)).astype(np.float32)
    bias = rng.normal(size=8).astype(np.float32)
    x = rng.normal(1.0, 1.0, (64, 8, 5, 5)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="c", group=group, kernel_shape=[1, 1])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 8, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )  # fmt: skip
    model = helper.make_model(graph)
    scales = np.abs(weight).reshape(8, -1).max(axis=1) / 3  # coarse, so that much is lost
    correct_biases(model, {"x": x.mean(axis=(0, 2, 3)).tolist()}, {"w": weight - rounded(weight, scales, 0)})
    corrected = numpy_helper.to_array(
        next(i for i in model.graph.initializer if i.name == model.graph.node[0].input[2])
    )

    def mean(w: Any, b: Any) -> Any:
        out = [
            np.einsum("nihw,oi->nohw", x[:, g * (8 // group) : (g + 1) * (8 // group)], w[o : o + 1, :, 0, 0])
            for o, g in ((o, o * group // 8) for o in range(8))
        ]
        return np.concatenate(out, axis=1).mean(axis=(0, 2, 3)) + b

    wanted, lost = mean(weight, bias), mean(rounded(weight, scales, 0), bias)
    assert np.abs(lost - wanted).max() > 0.01
    assert mean(rounded(weight, scales, 0), corrected) == pytest.approx(wanted, abs=1e-4)


def test_means_of_another_shape_correct_nothing() -> None:
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    assert bias_shift(node, np.ones((3, 4)), np.ones(5)) is None


@pytest.mark.parametrize("kernel", [(4,), (2, 2, 2)])
def test_over_lines_and_volumes_neighbours_are_input_channels_too(kernel: tuple[int, ...]) -> None:
    size = int(np.prod(kernel))
    # Taps alternate in sign, so that they are no neighbours that overflow; input channels at one tap are.
    signs = np.where(np.arange(size) % 2, -1, 1).reshape(kernel)
    weight = (np.random.default_rng(0).normal(0.5, 0.05, (8, 6, *kernel)) * signs).astype(np.float32)
    scales = channel_scales(weight, 0, "pairs", groups=1)
    integers = np.round(rounded(weight, scales, 0) / scales.reshape(-1, *[1] * (weight.ndim - 1)))
    rows = np.moveaxis(integers, 1, -1).reshape(8, -1)
    assert np.abs(rows[:, :-1] + rows[:, 1:]).max() * 255 <= 32767


def test_a_depthwise_tap_over_a_line_has_no_neighbour() -> None:
    weight = np.full((4, 1, 3), 1.0, np.float32)
    assert np.array_equal(channel_scales(weight, 0, "pairs", groups=4), channel_scales(weight, 0, "full", groups=4))
