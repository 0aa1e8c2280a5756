"""Real photos that a user may have: receives a cache folder, hands on disjoint folders of pictures. For the demo and benchmarks.

They come from public packages (scikit-image's and foolbox' sample data from PyPI; opencv-doc and tuxpaint-stamps-default
from Debian, where this machine has apt) and are never part of edgefleet: their licences differ (BSD, ImageNet's, GPL).
A photo, and everything that looks like its sibling, goes into one split only; where a split needs more pictures than it
has photos, mirrored crops of its own photos fill it.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from edgefleet_shared.errors import EnvironmentProblem
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError

from edgefleet_controller import packages

SHORTEST_SIDE = 288  # pixels: leaves room around the 224 x 224 crop that networks of this kind take
MIN_CONTRAST = 12.0  # standard deviation of grey levels: below it the picture is all but blank
JPEG_QUALITY = 95
CROPS = 4  # whole picture, then three mirrored corners

# What a network for everyday things was trained on: no textures, test charts, text or medical pictures.
_OPENCV = re.compile(
    r"/examples/(data|hfs/data|alphamat/input_images|dnn_superres)/"
    r"(HappyFish|aero1|aero3|aloeL|apple|baboon|basketball1|building|butterfly|cards|chicky_512|ela_original|fruits|home"
    r"|leuvenA|licenseplate_motion|messi5|orange|rubberwhale1|smarties|squirrel_cls|stuff|00[0-2]|plant)\.(jpg|png)$"
)
_SKIMAGE = re.compile(
    r"skimage/data/(astronaut|camera|chelsea|clock_motion|coffee|horse|motorcycle_left|rocket)\.(png|jpg)$"
)
_FOOLBOX = re.compile(r"foolbox/data/imagenet_\d\d_\d+\.jpg$")
_STAMPS = re.compile(r"/stamps/(animals|food|vehicles|household)/(?!.*(cartoon|plastic|toys)/).*\.png$")
_FOOLBOX_SHA256 = "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"
_PACKAGES = (
    (("scikit-image", "0.25.2", None, _SKIMAGE), ("foolbox", "3.3.4", _FOOLBOX_SHA256, _FOOLBOX)),
    (("opencv-doc", _OPENCV), ("tuxpaint-stamps-default", _STAMPS)),
)


def gather(
    cache: Path, splits: dict[str, int], progress: Callable[[str], None] = lambda _: None
) -> tuple[Path, list[str]]:
    """A folder with ``<split>/`` for each split, holding that many pictures (JPEG, RGB, shortest side 288 pixels).

    Made once and kept in the cache; made again when the recipe changed, or when a package was missing the last time.

    Args:
        cache: where packages and pictures are kept.
        splits: pictures per split, by the split's name.

    Returns:
        the folder, and remarks, such as a package that could not be had; the pictures then come from the others.

    Raises:
        EnvironmentProblem: too few photos for the splits.
    """
    recipe = repr((splits, _PACKAGES, SHORTEST_SIDE, MIN_CONTRAST, CROPS, JPEG_QUALITY))
    folder = cache / "photos" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    complete = folder / ".complete"  # written last, and only when no package was missing
    if complete.exists():
        return folder, []
    remarks: list[str] = []
    families: dict[str, list[tuple[str, Image.Image]]] = {}
    for name, content in _photos(cache, remarks, progress):
        picture = _read(content)
        if picture is not None:
            families.setdefault(_family(name), []).append((name, picture))
    shutil.rmtree(folder, ignore_errors=True)
    _write(folder, families, splits, remarks)
    if not remarks:
        complete.touch()
    return folder, remarks


def _write(
    folder: Path, families: dict[str, list[tuple[str, Image.Image]]], splits: dict[str, int], remarks: list[str]
) -> None:
    # Dealt by a hash of the name: the same photo falls into the same split whatever else is there.
    order = sorted(families, key=lambda family: hashlib.sha256(family.encode()).digest())
    dealt = _deal(order, {f: len(families[f]) for f in order}, splits)
    for split, wanted in splits.items():
        photos = [photo for family in dealt[split] for photo in families[family]]
        if len(photos) * CROPS < wanted:
            raise EnvironmentProblem(
                f"only {len(photos)} photos for the {split} pictures, {wanted} wanted",
                hint="; ".join(remarks) or "point the manifest at a folder of your own pictures",
            )
        target = folder / split
        target.mkdir(parents=True)
        candidates = ((name, photo, crop) for crop in range(CROPS) for name, photo in photos)
        for (name, photo, crop), _ in zip(candidates, range(wanted), strict=False):
            label = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(name).stem)
            key = hashlib.sha256(name.encode()).hexdigest()[:6]
            _crop(photo, crop).save(target / f"{label}-{key}-{crop}.jpg", quality=JPEG_QUALITY)


def _photos(cache: Path, remarks: list[str], progress: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
    wheels, debian = _PACKAGES
    for name, version, sha256, pattern in wheels:
        progress(f"photos from {name}")
        try:
            path = packages.wheel(cache, name, version, sha256)
        except EnvironmentProblem as exc:
            remarks.append(f"no photos from {name}: {exc.message}")
            continue
        yield from packages.wheel_members(path, pattern)
    for name, pattern in debian:
        progress(f"photos from {name}")
        package = packages.debian(cache, name)
        if package is None:
            remarks.append(f"no photos from {name}: this machine has no apt, or apt can't get it")
            continue
        yield from packages.debian_members(package, pattern)


def _family(name: str) -> str:
    """What siblings share: ``lion-2`` and ``lion``, ``leuvenA`` and ``leuvenB``. ImageNet's numbers are not siblings."""
    stem = PurePosixPath(name).stem
    if stem.startswith("imagenet_"):
        return stem
    return re.split(r"[-_0-9]", re.sub(r"(?<=[a-z])[A-Z]$", "", stem))[0].lower() or stem


def _deal(order: list[str], sizes: dict[str, int], splits: dict[str, int]) -> dict[str, list[str]]:
    """Give each family to the split that is furthest from its share."""
    dealt: dict[str, list[str]] = {split: [] for split in splits}
    have = dict.fromkeys(splits, 0)
    for family in order:
        split = min(splits, key=lambda s: have[s] / splits[s])
        dealt[split].append(family)
        have[split] += sizes[family]
    return dealt


def _read(content: bytes) -> Image.Image | None:
    """An RGB picture with the shortest side at 288 pixels; ``None`` for what is no picture or too small to be a photo."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            picture: Image.Image = opened
    except (UnidentifiedImageError, OSError):
        return None
    if min(picture.size) < 96 or max(picture.size) > 2 * min(picture.size):
        return None  # icons, and strips of which a square crop shows little
    if picture.mode in {"RGBA", "LA", "P"}:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(ground, picture)
    picture = picture.convert("RGB")
    scale = SHORTEST_SIDE / min(picture.size)
    size = (max(round(picture.width * scale), SHORTEST_SIDE), max(round(picture.height * scale), SHORTEST_SIDE))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    centre = ImageOps.fit(picture, (SHORTEST_SIDE // 2, SHORTEST_SIDE // 2)).convert("L")
    return picture if ImageStat.Stat(centre).stddev[0] > MIN_CONTRAST else None


def _crop(picture: Image.Image, crop: int) -> Image.Image:
    if crop == 0:
        return picture
    part = round(SHORTEST_SIDE * 0.8)
    left, top = {1: (0, 0), 2: (picture.width - part, 0), 3: (0, picture.height - part)}[crop]
    return ImageOps.mirror(picture.crop((left, top, left + part, top + part)))
