"""Splits that share pictures are told, of whatever size they are."""

from __future__ import annotations

import numpy as np
from edgefleet_controller.source.lookalikes import Overlap, across

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3)).astype(np.uint8)


def test_a_split_of_one_picture_is_compared_like_others() -> None:
    assert across([PICTURES[:1], PICTURES[1:]]) is None
    assert across([PICTURES[:1], PICTURES[1:], PICTURES[:1]]) == Overlap(0, 2, 1, 0, 0)
