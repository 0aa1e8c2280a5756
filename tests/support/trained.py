"""Small trained networks as Model manifests, with pictures drawn here: text's direction (PP-OCR, 0.6 MB), digits (MNIST, 26 KB)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
from edgefleet_controller import packages
from edgefleet_controller.manifests import Model
from PIL import Image, ImageDraw, ImageFont

COUNTS = {"calibration": 24, "holdout": 48, "golden": 8}
_WORDS = [
    "platform",
    "train",
    "north",
    "gate",
    "closed",
    "total",
    "amount",
    "receipt",
    "fragile",
    "handle",
    "care",
    "number",
    "open",
    "daily",
    "push",
    "serial",
    "year",
    "exit",
    "staff",
]


def _fetched(cache: Path, package: tuple[str, str], member: str) -> bytes:
    wheel = packages.wheel(cache, *package)
    ((_, content),) = packages.wheel_members(wheel, re.compile(re.escape(member) + "$"))
    return content


def text_direction(cache: Path, folder: Path) -> Model:
    """Lines of text, half of them upside down: is it?"""
    folder.mkdir(parents=True, exist_ok=True)
    network = _fetched(cache, ("rapidocr-onnxruntime", "1.4.4"), "models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
    model = onnx.load_model_from_string(network)  # leaves two sizes open under one name
    (given,) = [i for i in model.graph.input if i.name == "x"]
    for dimension, size in zip(given.type.tensor_type.shape.dim, (1, 3, 48, 192), strict=True):
        dimension.Clear()
        dimension.dim_value = size
    (folder / "direction.onnx").write_bytes(model.SerializeToString())
    for seed, (split, count) in enumerate(COUNTS.items()):
        (folder / split).mkdir()
        rng = np.random.default_rng(seed)
        for index in range(count):
            line = " ".join(rng.choice(_WORDS, 3))
            picture = _drawn(line, (192, 48), 30, tuple(rng.integers(150, 256, 3)), tuple(rng.integers(0, 90, 3)))
            (picture.rotate(180) if index % 2 else picture).save(folder / split / f"p{index:03}.png")
    picture = {"name": "x", "colour": "BGR", "fit": "left", "fill": 127, "mean": [127.5], "std": [127.5]}
    return _model("text-direction", "direction.onnx", picture)


def digits(cache: Path, folder: Path) -> Model:
    """Digits, white on black, moved and scaled a little."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digits.onnx").write_bytes(_fetched(cache, ("qonnx", "1.0.0"), "data/onnx/mnist-conv/model.onnx"))
    for seed, (split, count) in enumerate(COUNTS.items()):
        (folder / split).mkdir()
        rng = np.random.default_rng(seed)
        for index in range(count):
            size = int(rng.integers(18, 27))
            picture = _drawn(str(index % 10), (28, 28), size, (0, 0, 0), (255, 255, 255), tuple(rng.integers(3, 9, 2)))
            grain = rng.integers(0, 40, (28, 28)).astype(np.uint8)  # so that no two are the same
            picture = Image.fromarray(np.maximum(np.asarray(picture.convert("L")), grain))
            picture.save(folder / split / f"p{index:03}.png")
    return _model("digits", "digits.onnx", {"name": "Input3", "colour": "GREY", "fit": "stretch"})


def _drawn(
    text: str, size: tuple[int, int], height: int, paper: tuple[int, ...], ink: tuple[int, ...], at: tuple[int, ...] = (4, 6)
) -> Image.Image:  # fmt: skip
    picture = Image.new("RGB", size, tuple(int(v) for v in paper))
    place = (int(at[0]), int(at[1]) - (4 if size[0] == size[1] else 0))
    ImageDraw.Draw(picture).text(place, text, tuple(int(v) for v in ink), ImageFont.load_default(height))
    return picture


def _model(name: str, network: str, picture: dict[str, object]) -> Model:
    spec: dict[str, object] = {"version": "1", "source": {"path": network}, "inputs": [picture]}
    spec |= {split: {"path": split} for split in COUNTS}
    return Model.model_validate({"kind": "Model", "metadata": {"name": name}, "spec": spec})
