"""Stage 2, compile: what held-out and golden samples can tell. Pure: receives the float model's answers to them, hands on why these could not tell a sound
compiled model from a damaged one, or tell less than their number seems to: agreement with what is wrong, or always the same, says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from edgefleet_shared import answers
from edgefleet_shared.contract import AcceptanceContract
from edgefleet_shared.segmentation import pixels

from edgefleet_controller.compile import quality
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source import lookalikes

Array = npt.NDArray[Any]
ENOUGH = 32  # labelled samples that tell chance from skill
NEAR_CHANCE = 1.5  # times what guessing gets
MOST_SCORE = 1.01  # of a box; a sigmoid's rounding apart, no share is more than the whole
FEWEST_BOXES = 8  # of fewer, as of fewer samples, half may change by chance
CROWDED = 100  # boxes in a picture, overlaps included, from which half of all places being boxes is no chance
REPEATED = 0.5  # of a split's pictures, above which its number says little of what they prove
MOST_LOOKED_AT = 512  # pictures of a split, evenly spread
IN_A_CORNER = 2.0  # pixels, which coordinates that are shares of a picture reach at most


def vacuous(references: dict[str, Array], version: ModelVersion) -> str:
    """Why the held-out samples can't tell a sound model from a damaged one, or nothing: agreement would be high whatever came out.

    Args:
        references: the float model's outputs for them.
    """
    n = len(next(iter(references.values())))
    name = version.outputs[0].name
    if version.output_kind != "detection":
        for spec in version.outputs:
            broken = n - int(np.isfinite(references[spec.name]).reshape(n, -1).all(axis=1).sum())
            if 2 * broken > n:
                return f"the float model's own output {spec.name!r} holds NaN or infinity for {broken} of {n} held-out samples, which nothing agrees with"
    if version.output_kind == "detection":
        above, places = answers.above_threshold(references, version.reading)
        if above > max(CROWDED * n, places / 2):
            return (
                f"the float model finds a box at {above // n} of {places // n} places of a held-out picture: is one of its classes the background "
                "(output.detection.background), are scores still to be made shares (output.detection.scores), or is the decoder another one?"
            )
        return _misread([box for found in answers.boxes(references, version.reading) for box in found], n, version)
    if version.output_kind == "segmentation":
        if _one_class(references, version):
            return f"the float model gives every pixel of all {n} held-out samples one and the same class"
        return ""
    if version.output_kind == "raw":
        return _told_apart(references, version)
    if len(set(_words(references, version))) == 1:
        return f"the float model gives all {n} held-out samples one and the same answer"
    if version.truth and version.output_kind == "classification":
        if counted := _counted_otherwise(answers.classes(references[name])[:, 0], version.truth):
            return counted
        right = quality.accuracy(references, references, version)["float_accuracy"]
        chance = 1 / references[name].shape[-1]
        if right.of >= ENOUGH and right.value <= NEAR_CHANCE * chance:
            return (
                f"the float model itself answers {right.count} of {right.of} labelled samples right, which is chance: is the colour "
                "order, the layout, the normalisation or the order of the labels another one?"
            )
    return ""


def untold_on_boards(references: dict[str, Array], version: ModelVersion, contract: AcceptanceContract) -> str:
    """Why the golden samples can't tell a board a sound model from a damaged one, or nothing.

    Args:
        references: the float model's outputs for them.
    """
    n = len(next(iter(references.values())))
    match contract.kind:
        case "detection" if not any(answers.boxes(references, version.reading)):
            what = "finds no box in any"
        case "text" if not any(version.lines(references[version.outputs[0].name])):
            what = "reads nothing in any"
        case "segmentation" if _one_class(references, version):
            what = "gives one and the same class to every pixel"
        case _:
            return ""
    return f"the float model {what} of the {n} golden samples: boards could tell it from no damaged one; give others (golden)"


def caution(split: str, references: dict[str, Array], pictures: Array | None, version: ModelVersion) -> str:
    """Why the samples of a split prove less than as many others would, or nothing.

    Args:
        references: the float model's outputs for them.
        pictures: they themselves, uint8 N x H x W x C; None where they are tensors, which may be alike and mean other things.
    """
    said, found = _words(references, version), list[str]()
    if len(set(said)) == 1 and len(said) > 1:
        found.append(f"the float model gives all {len(said)} one and the same answer, as a damaged one may")
    if pictures is not None:
        rows = np.unique(np.linspace(0, len(pictures) - 1, min(MOST_LOOKED_AT, len(pictures))).astype(int))
        likes = lookalikes.first_likes(pictures[rows])
        # One picture that is answered in two ways lies where a damaged model shows first.
        kinds = len({(like, said[row] if said else b"") for like, row in zip(likes, rows, strict=True)})
        if kinds < REPEATED * len(rows):
            of = "" if len(rows) == len(pictures) else f" looked at, of {len(pictures)},"
            found.append(f"{len(rows)} pictures{of} are {kinds} but for noise, and prove no more than {kinds} would")
    return f"{split} samples: {'; '.join(found)}" if found else ""


def _words(references: dict[str, Array], version: ModelVersion) -> list[bytes]:
    """The answer to each sample, of kinds that have one."""
    output = references[version.outputs[0].name]
    match version.output_kind:
        case "classification":
            return [row.tobytes() for row in answers.classes(output)]
        case "text":
            return [line.encode() for line in version.lines(output)]
        case "detection":
            cells = [size / lookalikes.GRID for size in version.reading.size]
            found = answers.boxes(references, version.reading)
            return [str(sorted((b.kind, b.top // cells[0], b.left // cells[1]) for b in one)).encode() for one in found]
        case _:
            return []


def _one_class(references: dict[str, Array], version: ModelVersion) -> bool:
    classes = [np.unique(pixels(references[spec.name], spec, version.masks)) for spec in version.outputs]
    return all(len(one) == 1 for one in classes)


def _counted_otherwise(said: Array, truth: tuple[str, ...]) -> str:
    """Whether the labels count from another number than the network's classes; of many classes neighbours are often alike, which is more than chance."""
    labels = np.asarray(truth, int)
    of = len(labels)
    right = {by: int(np.sum(said[:of] == labels + by)) for by in (0, -1, 1)}
    best = max(right, key=lambda by: right[by])
    if (
        of < ENOUGH
        or len(set(truth)) < 3
        or right[best] * 2 < of
        or quality.wilson(right[best], of)[0] <= quality.wilson(right[0], of)[1]
    ):
        return ""
    way = "more" if best > 0 else "less"
    return (
        f"the float model answers {right[0]} of {of} labelled samples right, and {right[best]} if each label counts one {way}: do they begin with another "
        "number than its classes, of which the first is 0, or has it a class for the background?"
    )


