"""The form that everything behind the simplifier expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgefleet_controller.compile.children.tidy import tidy
from onnx import helper
from support.networks import Net


def tidied(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    onnx.save(model, folder / "net.onnx")
    tidy(str(folder / "net.onnx"))
    found = onnx.load(folder / "net.onnx")
    onnx.checker.check_model(found, full_check=True)
    return found


def test_a_limit_that_is_left_away_at_the_end_has_no_name(tmp_path: Path) -> None:
    """Torch writes one for each normalised vector; who looks an empty name up finds nothing."""
    net = Net()
    net.add("Clip", net.constant(np.float32(1e-12)), "")
    (clip, _) = tidied(net.model([1, 3, 32, 32]), tmp_path).graph.node
    assert len(clip.input) == 2


@pytest.mark.parametrize("read", [True, False])
def test_a_pool_tells_where_its_maxima_were_where_anything_asks(tmp_path: Path, read: bool) -> None:
    net = Net()
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.nodes[-1].output.append("places")
    if read:
        net.add("Cast", first="places", to=onnx.TensorProto.FLOAT)
    (pool, *_) = tidied(net.model([1, 3, 16, 16]), tmp_path).graph.node
    assert len(pool.output) == 1 + read


def test_what_exporters_remark_goes_and_what_is_said_of_the_model_stays(tmp_path: Path) -> None:
    """Torch writes to each node where in its source files it came from."""
    remark = "File src/net.py, line 3"
    net = Net()
    net.conv(3, 8)
    model = net.model([1, 8, 32, 32], ir_version=10)
    inside = helper.make_node("Identity", ["n0"], ["same"], doc_string=remark)
    same = helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, [1, 8, 32, 32], doc_string=remark)
    branch = helper.make_graph([inside], "branch", [], [same], doc_string=remark)
    always = net.constant(np.array(True))
    model.graph.initializer.append(net.constants[-1])
    model.graph.node.append(helper.make_node("If", [always], ["chosen"], then_branch=branch, else_branch=branch))
    for part in (model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.doc_string = remark
        part.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=remark)
    model.doc_string = "MIT"
    model.metadata_props.add(key="author", value="somebody")
    found = tidied(model, tmp_path)
    assert remark.encode() not in found.SerializeToString()
    assert found.doc_string == "MIT"
    assert [(one.key, one.value) for one in found.metadata_props] == [("author", "somebody")]


def test_a_limit_that_is_left_away_before_another_stays_so(tmp_path: Path) -> None:
    net = Net()
    net.add("Clip", "", net.constant(np.float32(1.0)))
    (clip, _) = tidied(net.model([1, 3, 32, 32]), tmp_path).graph.node
    assert list(clip.input)[:2] == ["image", ""]


def test_a_product_with_a_row_stays_one_node_and_one_with_a_matrix_becomes_two(tmp_path: Path) -> None:
    for added, expected in (((1, 5), ["Gemm"]), ((5,), ["Gemm"]), ((96, 5), ["Gemm", "Add"])):
        net = Net()
        net.add("Reshape", net.constant(np.array([96, 32])))
        weight = net.constant(np.ones((32, 5), np.float32))
        net.add("Gemm", weight, net.constant(np.ones(added, np.float32)))
        nodes = tidied(net.model([96, 5]), tmp_path).graph.node
        assert [node.op_type for node in nodes][1:-1] == expected


def test_a_constant_behind_a_cast_to_float_is_a_float_constant(tmp_path: Path) -> None:
    net = Net()
    half = net.constant(np.full((1, 3, 1, 1), 0.5, np.float16))
    net.add("Cast", first=half, to=onnx.TensorProto.FLOAT)
    net.add("Mul", net.last, first="image")
    graph = tidied(net.model([1, 3, 32, 32]), tmp_path).graph
    assert [node.op_type for node in graph.node] == ["Mul", "Identity"]
    (constant,) = graph.initializer
    assert constant.data_type == onnx.TensorProto.FLOAT


def masked(mask: Any, *, axis: int = -1, served: bool = False) -> onnx.ModelProto:
    net = Net()
    summed = net.add("Add", net.constant(np.asarray(mask, np.float32), "mask"))
    net.add("Softmax", axis=axis)
    model = net.model([1, 3, 32, 32])
    if served:
        model.graph.output.append(onnx.helper.make_tensor_value_info(summed, onnx.TensorProto.FLOAT, [1, 3, 32, 32]))
    return model


LOWEST = np.finfo(np.float32).min
CAUSAL = np.triu(np.full((32, 32), LOWEST), 1)


def test_a_mask_of_the_lowest_float_becomes_one_that_int8_can_add(tmp_path: Path) -> None:
    found = tidied(masked(CAUSAL), tmp_path)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in found.graph.initializer}
    (raised,) = constants.values()  # what nothing reads any more is gone
    assert raised.min() == -1e4
    assert np.array_equal(raised < 0, CAUSAL < 0)
    picture = np.random.default_rng(0).normal(0, 50, (1, 3, 32, 32)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"image": picture}
        )[0]
        for m in (masked(CAUSAL), found)
    )
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    "model",
    [
        masked(np.triu(np.full((32, 32), LOWEST))),  # all of one row: what then comes out are its values alike
        masked(np.triu(np.full((32, 32), -100.0), 1)),
        masked(np.where(CAUSAL < 0, -np.inf, 0.0)),
        masked(CAUSAL, axis=2),
        masked(CAUSAL, served=True),
    ],
    ids=["whole row", "high", "infinite", "along columns", "served"],
)
def test_other_masks_stay(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert tidied(model, tmp_path).graph.node[0].input[1] == "mask"


def answers(model: onnx.ModelProto) -> Any:
    picture = np.random.default_rng(1).normal(size=(1, 3, 32, 32)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": picture})[0]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, -2]])
def test_a_mean_over_all_places_is_one_that_engines_have_in_int8(
    tmp_path: Path, axes: list[int], opset: int, kept: bool
) -> None:
    net = Net(3)
    net.conv(3, 8)
    if opset == 18:
        net.add("ReduceMean", net.constant(np.array(axes)), keepdims=int(kept))
    else:
        net.add("ReduceMean", axes=axes, keepdims=int(kept))
    before = onnx.shape_inference.infer_shapes(net.model([1, 8, 1, 1] if kept else [1, 8], opset=opset))
    after = tidied(before, tmp_path)
    operators = [node.op_type for node in after.graph.node]
    assert operators == ["Conv", "GlobalAveragePool", *([] if kept else ["Flatten"]), "Identity"]
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [[1, 2, 3], [2], [1], [3]])
def test_another_mean_stays(tmp_path: Path, axes: list[int]) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.add("ReduceMean", axes=axes)
    shape = [1 if axis in axes else size for axis, size in enumerate((1, 8, 32, 32))]
    after = tidied(onnx.shape_inference.infer_shapes(net.model(shape)), tmp_path)
    assert [node.op_type for node in after.graph.node] == ["Conv", "ReduceMean", "Identity"]


def test_a_mean_over_more_axes_than_pools_have_stays(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 8)
    net.add("Reshape", net.constant(np.array([1, 8, 4, 8, 4, 8])))
    net.add("ReduceMean", axes=[2, 3, 4, 5], keepdims=0)
    before = onnx.shape_inference.infer_shapes(net.model([1, 8]))
    after = tidied(before, tmp_path)
    assert [node.op_type for node in after.graph.node] == ["Conv", "Reshape", "ReduceMean", "Identity"]
    np.testing.assert_allclose(answers(after), answers(before), rtol=1e-5)
