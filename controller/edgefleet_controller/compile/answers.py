"""Stage 2, compile: answers. Pure: receives raw outputs, hands on what an application would say: a class, boxes, a line of text.

Quality is judged on these, at the application's own threshold, because that is what its users see: a class that changed, a box that
is gone, a word that runs into the next one. What a detector's outputs mean is in :mod:`..detection`. Source: greedy CTC as in Graves 2006.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgefleet_controller import segmentation
from edgefleet_controller.detection import BoxDecoding, decoded
from edgefleet_controller.source import ModelVersion

Array = npt.NDArray[Any]
BLANK = 0
SAME_PIXELS = 0.95  # of a segmented picture that must agree for the picture to
SAME_PLACE = 0.5  # of the pixels that either side gives a class, which both must: intersection over union, as of boxes
SPECK_PIXELS, SPECK_SHARE = 16, 1e-3  # pixels, or share of a picture: a class that is nowhere seen on more is chance


class Box(NamedTuple):
    """Corners in the input's pixels, score, class."""

    left: float
    top: float
    right: float
    bottom: float
    score: float
    kind: int


def classes(outputs: Array) -> Array:
    """The largest of the last axis; -1 where a value is not a number. Shape N x ...; integers."""
    finite = np.isfinite(outputs).all(axis=-1)
    found: Array = np.where(finite, np.argmax(np.nan_to_num(outputs), axis=-1), -1)
    return found.reshape(len(outputs), -1)


def lines(outputs: Array, characters: tuple[str, ...]) -> list[str]:
    """Lines of text by greedy CTC: repeats collapse, then blanks go. Spaces stay, but for those at the ends.

    Args:
        outputs: N x steps x classes; a batch of 1 may stand between steps and classes.
    """
    found = []
    for steps in np.argmax(outputs, axis=-1).reshape(len(outputs), -1):
        kept = [int(c) for i, c in enumerate(steps) if c != BLANK and (i == 0 or c != steps[i - 1])]
        found.append("".join(characters[c - 1] for c in kept).strip())
    return found


def boxes(outputs: dict[str, Array], version: ModelVersion) -> list[list[Box]]:
    """Boxes of each picture above the application's threshold, best first."""
    assert version.detection is not None
    return [_suppressed(corners, scores, version.detection) for corners, scores in _decoded(outputs, version)]


def above_threshold(outputs: dict[str, Array], version: ModelVersion) -> tuple[int, int]:
    """(how many places of all pictures have a score above the application's threshold, of how many), overlaps included."""
    assert version.detection is not None
    above = [scores.max(axis=1) >= version.detection.threshold for _, scores in _decoded(outputs, version)]
    return sum(int(one.sum()) for one in above), sum(len(one) for one in above)


def _decoded(outputs: dict[str, Array], version: ModelVersion) -> Iterator[tuple[Array, Array]]:
    """Corners and scores of each picture; what is not a number is no box."""
    assert version.detection is not None
    arrays = [outputs[spec.name] for spec in version.outputs]
    for i in range(len(arrays[0])):
        one = [np.nan_to_num(a[i], nan=-1e9, posinf=1e9, neginf=-1e9).astype(np.float64) for a in arrays]
        yield decoded(one, version.detection, version.input_size)


def matched(have: list[Box], want: list[Box], least_iou: float) -> int:
    """How many boxes are in both: same class, overlap enough, each used once, best scores first."""
    corners, kinds = np.array([box[:4] for box in want]).reshape(-1, 4), np.array([box.kind for box in want])
    free, count = np.ones(len(want), bool), 0
    for box in have:
        near = np.flatnonzero(free & (kinds == box.kind))
        if not near.size:
            continue
        overlaps = _iou(np.array([box[:4]]), corners[near])
        best = int(overlaps.argmax())
        if overlaps[best] >= least_iou:
            free[near[best]] = False
            count += 1
    return count


def masks_alike(outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion) -> Array:
    """Which pictures are segmented alike, in every output: nearly all pixels are, and each class that either side sees on more than a speck covers
    the same place as much as boxes must. Pixels alone would not miss what is small: a lost line of text is one in a hundred of them. Shape N; bool."""
    alike = np.ones(len(next(iter(references.values()))), bool)
    for spec in version.outputs:
        sides = (segmentation.pixels(side[spec.name], spec, version.masks) for side in (outputs, references))
        alike &= [_covers(have, want) for have, want in zip(*sides, strict=True)]
    return alike


def _covers(have: Array, want: Array) -> bool:
    """Whether two pictures' pixels have the same classes. Args: integers, one per pixel."""
    if np.mean((have == want) & (have != segmentation.NO_CLASS)) < SAME_PIXELS:
        return False
    speck = max(SPECK_PIXELS, SPECK_SHARE * want.size)
    for kind in np.union1d(have, want):
        mine, theirs = have == kind, want == kind
        if max(mine.sum(), theirs.sum()) > speck and (mine & theirs).sum() < SAME_PLACE * (mine | theirs).sum():
            return False
    return True


def _suppressed(corners: Array, scores: Array, told: BoxDecoding) -> list[Box]:
    """Non-maximum suppression within each class."""
    kinds, best = scores.argmax(axis=1), scores.max(axis=1)
    kept: list[Box] = []
    for kind in np.unique(kinds[best >= told.threshold]):
        left = np.flatnonzero((best >= told.threshold) & (kinds == kind))
        left = left[np.argsort(-best[left], kind="stable")]
        while left.size:
            first, left = left[0], left[1:]
            x0, y0, x1, y1 = (float(v) for v in corners[first])
            kept.append(Box(x0, y0, x1, y1, float(best[first]), int(kind)))
            left = left[_iou(corners[first][None], corners[left]) < told.nms_iou]
    return sorted(kept, key=lambda box: -box.score)


def _iou(one: Array, many: Array) -> Array:
    """Overlap of one box (1 x 4) with many (N x 4): intersection over union."""
    low, high = np.maximum(one[:, :2], many[:, :2]), np.minimum(one[:, 2:], many[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = [np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=1) for b in (one, many)]
    found: Array = shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)
    return found
