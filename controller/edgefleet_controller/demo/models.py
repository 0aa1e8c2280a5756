"""The demo's broken versions: receives a sound network or its pictures, hands on realistic damage.

Both go through the normal import and compile. Version 3 makes a mistake that people make, version 4 leaves something in
the graph that people leave.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from edgefleet_shared.contract import PictureEncoding
from edgefleet_shared.golden import encode_pictures
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

BINS = 300_000  # x 1000 classes x 4 bytes: 1.2 GB, above any demo class's memory budget, within a laptop's memory


def normalised_twice(pictures: Path, encoding: PictureEncoding, target: Path) -> None:
    """Write calibration tensors to which the encoding was applied twice: the exporting script did it, and so did the loader.

    The values then span a hundredth of their real range, so every activation range that is calibrated on them is far too
    narrow and real pictures saturate it.

    Args:
        pictures: a stored split (safetensors, uint8 N x H x W x C).
        target: ``.safetensors`` to write, float32, for ``spec.calibration.path``.
    """
    mean, std = (np.float32(values[0]) for values in (encoding.mean, encoding.std))
    tensors = {name: encode_pictures(array, encoding) for name, array in load_file(pictures).items()}
    save_file({name: (array - mean) / std for name, array in tensors.items()}, target)


def with_memory_bomb(network: bytes, bins: int = BINS) -> bytes:
    """A classifier with a histogram over its scores left in the graph, as debugging code does; same inputs and outputs.

    The table of classes x bins takes 1.2 GB in every engine; integers are not quantized, so int8 does not shrink it. Its
    largest entry moves the scores by at most a thousandth.
    """
    model = onnx.load_model_from_string(network)
    graph = model.graph
    (output,) = graph.output
    scores = f"{output.name}/scores"
    for node in graph.node:
        node.output[:] = [scores if name == output.name else name for name in node.output]
    classes = output.type.tensor_type.shape.dim[1].dim_value
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([1, classes, 1], np.int64), "debug/column"),
            numpy_helper.from_array(np.arange(bins, dtype=np.int32).reshape(1, 1, bins), "debug/bins"),
            numpy_helper.from_array(np.array([1, 1], np.int64), "debug/one"),
            numpy_helper.from_array(np.array(-1e-3, np.float32), "debug/low"),
            numpy_helper.from_array(np.array(1e-3, np.float32), "debug/high"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Cast", [scores], ["debug/whole"], name="debug/cast", to=TensorProto.INT32),
            helper.make_node("Reshape", ["debug/whole", "debug/column"], ["debug/rows"], name="debug/reshape"),
            helper.make_node("Add", ["debug/rows", "debug/bins"], ["debug/table"], name="debug/histogram"),
            helper.make_node("ReduceMax", ["debug/table"], ["debug/top"], name="debug/max", axes=[1, 2], keepdims=0),
            helper.make_node("Reshape", ["debug/top", "debug/one"], ["debug/flat"], name="debug/flatten"),
            helper.make_node("Cast", ["debug/flat"], ["debug/real"], name="debug/uncast", to=TensorProto.FLOAT),
            helper.make_node("Clip", ["debug/real", "debug/low", "debug/high"], ["debug/shift"], name="debug/clip"),
            helper.make_node("Add", [scores, "debug/shift"], [output.name], name="debug/add"),
        ]
    )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content
