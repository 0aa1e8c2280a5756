"""Stage 1, source: what outputs mean. Receives a manifest's output section and the network's tensors, hands on decodings that were checked against them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from edgefleet_shared import segmentation
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.detection import misfit
from edgefleet_shared.errors import DataError, ModelError
from edgefleet_shared.reading import BoxDecoding, MaskReading, PriorBoxes

from edgefleet_controller.manifests import Output, Priors
from edgefleet_controller.source import sample_sets

_ONE_PRIOR = "one prior a line: x and y of its centre, width, height, in shares of the input's sides"


def labels(output: Output, base: Path, outputs: tuple[TensorSpec, ...], origin: str) -> tuple[str, ...]:
    """The labels in the order of the outputs, read and checked against them."""
    if output.kind == "classification" and (len(outputs) != 1 or len(outputs[0].shape) < 2):
        raise ModelError(
            f"{origin} has the outputs {', '.join(f'{o.name} {o.shape}' for o in outputs)}; a classifier has one, batch x classes",
            hint="use output kind raw",
        )
    if output.kind == "classification" and outputs[0].shape[-1] == 1:
        raise ModelError(
            f"{origin}: output {outputs[0].name} {outputs[0].shape} has one class, which is always the largest",
            hint="use output kind raw, with as much tolerance as the application's threshold has room",
        )
    if output.labels is None:
        return ()
    path = base / output.labels
    found = tuple(line.strip() for line in sample_sets.text("labels", path).splitlines() if line.strip())
    if output.kind == "classification" and len(found) != outputs[0].shape[-1]:
        raise DataError(f"{path} has {len(found)} labels, {origin} has {outputs[0].shape[-1]} classes")
    return found


def detection(
    output: Output,
    base: Path,
    input_spec: TensorSpec,
    size: tuple[int, int] | None,
    outputs: tuple[TensorSpec, ...],
    origin: str,
) -> BoxDecoding | None:
    """The decoding of boxes, checked against inputs and outputs. ``size``: rows and columns of the input, None where it is no picture."""
    given = output.detection
    if given is None:
        return None
    if size is None:
        raise ModelError(f"{origin}: input {input_spec.name} {input_spec.shape} is no picture to find boxes in")
    told = BoxDecoding(
        decoder=given.decoder, anchors=tuple((a[0], a[1]) for a in given.anchors), masks=tuple(tuple(mask) for mask in given.masks),
        strides=tuple(given.strides) if given.decoder == "yolox" else (), relative=given.relative,
        scores=given.scores, background=given.background, priors=_priors(given.priors, base),
        threshold=given.threshold, nms_iou=given.nms_iou, match_iou=given.match_iou,
    )  # fmt: skip
    if expected := misfit([o.shape for o in outputs], told, size):
        shapes = ", ".join(f"{o.name} {o.shape}" for o in outputs)
        raise ModelError(f"{origin} has the outputs {shapes}; decoder {told.decoder} takes {expected}")
    return told


def _priors(given: Priors | None, base: Path) -> PriorBoxes | None:
    if given is None:
        return None
    path = base / given.path
    lines = [line.split() for line in sample_sets.text("priors", path).replace(",", " ").splitlines()]
    try:
        rows = [[float(word) for word in line] for line in lines if line]
    except ValueError as exc:
        raise DataError(f"can't read the priors {path}: {exc}", hint=_ONE_PRIOR) from exc
    other = next((number for number, row in enumerate(rows) if len(row) != 4), None)
    if not rows or other is not None:
        raise DataError(f"{path}: prior {(other or 0) + 1} has no four numbers", hint=_ONE_PRIOR)
    boxes = np.array(rows, np.float32)
    unlikely = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] <= 0).any(axis=1)
    if unlikely.any():
        line = int(np.argmax(unlikely))
        raise DataError(f"{path}: prior {line + 1} is {boxes[line].tolist()}, which is no box", hint=_ONE_PRIOR)
    if np.median(boxes) > 1:
        raise DataError(f"{path} has priors up to {np.max(boxes):g}: are they in pixels?", hint=_ONE_PRIOR)
    return PriorBoxes(
        boxes=boxes.astype("<f4").tobytes(), variances=tuple(given.variances), order=given.order, sides=given.sides
    )


def masks(output: Output, size: tuple[int, int] | None, outputs: tuple[TensorSpec, ...], origin: str) -> MaskReading:
    """How masks are read, checked against inputs and outputs."""
    told = MaskReading() if output.segmentation is None else MaskReading(**output.segmentation.model_dump())
    if output.kind == "segmentation" and (unfit := segmentation.misfit(outputs, told, size or (-1, -1))):
        raise ModelError(
            f"{origin} as a segmentation: {unfit}", hint="use output kind raw for what is no class of a pixel"
        )
    return told


def characters(output: Output, base: Path, outputs: tuple[TensorSpec, ...], origin: str) -> tuple[str, ...]:
    """What a text output's classes stand for, without the blank."""
    text = output.text
    if text is None:
        return ()
    path = base / text.characters
    # Not splitlines: it also splits at characters that an alphabet may hold.
    found = [line.rstrip("\r") for line in sample_sets.text("characters", path).rstrip("\n").split("\n")]
    found += [" "] if text.space else []
    classes = outputs[0].shape[-1]
    if len(outputs) != 1 or len(outputs[0].shape) != 3 or len(found) + 1 != classes:
        shapes = ", ".join(f"{o.name} {o.shape}" for o in outputs)
        raise DataError(
            f"{path} has {len(found)} characters, space included; with the blank they don't fit {origin}'s outputs {shapes}"
        )
    return tuple(found)
