"""Where a network is narrow: what passes behind a node is all that was made up to it, and is read behind it."""

from __future__ import annotations

import onnx
from edgefleet_controller.compile.children import cuts
from onnx import helper


def test_shortcuts_pass_too_and_what_is_read_up_to_there_does_not() -> None:
    """``a`` goes by ``b`` and ``c`` to the sum; an output is read behind everything."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("MaxPool", ["a"], ["b"], name="b", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["b", "", "scales"], ["c"], name="c"),
        helper.make_node("Add", ["a", "c"], ["y"], name="sum"),
        helper.make_node("Relu", ["b"], ["z"], name="other"),
    ]
    shapes = {"x": [1, 2, 4, 4], "y": [1, 2, 4, 4], "z": [1, 2, 2, 2]}
    values = {n: helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in shapes.items()}
    scales = helper.make_tensor("scales", onnx.TensorProto.FLOAT, [4], [1, 1, 2, 2])
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["y"], values["z"]], [scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    groups = [["a"], ["b"], ["c", "b"], ["sum"], ["other"]]
    assert cuts.passing(model, groups) == [32, 32 + 8, 32 + 8 + 32, 8 + 32, 32 + 8]
