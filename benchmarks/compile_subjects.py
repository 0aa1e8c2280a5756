"""What ``compile.py`` compiles: receives a cache folder, hands on networks with their samples as Model manifests.

Networks and photos come from public packages; lines of text are drawn here. Two networks are made from trained ones: their channels are
scaled by factors that the next layer takes back, so that they answer exactly as before, and int8 ruins them.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from edgefleet_controller import packages, photos
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import Model
from edgefleet_controller.source.importers import importer
from edgefleet_shared.errors import EnvironmentProblem
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.numpy import save_file

SPLITS = {"calibration": 48, "holdout": 160, "golden": 16}
RAPIDOCR = ("rapidocr-onnxruntime", "1.4.4", "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf")
YOLO_ANCHORS = [[10.0, 14.0], [23.0, 27.0], [37.0, 58.0], [81.0, 82.0], [135.0, 169.0], [344.0, 319.0]]
WORDS = [
    "platform",
    "train",
    "to",
    "the",
    "north",
    "gate",
    "closed",
    "total",
    "amount",
    "due",
    "24.90",
    "EUR",
    "please",
    "keep",
    "this",
    "receipt",
    "fragile",
    "handle",
    "with",
    "care",
    "batch",
    "number",
    "7Q-1881",
    "best",
    "before",
    "open",
    "daily",
    "from",
    "8",
    "am",
    "no",
    "smoking",
    "inside",
    "push",
    "button",
    "for",
    "assistance",
    "serial",
    "model",
    "year",
    "departure",
    "arrival",
    "terminal",
    "exit",
    "only",
    "staff",
    "entrance",
    "high",
    "voltage",
    "do",
    "not",
    "enter",
    "made",
    "in",
    "net",
    "weight",
    "500",
    "g",
    "store",
    "cool",
    "and",
    "dry",
]


def lite0(cache: Path, folder: Path) -> Model:
    """EfficientNet-Lite0 on photos."""
    _photos(cache, folder)
    return _model(
        folder, "efficientnet-lite0", {"importer": "efficientnet-lite0"}, sizes={"N": 1}, inputs=[_LITE0_INPUT]
    )


def yolov3_tiny(cache: Path, folder: Path) -> Model:
    """YOLOv3-tiny on four photos at a time, so that there are boxes enough to count, at the threshold that darknet itself uses."""
    _photos(cache, folder)
    for split in SPLITS:
        _four_at_a_time(folder / "photos" / split, folder / "fours" / split)
    picture = {"name": "images", "fit": "letterbox", "mean": [0.0], "std": [255.0]}
    detection = {"decoder": "yolov3", "anchors": YOLO_ANCHORS, "masks": [[3, 4, 5], [0, 1, 2]], "threshold": 0.25}
    return _model(
        folder, "yolov3-tiny", {"importer": "yolov3-tiny"}, inputs=[picture], data="fours", acceptance={"tolerance_abs": 1.0},
        output={"kind": "detection", "detection": detection},
    )  # fmt: skip


def text_reader(cache: Path, folder: Path) -> Model:
    """PP-OCRv4's recogniser on drawn lines of text, with what is written on them."""
    wheel = packages.wheel(cache, *RAPIDOCR)
    ((_, network),) = packages.wheel_members(wheel, re.compile(r"models/ch_PP-OCRv4_rec_infer\.onnx$"))
    told = {p.key: p.value for p in onnx.load_model_from_string(network).metadata_props}
    (folder / "characters.txt").write_text(told["character"].rstrip("\n") + "\n", encoding="utf-8")
    (folder / "reader.onnx").write_bytes(network)
    for seed, (split, count) in enumerate(SPLITS.items()):
        _draw_lines(folder / "lines" / split, count, seed)
    picture = {"name": "x", "fit": "left", "fill": 127, "colour": "BGR", "mean": [127.5], "std": [127.5]}
    return _model(
        folder, "text-reader", {"path": "reader.onnx"}, inputs=[picture], data="lines", truth="lines/holdout.txt",
        sizes={"?": 48, "p2o.DynamicDimension.0": 1, "p2o.DynamicDimension.1": 320},
        output={"kind": "text", "text": {"characters": "characters.txt"}}, acceptance={"tolerance_abs": 0.2},
    )  # fmt: skip


def unlike_channels(cache: Path, folder: Path) -> Model:
    """EfficientNet-Lite0 whose projections' channels have widths a hundred times apart; the next layers take that back."""
    _photos(cache, folder)
    model = onnx.load_model_from_string(importer("efficientnet-lite0")(cache))
    (folder / "unlike.onnx").write_bytes(_rescaled(model, 6.0).SerializeToString())
    return _model(folder, "unlike-channels", {"path": "unlike.onnx"}, sizes={"N": 1}, inputs=[_LITE0_INPUT])


