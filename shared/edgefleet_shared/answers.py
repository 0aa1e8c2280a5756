"""Stages 2 and 7: answers. Pure: receives raw outputs, hands on what an application would say: a class, boxes, a line of text, the class of each pixel.

Quality is judged on these, at the application's own threshold, by the compiler, by a board's acceptance and on its live requests, because that is what users
see: a class that changed, a box that is gone, a word that runs into the next one. What a detector's outputs mean is in :mod:`edgefleet_shared.detection`,
a segmentation's in :mod:`edgefleet_shared.segmentation`. numpy is imported here, so the resident agent never imports this module. Source: greedy CTC as in
Graves 2006.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgefleet_shared import segmentation
from edgefleet_shared.contract import AcceptanceContract, PictureEncoding, TensorSpec, picture_size
from edgefleet_shared.detection import HEADS, decoded, misfit
from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.reading import AnswerKind, BoxDecoding, MaskReading, TextReading

Array = npt.NDArray[Any]
SAME_PIXELS = 0.95  # of a segmented picture that must agree for the picture to
SAME_PLACE = 0.5  # of the pixels that either side gives a class, which both must: intersection over union, as of boxes
MOST_PLACES = 3000  # above the threshold that are looked at, the best: a damaged detector sees boxes everywhere, which would take minutes to sort out
SPECK_PIXELS, SPECK_SHARE = 16, 1e-3  # pixels, or share of a picture: a class that is nowhere seen on more is chance


class Reading(NamedTuple):
    """How the outputs of a model, in its own order, are read. ``size``: rows and columns of the input, where there are boxes or pixels to find in it."""

    kind: AnswerKind
    outputs: tuple[TensorSpec, ...]
    size: tuple[int, int] = (-1, -1)
    detection: BoxDecoding | None = None
    masks: MaskReading = MaskReading()
    text: TextReading = TextReading()


def reading_of(
    contract: AcceptanceContract,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    encoding: PictureEncoding | None,
) -> Reading:
    """How a board reads the outputs of a model that takes and gives these.

    Raises:
        ArtifactError: its outputs can't be read so.
    """
    size = picture_size(inputs[0], encoding) if inputs and len(inputs[0].shape) == 4 else (-1, -1)
    told, shapes = contract.detection, [spec.shape for spec in outputs]
    if told is not None and (expected := misfit(shapes, told, size)):
        raise ArtifactError(f"no boxes are in outputs of the shapes {shapes}; decoder {told.decoder} takes {expected}")
    return Reading(contract.kind, tuple(outputs), size, contract.detection, contract.masks, contract.text)


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


def lines(outputs: Array, text: TextReading) -> list[tuple[int, ...]]:
    """Lines of text by greedy CTC, as the classes of their characters: repeats collapse, then blanks go. Spaces stay, but for those at the ends.

    Args:
        outputs: N x steps x classes; a batch of 1 may stand between steps and classes.
    """
    found = []
    for steps in np.argmax(outputs, axis=-1).reshape(len(outputs), -1):
        kept = [int(c) for i, c in enumerate(steps) if c != text.blank and (i == 0 or c != steps[i - 1])]
        written = [place for place, c in enumerate(kept) if c not in text.spaces]
        found.append(tuple(kept[written[0] : written[-1] + 1]) if written else ())
    return found


def boxes(outputs: Mapping[str, Array], reading: Reading) -> list[list[Box]]:
    """Boxes of each picture above the application's threshold, best first."""
    assert reading.detection is not None
    return [_reported(corners, scores, reading.detection) for corners, scores in _decoded(outputs, reading)]


def above_threshold(outputs: Mapping[str, Array], reading: Reading) -> tuple[int, int]:
    """(how many places of all pictures have a score above the application's threshold, of how many), overlaps included."""
    assert reading.detection is not None
    above = [scores.max(axis=1) >= reading.detection.threshold for _, scores in _decoded(outputs, reading)]
    return sum(int(one.sum()) for one in above), sum(len(one) for one in above)


def _decoded(outputs: Mapping[str, Array], reading: Reading) -> Iterator[tuple[Array, Array]]:
    """Corners and scores of each picture; what is not a number is no box."""
    assert reading.detection is not None
    arrays = [outputs[spec.name] for spec in reading.outputs]
    for i in range(len(arrays[0])):
        one = [np.nan_to_num(a[i], nan=-1e9, posinf=1e9, neginf=-1e9).astype(np.float64) for a in arrays]
        yield decoded(one, reading.detection, reading.size)


class Boxes(NamedTuple):
    """How many boxes of a picture are in both, in the one to be judged, in the reference."""

    both: int
    have: int
    want: int


def found_boxes(outputs: Mapping[str, Array], references: Mapping[str, Array], reading: Reading) -> list[Boxes]:
    """What each picture's boxes have in common."""
    assert reading.detection is not None
    sides, least = (boxes(outputs, reading), boxes(references, reading)), reading.detection.match_iou
    return [Boxes(matched(have, want, least), len(have), len(want)) for have, want in zip(*sides, strict=True)]


