"""Stage 1, source: calibration, held-out and golden data. Receives folders of pictures or tensor files, hands on arrays.

Pictures become uint8, N x H x W x C, as the network will see them: shortest side resized, centre cropped, RGB (or grey).
Tensor files are safetensors with one tensor per input, first axis the samples: as the network takes it, or uint8 pictures. Whatever would make a calibration
meaningless without anybody noticing is an error here: too few, unreadable, too small, blank, all the same, not finite.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from edgefleet_shared.contract import PictureEncoding, TensorSpec
from edgefleet_shared.errors import DataError
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgefleet_controller.source import lookalikes

Array = npt.NDArray[Any]
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
# Pictures too, as cameras, telephones and programs write them, that nothing here reads: to pass them by would shift the labels of those behind.
UNREAD = {".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
# What a file with one of these suffixes may hold. Nothing else is tried: Pillow hands PostScript on to a program, and knows dozens of kinds that no
# camera writes, each a parser that a hostile file could break.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "PPM", "TIFF", "GIF")
TIFF_KIND = 254  # the tag NewSubfileType, whose lowest bit is set on a smaller copy of another page
NEARLY_WHOLE = 0.02  # of a grey level: what rounding leaves of one that was encoded
# numpy's names of what inputs are made of.
TYPES = {
    "FP32": "float32", "FP16": "float16", "FP64": "float64", "UINT8": "uint8", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
SAMPLE = {False: "picture", True: "sample"}  # by whether inputs are plain tensors
ONE_SPLIT = "each may be in one of calibration, holdout and golden only, and of training in calibration only"
HEADER_LENGTH_BYTES, MAX_HEADER_BYTES = 8, 16 * 1024**2  # of a safetensors file
MIN_COUNT = 8  # fewer pictures than this can't calibrate, nor tell a damaged model from a sound one


class Fit(NamedTuple):
    """How a picture gets the input's size (see the Model manifest's ``inputs``): ``how``, the shortest side in pixels before a crop, and
    the grey level around a letterbox."""

    how: str = "crop"
    resize: int | None = None
    fill: int = 128


class Samples:
    """One split: arrays by input name, first axis N, and a content hash per sample that tells splits apart."""

    def __init__(self, split: str, origin: str, inputs: dict[str, Array], names: Sequence[str]) -> None:
        self.split = split
        self.origin = origin
        self.inputs = inputs
        self.names = list(names)
        self.hashes = [
            hashlib.sha256(b"".join(inputs[key][i].tobytes() for key in sorted(inputs))).digest()
            for i in range(len(self.names))
        ]
        if len(self.names) > 1 and len(set(self.hashes)) == 1:
            raise DataError(f"{split}: all {len(self.names)} samples in {origin} are the same")
        different = len(set(self.hashes))
        if different < min(MIN_COUNT, len(self.names)):
            raise DataError(
                f"{split}: {len(self.names)} samples in {origin}, of which {different} are different ones; {MIN_COUNT} are needed"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def are_pictures(self) -> bool:
        """Whether they are pictures as they were taken, uint8, N x H x W x C, not what is made of them for the network."""
        return (
            all(array.dtype == np.uint8 and array.ndim == 4 for array in self.inputs.values()) and len(self.inputs) == 1
        )


def read_folder(
    split: str,
    folder: Path,
    *,
    height: int,
    width: int,
    grey: bool,
    fit: Fit,
    count: int | None,
    input_name: str,
    progress: Callable[[int, int], None],
) -> Samples:
    """Read a folder's pictures in order of name.

    Args:
        height, width: of the network's input, in pixels.
        count: how many; default: all.

    Raises:
        DataError: the folder is missing or has too few; a picture can't be read, is too small, or is blank.
    """
    if folder.is_file():
        raise DataError(
            f"{split}: {folder} is a file; samples are a folder of pictures, or a .safetensors file",
            hint="unpack an archive first",
        )
    if not folder.is_dir():
        raise DataError(f"{split}: no folder {folder}", hint="paths are relative to the manifest's file")
    shown = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    unread = [f.name for f in shown if f.suffix.lower() in UNREAD]
    if unread:
        raise DataError(
            f"{split}: {folder} has {len(unread)} pictures of a kind that is not read here, such as {unread[0]}",
            hint=f"save them as one of {', '.join(sorted(SUFFIXES))}, or move them away",
        )
    files = [f for f in shown if f.suffix.lower() in SUFFIXES]
    below = [f.name for f in shown if f.is_dir() and _holds_pictures(f)]
    wanted = len(files) if count is None else count
    too_few = len(files) < max(wanted, MIN_COUNT)
    if too_few or below:
        needed = f", {max(wanted, MIN_COUNT)} are needed" if too_few else ""
        beside = f", beside those in folders of its own, such as {below[0]}, which are not looked into" if below else ""
        raise DataError(
            f"{split}: {folder} has {len(files)} pictures{needed}{beside}",
            hint="move them into one folder, or away; where a folder's name is their label, write it into the file that truth names"
            if below
            else "",
        )
    arrays = []
    for done, file in enumerate(files[:wanted]):
        progress(done, wanted)
        arrays.append(_read(split, file, height, width, grey, fit))
    progress(wanted, wanted)
    return Samples(split, str(folder), {input_name: np.stack(arrays)}, [f.name for f in files[:wanted]])


def _told_length(file: Path) -> int:
    """How long a safetensors file is by its own header; 0 where that can't be read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            return 0
        try:
            header = json.loads(stream.read(length))
            ends = [int(told["data_offsets"][1]) for name, told in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):  # any JSON at all
            return 0
    return HEADER_LENGTH_BYTES + length + max(ends, default=0)