def mobilenet_v3_large(cache: Path, folder: Path) -> Model:
    """A network of MobileNetV3-Large's shape with random weights: for its speed, its answers mean nothing."""
    _photos(cache, folder)
    (folder / "mobilenet-v3.onnx").write_bytes(_MobileNetV3().model().SerializeToString())
    return _model(
        folder, "mobilenet-v3-large", {"path": "mobilenet-v3.onnx"}, inputs=[{**_LITE0_INPUT, "name": "image"}],
        acceptance={"min_agreement": 0.01},
    )  # fmt: skip


def fashion(cache: Path, folder: Path) -> Model:
    """A small network for Fashion-MNIST (Xiao et al. 2017), trained here once, with the 10,000 test pictures and their labels held out.

    Golden pictures come out of the 60,000 training ones, and are not trained on; nor is a training picture that is also a test picture.
    """
    package = packages.debian(cache, "dataset-fashion-mnist")
    if package is None:
        raise EnvironmentProblem(
            "no Debian package dataset-fashion-mnist: this machine has no apt, or apt can't get it"
        )
    files = {Path(n).name: gzip.decompress(c) for n, c in packages.debian_members(package, re.compile(r"-ubyte\.gz$"))}
    sets = {
        split: (_idx(files[f"{split}-images-idx3-ubyte.gz"], 3), _idx(files[f"{split}-labels-idx1-ubyte.gz"], 1))
        for split in ("train", "t10k")
    }
    tested = {picture.tobytes() for picture in sets["t10k"][0]}
    apart = np.array([picture.tobytes() not in tested for picture in sets["train"][0]])
    pictures, labels = (array[apart] for array in sets["train"])
    golden, training = SPLITS["golden"], slice(SPLITS["golden"], None)
    network = _trained(cache, pictures[training], labels[training])
    shutil.copy(network, folder / "fashion.onnx")
    for split, (own, right) in {
        "golden": (pictures[:golden], labels[:golden]), "training": (pictures[training], labels[training]),
        "calibration": (pictures[training][:256], labels[training][:256]), "holdout": sets["t10k"],
    }.items():  # fmt: skip
        save_file({"image": np.ascontiguousarray(own[..., None])}, folder / f"{split}.safetensors")
        (folder / f"{split}.txt").write_text("\n".join(map(str, right)) + "\n")
    training_data = {"path": "training.safetensors", "truth": "training.txt"}
    return Model.model_validate({"kind": "Model", "metadata": {"name": "fashion"}, "spec": {
        "version": "1", "source": {"path": "fashion.onnx"}, "sizes": {"N": 1},
        "inputs": [{"name": "image", "colour": "GREY", "std": [255.0]}],
        "calibration": {"path": "calibration.safetensors"}, "golden": {"path": "golden.safetensors"},
        "holdout": {"path": "holdout.safetensors", "truth": "holdout.txt"},
        "prune": {
            "structured": 0.3, "unstructured": 0.66, "steps": 2, "epochs": 5, "batch": 128, "learning_rate": 3e-3, "max_loss": 0.03,
            "training": training_data,
        },
    }})  # fmt: skip


def _idx(content: bytes, rank: int) -> Any:
    """An array of LeCun's IDX format: a magic number, the sizes as big-endian 32-bit numbers, the bytes."""
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _trained(cache: Path, pictures: Any, labels: Any) -> Path:
    """The network, trained in the pruning toolchain's environment; kept in the cache, by what it is trained on and by what trains it."""
    script = Path(__file__).with_name("train_fashion.py")
    toolchain = Toolchains(cache).ensure("pruning")
    key = hashlib.sha256(script.read_bytes() + toolchain.lock_hash.encode() + pictures.tobytes() + labels.tobytes())
    network = cache / "benchmarks" / f"fashion-{key.hexdigest()[:16]}.onnx"
    if not network.exists():
        network.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=network.parent) as temporary:
            data, made = Path(temporary) / "training.safetensors", Path(temporary) / "fashion.onnx"
            save_file({"pictures": np.ascontiguousarray(pictures), "labels": np.ascontiguousarray(labels)}, data)
            subprocess.run([toolchain.python, str(script), str(data), str(made)], check=True, cwd=temporary)
            made.replace(network)
    return network


_LITE0_INPUT: dict[str, Any] = {"name": "input", "resize": 256, "mean": [127.0], "std": [128.0]}


def _model(
    folder: Path, name: str, source: dict[str, Any], *, data: str = "photos", truth: str | None = None, **spec: Any
) -> Model:
    splits: dict[str, Any] = {split: {"path": f"{data}/{split}"} for split in SPLITS}
    if truth:
        splits["holdout"]["truth"] = truth
    fields = {"version": "1", "source": source, **splits, **spec}
    return Model.model_validate({"kind": "Model", "metadata": {"name": name}, "spec": fields})


def _photos(cache: Path, folder: Path) -> None:
    kept, _remarks = photos.gather(cache, SPLITS)
    shutil.rmtree(folder / "photos", ignore_errors=True)
    shutil.copytree(kept, folder / "photos")