def _misread(boxes: list[answers.Box], n: int, version: ModelVersion) -> str:
    """Why a detector's boxes can't be what it means, or nothing: overlaps are the same in any unit, so that agreement would not tell."""
    assert version.detection is not None
    told, (height, width) = version.detection, version.reading.size
    if not boxes:
        return f"the float model finds no box in any of {n} held-out pictures at the threshold {told.threshold}"
    if len(boxes) < FEWEST_BOXES:
        return (
            f"all that the float model finds in {n} held-out pictures is {len(boxes)} of {FEWEST_BOXES} boxes that would tell it from a damaged "
            "one: hold out more pictures with something to find"
        )
    best = max(box.score for box in boxes)
    if best > MOST_SCORE and told.decoder != "boxes":  # whose scores are the network's own, in whatever unit
        return f"the float model's boxes have scores up to {best:.4g}, which are shares: is the decoder, or the order of the output's axes, another one?"
    if not told.relative and max(max(box.right, box.bottom) for box in boxes) <= IN_A_CORNER:
        return (
            f"all {len(boxes)} boxes of the float model lie within {IN_A_CORNER:.0f} pixels of the upper left corner: are they in shares of the "
            "picture (output.detection.relative)?"
        )
    centres = [((box.left + box.right) / 2, (box.top + box.bottom) / 2) for box in boxes]
    outside = sum(not (0 <= x <= width and 0 <= y <= height) for x, y in centres)
    if told.relative and 2 * outside > len(boxes):
        return (
            f"{outside} of {len(boxes)} boxes of the float model lie outside the picture: are they in pixels, not in shares of it "
            "(output.detection.relative)?"
        )
    return ""


def _told_apart(references: dict[str, Array], version: ModelVersion) -> str:
    """Why a tolerance says nothing, or nothing: that of an output in which the float model's answer to any sample passes for any other's."""
    for spec in version.outputs:
        values = references[spec.name].reshape(len(references[spec.name]), -1)
        spread = values.max(axis=0) - values.min(axis=0)
        # What never changes may still be held against its tolerance: corners of a grid, say.
        if spread.any() and (spread <= quality.room(values, spec.name, version).min(axis=0)).all():
            return (
                f"the tolerance of output {spec.name!r} is wider than all that it answers: over {len(values)} held-out samples its values differ by at "
                f"most {spread.max():.4g}, so that the answer to any of them would pass for that to any other; give it one of its own under acceptance.outputs"
            )
    return ""