def read_tensors(
    split: str,
    file: Path,
    inputs: Sequence[TensorSpec],
    count: int | None,
    *,
    pictures: tuple[int, int, int] | None = None,
    origin: str = "",
) -> Samples:
    """Read a safetensors file: one tensor per input, first axis the samples; as the network takes them, or uint8 pictures.

    Args:
        pictures: height, width and channels of a picture, where the network takes one.
        origin: what to call the file in errors; default: its path.

    Raises:
        DataError: missing, not safetensors, other names, shapes or types than the network's, not finite, constant, too few.
    """
    if not file.is_file():
        raise DataError(f"{split}: no file {file}", hint="paths are relative to the manifest's file")
    origin = origin or str(file)
    try:
        found = load_file(file)
    except (SafetensorError, ValueError, KeyError, OSError) as exc:
        if isinstance(exc, SafetensorError) and (told := _told_length(file)) > (there := file.stat().st_size):
            raise DataError(f"{split}: {origin} is cut off: {there} of {told} bytes are there") from exc
        raise DataError(f"{split}: {origin} is not a safetensors file: {exc}") from exc
    wanted_names = sorted(spec.name for spec in inputs)
    if sorted(found) != wanted_names:
        raise DataError(
            f"{split}: {origin} holds {', '.join(sorted(found)) or 'nothing'}; the network's inputs are {', '.join(wanted_names)}"
        )
    counts = {len(array) if array.ndim else 0 for array in found.values()}
    available = min(counts)
    wanted = available if count is None else count
    if len(counts) != 1 or available < max(wanted, MIN_COUNT):
        raise DataError(f"{split}: {origin} has {available} samples, {max(wanted, MIN_COUNT)} are needed")
    for spec in inputs:
        beside = len(inputs) > 1 and spec.datatype not in ("FP32", "FP16", "FP64")
        _check(f"{split}: {spec.name} in {origin}", found[spec.name][:wanted], spec, pictures, beside=beside)
    return Samples(
        split,
        origin,
        {k: np.ascontiguousarray(a[:wanted]) for k, a in found.items()},
        [f"sample {i}" for i in range(wanted)],
    )


def _check(where: str, array: Array, spec: TensorSpec, pictures: tuple[int, int, int] | None, *, beside: bool) -> None:
    """Refuse what means nothing. Args: ``beside``: whole numbers next to other inputs, such as a mode, which may be the same in all samples."""
    expected = TYPES[spec.datatype]
    if array.dtype == np.uint8 and pictures is not None:
        if array.shape[1:] != pictures:
            raise DataError(
                f"{where} has shape {array.shape}, expected N x {' x '.join(map(str, pictures))} (uint8 pictures)"
            )
    elif array.dtype != expected:
        also = ", or uint8 pictures" if pictures is not None else ""
        raise DataError(f"{where} is {array.dtype}, expected {expected}{also}")
    elif tuple(array.shape[1:]) != spec.shape[1:]:
        raise DataError(f"{where} has shape {array.shape}, expected {' x '.join(map(str, ('N', *spec.shape[1:])))}")
    elif not np.isfinite(array).all():
        raise DataError(f"{where} holds values that are not finite")
    flat = array.reshape(len(array), -1)
    if np.min(array) == np.max(array) and not beside:
        raise DataError(f"{where} is constant, {float(array.min())} everywhere")
    blank = np.flatnonzero(flat.min(axis=1) == flat.max(axis=1))
    if len(blank) and pictures is not None:
        raise DataError(f"{where}: sample {blank[0]} is blank: every value is {float(flat[blank[0], 0])}")


def keep_apart(splits: Sequence[Samples], encoding: PictureEncoding | None = None) -> None:
    """Refuse a sample that is in two splits: a model would be judged by what it was tuned on.

    Args:
        encoding: how pictures become inputs: one that is a picture in one split and already encoded in another is found too.

    Raises:
        DataError: names both.
    """
    owner: dict[bytes, tuple[Samples, str]] = {}
    for samples in splits:
        hashes = samples.hashes if encoding is None else _hashes_as_pictures(samples, encoding)
        for name, digest in zip(samples.names, hashes, strict=True):
            first, first_name = owner.setdefault(digest, (samples, name))
            if first is not samples:
                raise DataError(
                    f"{name} ({samples.split}) is the same {SAMPLE[encoding is None]} as {first_name} ({first.split})",
                    hint=ONE_SPLIT,
                )
    shown = [samples for samples in splits if samples.are_pictures]
    if len(shown) > 1 and (found := lookalikes.across([next(iter(samples.inputs.values())) for samples in shown])):
        own, other = shown[found.later], shown[found.earlier]
        raise DataError(
            f"{found.shared} of {len(own)} pictures of {own.split} are in {other.split} too but for their encoding or size: "
            f"{own.names[found.one]} is {other.names[found.like]}",
            hint=ONE_SPLIT,
        )


