"""Stage 1, source: one picture in two files. Receives splits of pictures, hands on which are the same but for encoding, size or a camera's noise.

A photo that was saved again has other bytes, and a network is judged by what it was tuned on all the same. Small averages of the two are less than 3 grey levels
apart (JPEG of quality 30, WebP, two thirds of the size); those of different photos, or of lines of text, 20 and more. Of drawings of few pixels, such as digits,
JPEG moves averages further: twice as far, but still a small part of what the next picture is away. A camera that stands still makes frames
that are as near as that and are different ones: where pictures of one split lie near each other, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GRID = 16  # averages along each side
ALIKE = 4.0  # grey levels, root mean square, between averages of one picture
NEARLY = 8.0  # likewise, between those of one picture that is much nearer than any other ...
MUCH = 1 / 3  # ... at this share of the second's distance
UNLIKE = 16.0  # likewise, to the nearest other picture of its split, at the median, from which different pictures are never alike by chance
BY_CHANCE = 0.02  # share of a split's pictures: among tens of thousands of small ones some are nearly the same
NOISE = 16.0  # likewise, between whole pictures: what encoding and a camera's noise come to, and a pattern that averages hide does not
LOOKED_AT = 256  # of a split's pictures for that median
ROWS = 512  # compared at a time: 10,000 pictures by 10,000 are 400 MB


class Overlap(NamedTuple):
    """``shared`` pictures of split ``later`` that are in split ``earlier`` too, and one of them with its like, by number."""

    earlier: int
    later: int
    shared: int
    one: int
    like: int


def across(splits: Sequence[Array]) -> Overlap | None:
    """The first two splits that share pictures; None where none do, or where it can't be told.

    Args:
        splits: of each its pictures, uint8, N x H x W x C, of one size.
    """
    small = [_averages(pictures) for pictures in splits]
    nearest = np.concatenate([_to_others(one) for one in small])
    if np.median(nearest) < UNLIKE:
        return None
    for later, own in enumerate(small):
        for earlier in range(later):
            pairs = [
                (start + int(row), int(apart[row].argmin()))
                for start, apart in _distances(own, small[earlier])
                for row in np.flatnonzero(_alike(apart))
            ]
            if len(pairs) > BY_CHANCE * len(own):
                return Overlap(earlier, later, len(pairs), *pairs[0])
    return None


def first_likes(pictures: Array) -> Array:
    """For each picture the number of the first that it is but for encoding, size or noise: often its own.

    Args:
        pictures: uint8, N x H x W x C.
    """
    small = _averages(pictures)
    found: Array = np.arange(len(pictures))
    left: Array = found.copy()
    while len(left):
        first, left = left[0], left[1:]
        near = left[_far(small[left], small[first]) <= ALIKE]
        like = [
            one for one in near if _far(pictures[one : one + 1].reshape(1, -1), pictures[first].reshape(-1)) <= NOISE
        ]
        found[like] = first
        left = left[~np.isin(left, like)]
    return found


def _far(rows: Array, one: Array) -> Array:
    """Root mean square between each row and one."""
    distances: Array = np.sqrt(np.square(rows.astype(np.float32) - one).mean(axis=1))
    return distances


def _alike(apart: Array) -> Array:
    """Of some rows, by their distances to all of another split's, whether each has its like there."""
    found: Array = apart.min(axis=1) <= ALIKE
    if apart.shape[1] > 1:  # else there is no second
        nearest, second = np.partition(apart, 1, axis=1)[:, :2].T
        found |= (nearest <= NEARLY) & (nearest <= MUCH * second)
    return found


def _averages(pictures: Array) -> Array:
    """N rows of GRID x GRID x C averages."""
    found = []
    for picture in pictures:
        for axis in (0, 1):
            edges = np.linspace(0, picture.shape[axis], min(GRID, picture.shape[axis]) + 1).astype(int)
            sizes = np.diff(edges).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
            picture = np.add.reduceat(picture.astype(np.float32), edges[:-1], axis=axis) / sizes
        found.append(picture.reshape(-1))
    return np.stack(found).astype(np.float32)


def _to_others(own: Array) -> Array:
    """How far each of the first pictures of a split is from the nearest other one in it."""
    found = []
    for start, distances in _distances(own[:LOOKED_AT], own):
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf
        found.append(distances.min(axis=1))
    return np.concatenate(found)


def _distances(own: Array, others: Array) -> Iterator[tuple[int, Array]]:
    """(number of the first row, distances of some rows to all others), root mean squares."""
    squares = np.square(others).sum(axis=1)
    for start in range(0, len(own), ROWS):
        rows = own[start : start + ROWS]
        apart = np.square(rows).sum(axis=1)[:, None] + squares - 2 * rows @ others.T
        yield start, np.sqrt(np.maximum(apart, 0.0) / own.shape[1])