def side_by_side(
    outputs: Mapping[str, Array], references: Mapping[str, Array], reading: Reading
) -> tuple[Array, Array]:
    """Each picture's boxes as rows of corners, score and class: the reference's, and in the same places those in ``outputs`` that are the same, zeros where there
    is none. Two arrays, N x most x 6; float64."""
    assert reading.detection is not None
    sides = boxes(outputs, reading), boxes(references, reading)
    most = max(1, *(len(want) for want in sides[1]))
    found, rows = np.zeros((len(sides[1]), most, 6)), np.zeros((len(sides[1]), most, 6))
    for number, (have, want) in enumerate(zip(*sides, strict=True)):
        rows[number, : len(want)] = np.array(want).reshape(-1, 6)
        for mine, theirs in _pairs(have, want, reading.detection.match_iou):
            found[number, theirs] = have[mine]
    return found, rows


def share_of_boxes(found: Sequence[Boxes]) -> float:
    """The lower of recall and precision of the boxes in all pictures; 1 where neither has any."""
    both, have, want = (sum(counts) for counts in zip(*found, strict=True))
    return float(both / max(have, want)) if have or want else 1.0


def alike(outputs: Mapping[str, Array], references: Mapping[str, Array], reading: Reading) -> Array:
    """Which samples have the same answer, of kinds that have one: ``raw`` has values, ``detection`` boxes, of which some may be the same. Shape N; bool.

    Args:
        outputs, references: by output name, first axis N.
    """
    match reading.kind:
        case "segmentation":
            return _masks_alike(outputs, references, reading)
        case "text":
            have, want = (lines(side[reading.outputs[0].name], reading.text) for side in (outputs, references))
            return np.array([a == b for a, b in zip(have, want, strict=True)])
    have_classes, want_classes = (classes(side[reading.outputs[0].name]) for side in (outputs, references))
    same: Array = (have_classes == want_classes).all(axis=1)
    return same


def matched(have: list[Box], want: list[Box], least_iou: float) -> int:
    """How many boxes are in both: same class, overlap enough, each used once, best scores first."""
    return len(_pairs(have, want, least_iou))


def _pairs(have: list[Box], want: list[Box], least_iou: float) -> list[tuple[int, int]]:
    """The boxes that are in both, by their numbers in each."""
    corners, kinds = np.array([box[:4] for box in want]).reshape(-1, 4), np.array([box.kind for box in want])
    free, found = np.ones(len(want), bool), []
    for number, box in enumerate(have):
        near = np.flatnonzero(free & (kinds == box.kind))
        if not near.size:
            continue
        overlaps = _iou(np.array([box[:4]]), corners[near])
        best = int(np.argmax(overlaps))
        if overlaps[best] >= least_iou:
            free[near[best]] = False
            found.append((number, int(near[best])))
    return found


def _masks_alike(outputs: Mapping[str, Array], references: Mapping[str, Array], reading: Reading) -> Array:
    """Which pictures are segmented alike, in every output: nearly all pixels are, and each class that either side sees on more than a speck covers
    the same place as much as boxes must. Pixels alone would not miss what is small: a lost line of text is one in a hundred of them."""
    same = np.ones(len(next(iter(references.values()))), bool)
    for spec in reading.outputs:
        sides = (segmentation.pixels(side[spec.name], spec, reading.masks) for side in (outputs, references))
        same &= [_covers(have, want) for have, want in zip(*sides, strict=True)]
    return same


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


def _reported(corners: Array, scores: Array, told: BoxDecoding) -> list[Box]:
    """Boxes above the threshold; of those of a class that overlap, the best (non-maximum suppression), where the network hasn't seen to that."""
    most = np.inf if HEADS[told.decoder].suppressed else told.nms_iou
    kinds, best = scores.argmax(axis=1), scores.max(axis=1)
    above = np.flatnonzero(best >= told.threshold)
    above = above[np.argsort(-best[above], kind="stable")][:MOST_PLACES]
    kept: list[Box] = []
    for kind in np.unique(kinds[above]):
        left = above[kinds[above] == kind]
        while left.size:
            first, left = left[0], left[1:]
            x0, y0, x1, y1 = (float(v) for v in corners[first])
            kept.append(Box(x0, y0, x1, y1, float(best[first]), int(kind)))
            left = left[_iou(corners[first][None], corners[left]) < most]
    return sorted(kept, key=lambda box: -box.score)


def _iou(one: Array, many: Array) -> Array:
    """Overlap of one box (1 x 4) with many (N x 4): intersection over union."""
    low, high = np.maximum(one[:, :2], many[:, :2]), np.minimum(one[:, 2:], many[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = [np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=1) for b in (one, many)]
    found: Array = shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)
    return found
