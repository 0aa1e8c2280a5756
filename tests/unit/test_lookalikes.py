"""Splits that share pictures are told, of whatever size they are."""

from __future__ import annotations

import numpy as np
from edgefleet_controller.source.lookalikes import Overlap, across, first_likes

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3)).astype(np.uint8)


def test_a_split_of_one_picture_is_compared_like_others() -> None:
    assert across([PICTURES[:1], PICTURES[1:]]) is None
    assert across([PICTURES[:1], PICTURES[1:], PICTURES[:1]]) == Overlap(0, 2, 1, 0, 0)


def test_pictures_that_differ_by_a_cameras_noise_are_one_and_patterns_of_one_brightness_are_not() -> None:
    rng = np.random.default_rng(1)
    large = PICTURES[:3].repeat(4, axis=1).repeat(4, axis=2)
    scenes = large.repeat(4, axis=0) + rng.normal(0, 5, (12, 96, 96, 3))
    assert first_likes(np.clip(scenes, 0, 255).astype(np.uint8)).tolist() == [0] * 4 + [4] * 4 + [8] * 4
    weave = (np.indices((64, 64)).sum(axis=0) % 2 * 200)[None, ..., None].astype(np.uint8)
    assert first_likes(np.concatenate([weave, 200 - weave, weave])).tolist() == [0, 1, 0]
