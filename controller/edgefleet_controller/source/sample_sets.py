"""Stage 1, source: the sample sets of a Model manifest. Receives its entries, hands on samples and their labels.

An entry is a folder of pictures, a safetensors file or a Python function; reading the first two is :mod:`.pictures`, running the last
:mod:`.samples_entry`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgefleet_shared.contract import PictureEncoding, TensorSpec
from edgefleet_shared.errors import DataError

from edgefleet_controller.compile.workplace import work_folder
from edgefleet_controller.manifests import Holdout, PictureInput, Pictures, Pruning, Training
from edgefleet_controller.source import pictures, samples_entry

TEXT = "utf-8-sig"  # of labels and characters: editors of Windows put a mark before the first one
MIN_TRAINING = 64  # samples below which a pruned network is tuned to them and to nothing else

Progress = Callable[[str, int, int], None]  # (what is being done, how many done, of how many)


def text(what: str, path: Path) -> str:
    """A text file that a manifest names.

    Raises:
        DataError: it can't be read.
    """
    try:
        return path.read_text(encoding=TEXT)
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"can't read the {what} {path}: {exc}") from exc


def read(
    split: str,
    source: Pictures,
    base: Path,
    picture: tuple[PictureInput, TensorSpec] | None,
    inputs: tuple[TensorSpec, ...],
    progress: Progress,
) -> pictures.Samples:
    """The samples of one split, from wherever its entry says.

    Args:
        picture: the picture input with its tensor; None where inputs are plain tensors.

    Raises:
        DataError: they can't be had, or mean nothing.
    """
    size = None
    if picture is not None:
        given, tensor = picture
        height, width = tensor.shape[2:4] if given.layout == "NCHW" else tensor.shape[1:3]
        size = (height, width, 1 if given.colour == "GREY" else 3)
    if source.entry is not None:
        progress(f"running {source.entry} for {split} samples", 0, 1)
        with work_folder("samples") as work:
            written = work / "samples.safetensors"
            samples_entry.write(split, base, source.entry, source.count, written)
            return pictures.read_tensors(split, written, inputs, source.count, pictures=size, origin=source.entry)
    path = base / (source.path or "")
    if path.suffix == ".safetensors":
        return pictures.read_tensors(split, path, inputs, source.count, pictures=size)
    if picture is None or size is None:
        raise DataError(
            f"{split}: {path} is a folder of pictures but the manifest describes no picture input",
            hint="describe it under spec.inputs, or give a .safetensors file",
        )
    return pictures.read_folder(
        split, path, height=size[0], width=size[1], grey=given.colour == "GREY", fit=pictures.Fit(given.fit, given.resize, given.fill),
        count=source.count, input_name=tensor.name, progress=lambda done, total: progress(f"reading {split} pictures", done, total),
    )  # fmt: skip


def truth(
    samples: Holdout | Training,
    kind: str,
    base: Path,
    labels: tuple[str, ...],
    outputs: tuple[TensorSpec, ...],
    count: int,
) -> tuple[str, ...]:
    """The right answers of labelled samples; classes by number."""
    if samples.truth is None:
        return ()
    path = base / samples.truth
    lines = [line.rstrip("\r") for line in text("truth", path).rstrip("\n").split("\n")]
    if len(lines) < count or (samples.count is None and len(lines) != count):
        raise DataError(f"{path} has {len(lines)} lines, there are {count} samples")
    if kind == "text":
        return tuple(lines[:count])
    classes, numbers = outputs[0].shape[-1], {label: str(i) for i, label in enumerate(labels)}
    for number, line in enumerate(lines[:count], 1):
        if labels.count(line.strip()) > 1:
            named = " and ".join(str(i) for i, label in enumerate(labels) if label == line.strip())
            raise DataError(
                f"{path}, line {number}: {line.strip()!r} names the classes {named}",
                hint="give the class by its number",
            )
    found = tuple(numbers.get(line.strip(), line.strip()) for line in lines[:count])
    for number, answer in enumerate(found, 1):
        if not answer.isdecimal() or int(answer) >= classes:
            raise DataError(f"{path}, line {number}: {answer!r} is no label and no number from 0 to {classes - 1}")
    return tuple(str(int(answer)) for answer in found)


def training(
    prune: Pruning | None, kind: str, base: Path, picture: tuple[PictureInput, TensorSpec] | None, inputs: tuple[TensorSpec, ...],
    labels: tuple[str, ...], outputs: tuple[TensorSpec, ...], splits: list[pictures.Samples], progress: Progress,
) -> tuple[pictures.Samples, tuple[str, ...]] | None:  # fmt: skip
    """What a pruned network is tuned on, with its labels; None where that is the calibration samples, or nothing is pruned.

    Calibration samples may be among them, held-out and golden ones may not: they judge.
    """
    if prune is None:
        return None
    calibration, holdout, golden = splits
    given = prune.training
    samples = calibration if given is None else read("training", given, base, picture, inputs, progress)
    if len(samples) < MIN_TRAINING:
        raise DataError(
            f"{samples.split}: {len(samples)} samples, pruning needs at least {MIN_TRAINING} to tune and judge the network with",
            hint="name more under spec.prune.training, or leave spec.prune away",
        )
    if given is None:
        return None
    pictures.keep_apart([samples, holdout, golden], encoding(picture))
    return samples, truth(given, kind, base, labels, outputs, len(samples))


def encoding(picture: tuple[PictureInput, TensorSpec] | None) -> PictureEncoding | None:
    """How pictures become the input; None where inputs are plain tensors."""
    if picture is None:
        return None
    given, _ = picture
    return PictureEncoding(mean=tuple(given.mean), std=tuple(given.std), layout=given.layout, colour=given.colour)
