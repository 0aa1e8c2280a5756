"""Small networks, pictures and manifests for tests: real ONNX, built here, no file needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from edgefleet_controller.manifests import DeviceClass, Model
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save_file

SIDE = 32


class Net:
    """Collects nodes over an input ``image`` of 1 x 3 x 32 x 32."""

    def __init__(self, seed: int = 0, batch: int | str = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.batch = batch
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.last = "image"

    def constant(self, array: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op: str, *more: str, first: str | None = None, domain: str = "", **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        inputs = [self.last if first is None else first, *more]
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, domain=domain, **attributes))
        self.last = name
        return name

    def conv(
        self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, pads: Any = None, group: int = 1
    ) -> str:
        weight = self.rng.normal(size=(outputs, inputs // group, kernel, kernel)) * np.sqrt(
            2 / (kernel * kernel * inputs / group)
        )
        bias = self.rng.normal(size=outputs) * 0.1
        half = kernel // 2
        return self.add(
            "Conv", self.constant(weight.astype(np.float32)), self.constant(bias.astype(np.float32)),
            kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads or [half] * 4, group=group,
        )  # fmt: skip

    def relu6(self) -> str:
        return self.add("Clip", self.constant(np.array(0, np.float32)), self.constant(np.array(6, np.float32)))

    def dense(self, inputs: int, outputs: int) -> str:
        weight = self.constant((self.rng.normal(size=(outputs, inputs)) / np.sqrt(inputs) * 4).astype(np.float32))
        return self.add("Gemm", weight, self.constant(np.zeros(outputs, np.float32)), transB=1)

    def model(
        self, shape: Any, *, opset: int = 13, ir_version: int = 8, extra: list[Any] | None = None
    ) -> onnx.ModelProto:
        """The network; its last value becomes the output ``scores``."""
        self.add("Identity")
        self.nodes[-1].output[:] = ["scores"]
        graph = helper.make_graph(
            self.nodes, "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [self.batch, 3, SIDE, SIDE])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape)],
            self.constants,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", opset), *(extra or [])]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = ir_version
        return model


def classifier(classes: int = 10, seed: int = 0, batch: int | str = 1) -> onnx.ModelProto:
    """A small MobileNet-like classifier with random weights: convolutions, a depthwise one, a shortcut, a dense layer.

    The last convolution has no activation, so that the answers depend on the picture rather than on the weights alone.
    """
    net = Net(seed, batch)
    net.conv(3, 16, stride=2, pads=[0, 0, 1, 1])
    shortcut = net.relu6()
    net.conv(16, 16, group=16)
    net.relu6()
    net.conv(16, 16, 1, pads=[0, 0, 0, 0])
    net.add("Add", shortcut)
    net.add("Relu")
    net.conv(16, 16, 3, stride=2)
    net.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("Flatten")
    net.dense(256, classes)
    return net.model([batch, classes])


def write_pictures(folder: Path, count: int, seed: int, size: tuple[int, int] = (48, 40)) -> Path:
    """Pictures with coarse structure, each another one."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"p{i:03}.png")
    return folder


def blobs_of_light(count: int, seed: int) -> tuple[Any, list[int]]:
    """Noisy pictures with one bright spot; the class is the quarter that it lies in: uint8, count x 32 x 32 x 3."""
    chance = np.random.default_rng(seed)
    truth = [int(c) for c in chance.integers(0, 4, count)]
    pictures = chance.normal(90, 25, (count, SIDE, SIDE, 3))
    for picture, quarter in zip(pictures, truth, strict=True):
        row, column = (int(chance.integers(2, 10)) + 16 * half for half in divmod(quarter, 2))
        picture[row : row + 5, column : column + 5] += chance.uniform(70, 130, 3)
    return np.clip(pictures, 0, 255).astype(np.uint8), truth


def project(folder: Path, model: onnx.ModelProto, *, counts: tuple[int, int, int] = (16, 32, 8), **spec: Any) -> Model:
    """A folder with a network and its pictures, and the manifest over it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.onnx").write_bytes(model.SerializeToString(deterministic=True))
    for seed, (split, count) in enumerate(zip(("calibration", "holdout", "golden"), counts, strict=True)):
        write_pictures(folder / split, count, seed)
    fields: dict[str, Any] = {
        "version": "1",
        "source": {"path": "net.onnx"},
        "inputs": [{"name": "image", "mean": [127.5], "std": [64.0]}],
        "calibration": {"path": "calibration"},
        "holdout": {"path": "holdout"},
        "golden": {"path": "golden"},
        "acceptance": {"min_agreement": 0.7},  # as device_class asks: these networks' weights are random
    }
    return Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": fields | spec})


def resize_input(model: onnx.ModelProto, *shape: int) -> None:
    """Declare another shape of the one input."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    del dimensions[:]
    for size in shape:
        dimensions.add().dim_value = size


def project_of_numbers(folder: Path, model: onnx.ModelProto) -> Model:
    """The manifest over a network whose input is no picture, with samples."""
    (folder / "net.onnx").write_bytes(model.SerializeToString(deterministic=True))
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    counts = {"calibration": 8, "holdout": 32, "golden": 8}
    for seed, (split, count) in enumerate(counts.items()):
        samples = np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)
        save_file({"image": samples}, folder / f"{split}.safetensors")
    spec = {"version": "1", "source": {"path": "net.onnx"}} | {s: {"path": f"{s}.safetensors"} for s in counts}
    return Model.model_validate({"kind": "Model", "metadata": {"name": "numbers"}, "spec": spec})


def device_class(engine: str = "onnxruntime", **spec: Any) -> DeviceClass:
    fields: dict[str, Any] = {
        "arch": "x86_64",
        "engine": engine,
        "budgets": {"latency_p95_ms": 100.0, "memory_bytes": 1024**3},
        "accuracy": {"min_agreement": 0.7},
        "search": {"effort": "quick"},
    }
    return DeviceClass.model_validate(
        {"kind": "DeviceClass", "metadata": {"name": f"test-{engine}"}, "spec": fields | spec}
    )


def decided(folder: Path, model: onnx.ModelProto, *, counts: tuple[int, int, int] = (16, 48, 16), **spec: Any) -> Model:
    """Like :func:`project` for inputs on which the network is sure of its answer: of a random one, most lie so near the border between two
    classes that any other arithmetic turns them. What then disagrees is broken. Inputs are tensors; no two splits share one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = model.SerializeToString(deterministic=True)
    (folder / "net.onnx").write_bytes(content)
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(8 * sum(counts), 3, 4, 4)).astype(np.float32)
    drawn = coarse.repeat(SIDE // 4, axis=2).repeat(SIDE // 4, axis=3)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    scores = np.concatenate([session.run(["scores"], {"image": one[None]})[0] for one in drawn])
    ordered = np.sort(scores, axis=1)
    sure = np.argsort(ordered[:, -2] - ordered[:, -1], kind="stable")[: sum(counts)]
    rng.shuffle(sure)
    fields: dict[str, Any] = {"version": "1", "source": {"path": "net.onnx"}}
    for name, part in zip(("calibration", "holdout", "golden"), np.split(sure, np.cumsum(counts)[:-1]), strict=True):
        save_file({"image": np.ascontiguousarray(drawn[part])}, folder / f"{name}.safetensors")
        fields[name] = {"path": f"{name}.safetensors"}
    return Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": fields | spec})