def _four_at_a_time(source: Path, folder: Path) -> None:
    """Two by two of a split's own photos; each photo is in four of them, with others beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(source.iterdir())
    for number in range(len(files)):
        ground = Image.new("RGB", (416, 416))
        for place, step in enumerate((0, 5, 17, 31)):
            with Image.open(files[(number + step) % len(files)]) as opened:
                ground.paste(ImageOps.fit(opened.convert("RGB"), (208, 208)), (place % 2 * 208, place // 2 * 208))
        ground.save(folder / f"{number:04}.png")


def _draw_lines(folder: Path, count: int, seed: int) -> None:
    """Lines as a camera sees labels: one to four words, grey on grey, blurred by scaling; what they say in a text file beside."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    said = []
    for number in range(count):
        text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 4)))
        said.append(text)
        font = ImageFont.load_default(chance.randint(14, 30))
        left, top, right, bottom = font.getbbox(text)
        size = (int(right - left) + chance.randint(6, 24), int(bottom - top) + chance.randint(6, 16))
        ground = tuple(chance.randint(150, 255) for _ in range(3))
        ink = tuple(chance.randint(0, 90) for _ in range(3))
        picture = Image.new("RGB", size, ground)
        ImageDraw.Draw(picture).text(
            (chance.randint(2, 5) - left, chance.randint(2, 5) - top), text, fill=ink, font=font
        )
        noise = np.random.default_rng(seed * 1000 + number).normal(0, 8, (size[1], size[0], 3))
        Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)).save(folder / f"{number:04}.png")
    folder.with_suffix(".txt").write_text("\n".join(said) + "\n", encoding="utf-8")


def _rescaled(model: onnx.ModelProto, octaves: float) -> onnx.ModelProto:
    """Every value that one convolution makes and only convolutions read gets channels scaled by up to 2 ** octaves, either way."""
    constants = {i.name: i for i in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    chance = np.random.default_rng(0)
    for node in model.graph.node:
        users = readers.get(node.output[0], [])
        if node.op_type != "Conv" or not users or any(user.op_type != "Conv" for user in users):
            continue
        weight, bias = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        factors = np.exp2(chance.uniform(-octaves, octaves, len(bias))).astype(np.float32)
        _put(constants, node.input[1], weight * factors[:, None, None, None])
        _put(constants, node.input[2], bias * factors)
        for user in users:
            taken = numpy_helper.to_array(constants[user.input[1]])
            _put(constants, user.input[1], taken / factors[None, :, None, None])
    return model


def _put(constants: dict[str, Any], name: str, values: Any) -> None:
    constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))


class _MobileNetV3:
    """The layers of Howard et al. 2019, table 1, with random weights."""

    # kernel, expansion, out, squeeze-and-excite, hard-swish, stride
    ROWS = (
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
        (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
        (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._chance = np.random.default_rng(1)

    def model(self) -> onnx.ModelProto:
        x, channels = self._act(self._conv("image", 3, 16, 3, 2), 1), 16
        for kernel, wide, out, excite, swish, stride in self.ROWS:
            kept = x
            if wide != channels:
                x = self._act(self._conv(x, channels, wide, 1, 1), swish)
            x = self._act(self._conv(x, wide, wide, kernel, stride, group=wide), swish)
            x = self._excite(x, wide) if excite else x
            x = self._conv(x, wide, out, 1, 1)
            x = self._add("Add", x, kept) if stride == 1 and out == channels else x
            channels = out
        x = self._act(self._conv(x, channels, 960, 1, 1), 1)
        x = self._act(self._conv(self._add("GlobalAveragePool", x), 960, 1280, 1, 1), 1)
        x = self._add("Flatten", self._conv(x, 1280, 1000, 1, 1))
        self._nodes[-1].output[:] = ["scores"]
        graph = helper.make_graph(
            self._nodes, "mobilenet-v3-large", [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 224, 224])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 1000])], self._constants,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
        model.ir_version = 8
        return model

    def _add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def _constant(self, values: Any) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(values, np.float32), f"c{len(self._constants)}"))
        return str(self._constants[-1].name)

    def _conv(self, x: str, inputs: int, outputs: int, kernel: int, stride: int, group: int = 1) -> str:
        spread = np.sqrt(2 / (kernel * kernel * inputs / group))
        weight = self._chance.normal(0, spread, (outputs, inputs // group, kernel, kernel))
        bias = self._chance.normal(0, 0.1, outputs)
        half = kernel // 2
        return self._add(
            "Conv", x, self._constant(weight), self._constant(bias),
            kernel_shape=[kernel, kernel], strides=[stride, stride], pads=[half] * 4, group=group,
        )  # fmt: skip

    def _act(self, x: str, swish: int) -> str:
        return self._add("HardSwish", x) if swish else self._add("Relu", x)

    def _excite(self, x: str, channels: int) -> str:
        less = max(8, int(channels / 4 + 4) // 8 * 8)
        y = self._add("Relu", self._conv(self._add("GlobalAveragePool", x), channels, less, 1, 1))
        y = self._add("HardSigmoid", self._conv(y, less, channels, 1, 1), alpha=1 / 6, beta=0.5)
        return self._add("Mul", x, y)
