"""Stage 2, compile: the input contract, held against labels. Receives a version with labelled pictures, hands on why its description can't be right.

A network that is fed another colour order or scale than it was trained with still answers, worse. Where held-out pictures are labelled, the float
network answers some of them as the manifest describes its input, and in the other ways that people use; when one of these is right clearly more
often, the manifest is wrong, and everything judged by it would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from edgefleet_shared import answers, golden
from edgefleet_shared.contract import PictureEncoding
from safetensors.numpy import load_file

from edgefleet_controller.compile import quality, writing
from edgefleet_controller.compile.cache import content_key
from edgefleet_controller.compile.shown import pictures_of
from edgefleet_controller.compile.steps import Steps
from edgefleet_controller.model_version import ModelVersion

ENOUGH = 32  # labelled pictures that can tell two descriptions apart
MOST = 64
# How networks are commonly fed, per channel in the order of RGB: mean and spread of the grey levels.
SCALES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "grey levels as they are": ((0.0,), (1.0,)),
    "x / 255": ((0.0,), (255.0,)),
    "(x - 127.5) / 127.5": ((127.5,), (127.5,)),
    "ImageNet's mean and spread": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def alternatives(declared: PictureEncoding) -> dict[str, PictureEncoding]:
    """Other descriptions of the same input, by how they are told; those that change two things come last."""
    change = msgspec.structs.replace
    found, both = dict[str, PictureEncoding](), dict[str, PictureEncoding]()
    other = {"RGB": "BGR", "BGR": "RGB"}.get(declared.colour)
    if other is not None:
        found[f"colour {other}"] = change(declared, colour=other)
    for told, (mean, std) in SCALES.items():
        channels = 1 if declared.colour == "GREY" else 3
        if len(mean) > channels or (mean, std) == (declared.mean, declared.std):
            continue
        turned = slice(None, None, -1 if declared.colour == "BGR" else 1)
        scaled = change(declared, mean=mean[turned], std=std[turned])
        found[told] = scaled
        if other is not None:
            both[f"colour {other} and {told}"] = change(
                scaled, colour=other, mean=mean[turned][::-1], std=std[turned][::-1]
            )
    return found | both


def better_description(steps: Steps, version: ModelVersion) -> str:
    """Which other description of the input is clearly more often right, in words; nothing where none is, or where labels are too few to tell."""
    count = min(MOST, len(version.truth))
    if version.output_kind != "classification" or version.encoding is None or count < ENOUGH:
        return ""
    array = pictures_of(version, version.holdout, steps.layout)
    if array is None:
        return ""
    name = version.inputs[0].name
    ways = {"": version.encoding, **alternatives(version.encoding)}

    def fill(staged: Path) -> None:
        samples = steps.work / "described.safetensors"
        encoded = [golden.encode_pictures(array[:count], encoding) for encoding in ways.values()]
        writing.write_tensors({name: np.concatenate(encoded)}, samples)
        steps.answer(steps.simplified(), samples, count * len(ways), staged / "answers.safetensors")

    key = content_key(
        "described", steps.prepared_key, version.truth[:count], [msgspec.to_builtins(w) for w in ways.values()]
    )
    outputs = load_file(steps.once("described", key, fill) / "answers.safetensors")[version.outputs[0].name]
    right = [_right(part, version.truth[:count]) for part in np.split(outputs, len(ways))]
    better = clearly_better(right, count)
    if better is None:
        return ""
    return (
        f"the float model answers {right[0]} of {count} labelled held-out pictures right as the manifest describes its input, and {right[better]} "
        f"with {list(ways)[better]}"
    )


def clearly_better(right: Sequence[int], count: int) -> int | None:
    """Which way is clearly more often right than the first, the declared one; None where none is. Where several can't be told apart, the one that changes
    least, which comes first.

    Args:
        right: of ``count`` samples, by way; ways that change more come later.
    """
    low, high = zip(*(quality.wilson(one, count) for one in right), strict=True)
    best = max(range(len(right)), key=lambda way: right[way])
    if low[best] <= high[0]:
        return None
    return next(way for way in range(len(right)) if low[way] > high[0] and high[way] >= low[best])


def _right(outputs: npt.NDArray[np.float32], truth: tuple[str, ...]) -> int:
    said = answers.classes(outputs)[:, 0]
    return sum(str(answer) == right for answer, right in zip(said, truth, strict=True))
