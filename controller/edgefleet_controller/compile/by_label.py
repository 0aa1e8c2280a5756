"""Stage 2, compile: quality label by label. Pure: receives outputs of both models, hands on how much of each label's answers is kept.

One share over all answers does not miss what is rare: of a thousand parts ten have the defect that the network is there to find, and a compiled model that
finds none of them agrees on 99 in a hundred. A label is looked at where it is given often enough to tell that from chance. The others are looked at together: a
model that gives everything one answer would pass where nothing else is given often.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from edgefleet_shared import answers, segmentation

from edgefleet_controller.compile.port import Share
from edgefleet_controller.model_version import ModelVersion

Array = npt.NDArray[Any]
ENOUGH = 8  # answers, boxes, or pictures with more than a speck of it: of fewer, chance may take half
VANISHED = 3  # rare ones, of which not one is kept, are no chance
TOGETHER = "rare ones together"
MOST_TOLD = 20  # labels, the worst


class Kept(NamedTuple):
    """Answers with one label: given by both models, by the compiled one, by the float one. ``often``: whether that tells anything."""

    both: int
    compiled: int
    float: int
    often: bool

    @property
    def share(self) -> Share:
        """The lower of what is kept of the float model's and what is right of the compiled one's; without an interval: answers in one picture hang together."""
        of = max(self.compiled, self.float)
        return Share(self.both / of, 0.0, 1.0, self.both, of)


def kept(outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion) -> dict[str, Share]:
    """The worst kept of the labels that are given often, by name, the worst first. Lines of text and plain numbers have none."""
    match version.output_kind:
        case "classification":
            found = _of_classes(outputs, references, version)
        case "detection":
            found = _of_boxes(outputs, references, version)
        case "segmentation":
            found = _of_pixels(outputs, references, version)
        case _:
            return {}
    labels = dict(found)
    shares = {label: one.share for label, one in labels.items() if one.often}
    if version.output_kind != "segmentation":  # whose pixels hang together: what is in few pictures is judged by these
        rare = _together([one for one in labels.values() if not one.often])
        shares |= {TOGETHER: rare.share} if rare.often else {}
    return dict(sorted(shares.items(), key=lambda pair: (pair[1].value, pair[0]))[:MOST_TOLD])


def _together(rare: Sequence[Kept]) -> Kept:
    """Labels that are given too seldom to be looked at one by one."""
    both, compiled, real = (sum(getattr(one, side) for one in rare) for side in ("both", "compiled", "float"))
    return Kept(both, compiled, real, max(compiled, real) >= ENOUGH or (not both and real >= VANISHED))


def _of_classes(
    outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion
) -> Iterator[tuple[str, Kept]]:
    have, want = (answers.classes(side[version.outputs[0].name]) for side in (outputs, references))
    for kind in np.union1d(have, want):
        if kind >= 0:  # not a number
            mine, theirs = have == kind, want == kind
            both, compiled, real = (int(one.sum()) for one in (mine & theirs, mine, theirs))
            yield version.label(int(kind)), Kept(both, compiled, real, max(compiled, real) >= ENOUGH)


def _of_boxes(
    outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion
) -> Iterator[tuple[str, Kept]]:
    assert version.detection is not None
    least, sides = version.detection.match_iou, [answers.boxes(side, version.reading) for side in (outputs, references)]
    for kind in sorted({box.kind for side in sides for found in side for box in found}):
        have, want = ([[box for box in found if box.kind == kind] for found in side] for side in sides)
        both = sum(answers.matched(a, b, least) for a, b in zip(have, want, strict=True))
        compiled, real = sum(map(len, have)), sum(map(len, want))
        yield version.label(kind), Kept(both, compiled, real, max(compiled, real) >= ENOUGH)


def _of_pixels(
    outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion
) -> Iterator[tuple[str, Kept]]:
    for spec in version.outputs:
        have, want = (segmentation.pixels(side[spec.name], spec, version.masks) for side in (outputs, references))
        kinds = np.union1d(have, want)
        both = _counts([a[a == b] for a, b in zip(have, want, strict=True)], kinds)
        mine, theirs = _counts(have, kinds), _counts(want, kinds)
        often = (np.maximum(mine, theirs) > answers.SPECK_PIXELS).sum(axis=0) >= ENOUGH
        for place, kind in enumerate(kinds):
            if kind == segmentation.NO_CLASS:
                continue
            label = version.label(int(kind))
            same, compiled, real = (int(one[:, place].sum()) for one in (both, mine, theirs))
            title = f"{spec.name}, {label}" if len(version.outputs) > 1 else label
            yield title, Kept(same, compiled, real, bool(often[place]))


def _counts(pictures: Iterable[Array], kinds: Array) -> Array:
    """How many pixels of each kind each picture has: pictures x kinds."""
    return np.array([np.bincount(np.searchsorted(kinds, one), minlength=len(kinds)) for one in pictures])
