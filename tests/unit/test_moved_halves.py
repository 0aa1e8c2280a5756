"""Half precision in which values are only moved, on the way from float to float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from edgefleet_controller.compile.children.moved_halves import move_in_float
from support.networks import Net


def moved(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    onnx.save(model, folder / "net.onnx")
    move_in_float(str(folder / "net.onnx"))
    found = onnx.load(folder / "net.onnx")
    onnx.checker.check_model(found, full_check=True)
    return found


def test_values_that_are_only_moved_in_half_precision_are_moved_in_float(tmp_path: Path) -> None:
    net = Net()
    float_, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    net.conv(3, 8)
    whole = net.add("Cast", to=half)
    begin, end, axis = (net.constant(np.array([value], np.int64)) for value in (0, 4, 1))
    net.add("Slice", begin, end, axis)
    net.add("Concat", whole, net.constant(np.ones((1, 4, 32, 32), np.float16)), axis=1)
    net.add("Transpose", perm=[0, 2, 3, 1])
    net.add("Cast", to=float_)
    net.add("Relu")
    model = net.model([1, 32, 32, 16])
    found = moved(model, tmp_path)
    assert not any(node.op_type == "Cast" for node in found.graph.node)
    assert all(tensor.data_type != half for tensor in found.graph.initializer)
    fed = {"image": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}
    before, after = (
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, fed)[0]
        for one in (model, found)
    )
    assert np.abs(before - after).max() < 1e-2 * np.abs(before).max()


def test_what_is_computed_in_half_precision_stays_so(tmp_path: Path) -> None:
    net = Net()
    half = onnx.TensorProto.FLOAT16
    net.add("Cast", to=half)
    turned = net.add("Transpose", perm=[0, 2, 3, 1])
    net.add("Erf")
    net.add("Concat", turned, axis=1)
    net.add("Cast", to=onnx.TensorProto.FLOAT)
    found = moved(net.model([1, 64, 32, 3]), tmp_path)
    onnxruntime.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