def _hashes_as_pictures(samples: Samples, encoding: PictureEncoding) -> list[bytes]:
    """Content hashes, of encoded samples that were pictures those of the pictures."""
    ((_, array),) = samples.inputs.items()
    if array.dtype == np.uint8 or array.ndim != 4:
        return samples.hashes
    found = []
    for sample, known in zip(array, samples.hashes, strict=True):
        x = sample.transpose(1, 2, 0) if encoding.layout == "NCHW" else sample
        x = x * np.asarray(encoding.std, np.float32) + np.asarray(encoding.mean, np.float32)
        x = x[..., ::-1] if encoding.colour == "BGR" else x
        whole = np.round(x)
        # Whole numbers from 0 to 255 throughout are no accident.
        picture = whole.min() >= 0 and whole.max() <= 255 and np.abs(x - whole).max() < NEARLY_WHOLE
        found.append(
            hashlib.sha256(np.ascontiguousarray(whole.astype(np.uint8)).tobytes()).digest() if picture else known
        )
    return found


def _holds_pictures(folder: Path) -> bool:
    """Whether a folder holds pictures itself; one that can't be looked into, as ``lost+found``, holds none of the operator's."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return False
    return any(f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file() for f in folder.iterdir())


def _read(split: str, file: Path, height: int, width: int, grey: bool, fit: Fit) -> Array:
    if not file.is_file():
        raise DataError(f"{split}: can't read the picture {file}: {file.name} is no file, nor a link to one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                if deep := _deep(opened):
                    raise DataError(
                        f"{split}: {file} has 16 or more bits per value ({deep}), which would become white, or black where few of them are used",
                        hint="save it, scaled as the application does, as pictures of 8 bits, or give a .safetensors file",
                    )
                if (held := _pictures_in(opened)) > 1:
                    raise DataError(
                        f"{split}: {file} holds {held} pictures (frames or pages), of which only the first would be read",
                        hint="save each that the application sees as a file of its own",
                    )
                picture = ImageOps.exif_transpose(opened).convert("L" if grey else "RGB")
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        TypeError,  # of pages behind the first, such as one without a size
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as exc:
        raise DataError(f"{split}: can't read the picture {file}: {exc}") from exc
    array = np.asarray(_fitted(picture, height, width, fit, f"{split}: {file}"), np.uint8)
    if np.min(array) == np.max(array):
        raise DataError(f"{split}: {file} is blank: every pixel is {int(array.flat[0])}")
    return array[..., None] if grey else array


def _pictures_in(opened: Image.Image) -> int:
    """How many pictures a file holds: frames of an animation, pages of a TIFF but for smaller copies of others. What stands behind a JPEG (MPO) is
    a telephone's preview of it, its other eye or its map of brightness."""
    count: int = getattr(opened, "n_frames", 1)
    if count == 1 or opened.format == "MPO":
        return 1
    if not isinstance(opened, TiffImagePlugin.TiffImageFile):
        return count
    own = 0
    for page in range(count):
        opened.seek(page)
        own += not opened.tag_v2.get(TIFF_KIND, 0) & 1
    opened.seek(0)
    return own


def _deep(opened: Image.Image) -> str:
    """The form of values of more than 8 bits; nothing where they have no more. Colours of 16 bits open as if they had 8, cut down to their upper halves."""
    if opened.mode.startswith(("I", "F")):
        return opened.mode
    forms = [
        tile.args if isinstance(tile.args, str) else tile.args[0] for tile in getattr(opened, "tile", []) if tile.args
    ]
    return next((str(form) for form in forms if ";16" in str(form)), "")


def _fitted(picture: Image.Image, height: int, width: int, fit: Fit, where: str) -> Image.Image:
    """The picture in the input's size. Crops need pixels enough; whole pictures are enlarged where they are small."""
    if fit.how == "stretch":
        return picture.resize((width, height), Image.Resampling.BILINEAR)
    if fit.how in ("letterbox", "left"):
        scale = min(width / picture.width, height / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        ground = Image.new(picture.mode, (width, height), fit.fill if picture.mode == "L" else (fit.fill,) * 3)
        corner = ((width - size[0]) // 2, (height - size[1]) // 2) if fit.how == "letterbox" else (0, 0)
        ground.paste(picture.resize(size, Image.Resampling.BILINEAR), corner)
        return ground
    if picture.width < width or picture.height < height:
        raise DataError(
            f"{where} has {picture.width} x {picture.height} pixels, the network takes {width} x {height}",
            hint="take pictures at least as large as the network's input",
        )
    side = fit.resize or round(max(height, width) / 0.875)  # as ImageNet networks are evaluated
    scale = max(side / min(picture.size), width / picture.width, height / picture.height)
    size = (max(round(picture.width * scale), width), max(round(picture.height * scale), height))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
