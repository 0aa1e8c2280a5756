"""The ONNX-to-TFLite converter against onnxruntime: every operator of its table over its attributes, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children.job import Refused
from edgefleet_controller.compile.children.tflite.onnx_to_tflite import OPERATORS, convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from support.engines import assert_alike, onnx_answers, operators_of, tflite_answers
from support.onnx_cases import CASES
from support.onnx_draw import Dice, Draw, model_of, spoil

# What the layout and the types at the edges may add to what an operator makes.
ALWAYS = {"RESHAPE", "TRANSPOSE", "CAST"}


def test_every_row_of_the_table_has_cases_here() -> None:
    assert set(OPERATORS) - set(CASES) == {"Swish"}  # onnxruntime 1.32 has none to compare with


@pytest.mark.parametrize("op", sorted(CASES))
@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_operator_answers_as_onnxruntime_does(op: str, data: Any) -> None:
    draw = Draw(data)
    model, feeds = model_of(CASES[op](draw), draw)
    content = convert(model).content
    assert_alike(tflite_answers(content, feeds), onnx_answers(model, feeds))
    assert set(operators_of(content)) <= {*OPERATORS[op].makes, *ALWAYS}


# --- names, inputs and outputs ----------------------------------------------------------------------------------------


def one(
    *nodes: onnx.NodeProto, shape: Any = (1, 3, 4, 4), output: str = "y", constants: Any = None, opset: int = 13
) -> onnx.ModelProto:
    """A model from ``x`` to ``output``, of any nodes."""
    graph = helper.make_graph(
        list(nodes), "hostile", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node by words; ``-`` stands for an input that is left out."""
    return helper.make_node(
        op, inputs.replace("-", "").split(" "), outputs.split(), name=name or f"the {op}", **attributes
    )


X = np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4)


def test_an_input_a_constant_and_one_value_twice_may_be_outputs() -> None:
    model = one(
        node("Identity", "x", "same"),
        node("Relu", "x", "y"),
        node("Identity", "y", "again"),
        constants={"c": np.float32([1, 2])},
    )
    for name in ("same", "again", "x_out", "c"):
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    model.graph.node.append(node("Identity", "x", "x_out", "last"))
    got = tflite_answers(convert(model).content, {"x": X})
    for name, want in {"same": X, "x_out": X, "y": X, "again": X, "c": np.float32([1, 2])}.items():
        np.testing.assert_array_equal(got[name], want)


def test_nodes_may_come_in_any_order_and_names_may_be_shared_with_what_the_converter_adds() -> None:
    weight = np.ones((2, 3, 1, 1), np.float32)
    model = one(
        node("Relu", "x/moved", "y", "same name"),
        node("Conv", "x w", "x/moved", "same name"),
        constants={"w": weight, "unused": weight},
    )
    content = convert(model).content
    np.testing.assert_array_equal(tflite_answers(content, {"x": X})["y"], onnx_answers(one(
        node("Conv", "x w", "c"), node("Relu", "c", "y"), constants={"w": weight}), {"x": X})["y"])  # fmt: skip


def test_nodes_that_no_output_needs_are_not_looked_at() -> None:
    model = one(node("Relu", "x", "y"), node("NonZero", "x", "unused"), node("Sparkle", "unused", "more"))
    assert operators_of(convert(model).content) == {"RELU": 1}


def test_constants_may_be_listed_as_inputs_and_stay_constants() -> None:
    model = one(node("Add", "x c", "y"), constants={"c": np.float32(2)})
    model.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, []))
    np.testing.assert_array_equal(tflite_answers(convert(model).content, {"x": X})["y"], X + 2)


def test_sizes_worked_out_from_shapes_are_worked_out_when_compiling() -> None:
    model = one(
        node("Shape", "x", "shape"), node("Slice", "shape zero one", "batch"), node("Cast", "batch", "whole", to=6),
        node("Cast", "whole", "size", to=7), node("Concat", "size rest", "target", axis=0), node("Reshape", "x target", "y"),
        constants={"zero": np.int64([0]), "one": np.int64([1]), "rest": np.int64([-1])},
    )  # fmt: skip
    content = convert(model).content
    assert operators_of(content) == {"RESHAPE": 1}
    np.testing.assert_array_equal(tflite_answers(content, {"x": X})["y"], X.reshape(1, -1))


# --- refused ----------------------------------------------------------------------------------------------------------

_W = np.ones((2, 3, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("nodes", "constants", "words"),
    [
        ([node("Sparkle", "x", "y")], {}, r"no operator Sparkle \(node 'the Sparkle'\)"),
        ([node("NonZero", "x", "y")], {}, r"no operator NonZero \(node 'the NonZero'\)"),
        ([node("Det", "x", "y")], {}, r"no operator Det \(node 'the Det'\)"),
        ([node("Conv", "x x", "y")], {}, r"no operator Conv with a computed input 'x' \(node 'the Conv'\)"),
        ([node("Conv", "x w", "y")], {"w": np.ones((2, 5, 3, 3), np.float32)}, r"Conv with weights \[2, 5, 3, 3\] for 3 channels"),
        ([node("Conv", "x w", "y", group=2)], {"w": _W}, "for 3 channels in 2 groups"),
        ([node("Conv", "x w", "y", group=0)], {"w": _W}, "for 3 channels in 0 groups"),
        ([node("Conv", "x w", "y", strides=[0, 1])], {"w": _W}, r"node 'the Conv' \(Conv\): .*strides"),
        ([node("Conv", "x w", "y", sparkle=1)], {"w": _W}, "Unrecognized attribute: sparkle"),
        ([node("Conv", "x w", "y", auto_pad="SOME")], {"w": _W}, "SOME"),
        ([node("ConvTranspose", "x w", "y", output_padding=[9, 0])], {"w": np.ones((3, 2, 3, 3), np.float32)}, "ConvTranspose"),
        ([node("MaxPool", "x", "y", kernel_shape=[2, 2], dilations=[2, 2])], {}, "MaxPool with dilations"),
        ([node("MaxPool", "x", "y where", kernel_shape=[2, 2])], {}, "MaxPool with indices"),
        ([node("Reshape", "x s", "y")], {"s": np.int64([5, -1])}, r"node 'the Reshape' \(Reshape\): "),
        ([node("Relu", "x", "n"), node("NonZero", "n", "s"), node("Reshape", "x s", "y")], {}, "NonZero"),
        ([node("Cast", "x", "s", to=7), node("Reshape", "x s", "y")], {}, "Reshape whose output 'y' has a size that is known only at run time"),
        ([node("Slice", "x a a", "y")], {"a": np.int64([2])}, r"makes 'y' without elements: \[0, 3, 4, 4\]"),
        ([node("Resize", "x r s", "y", coordinate_transformation_mode="tf_crop_and_resize")],
         {"r": np.float32([0, 0, 0, 0, 1, 1, 1, 1]), "s": np.float32([1, 1, 2, 2])}, "Resize with tf_crop_and_resize"),
        ([node("Pad", "x p", "y", mode="edge")], {"p": np.int64([0, 0, 20, 0, 0, 0, 0, 0])}, "Pad in mode edge by 20"),
        ([node("Gather", "x i", "y", axis=1)], {"i": np.int64([3])}, "Gather with places outside of 3 elements"),
        ([node("Cast", "x", "y", to=11)], {}, "Cast in float64"),
        ([node("Cast", "x", "h", to=10), node("Relu", "h", "y")], {}, "Cast in float16"),
        ([node("Expand", "x s", "y")], {"s": np.int64([2**28, 3, 4, 4])}, r"'the Expand' \(Expand\) has a tensor of \d+ bytes"),
        ([node("ConstantOfShape", "s", "c"), node("Add", "x c", "y")], {"s": np.int64([2**40])}, "ConstantOfShape"),
        ([node("Unsqueeze", "x a", "y")], {"a": np.int64([0, 1, 2, 3])}, "in 8 dimensions"),
        ([node("Relu", "y", "a", "first"), node("Relu", "a", "y", "second")], {}, "depend on each other in a circle: .*'first'"),
        ([node("Relu", "x", "y"), node("Tanh", "x", "y", "twice")], {}, "'y' is made twice, the second time by node 'twice'"),
        ([node("Relu", "x", "x"), node("Relu", "x", "y")], {}, "'x' is made twice"),
        ([node("Relu", "nowhere", "y")], {}, r"node 'the Relu' \(Relu\) uses 'nowhere', which nothing makes"),
        ([node("Relu", "x", "z")], {}, "output 'y' is made by no node"),
        ([node("Conv", "x w", "y")], {"w": _W * np.nan}, r"constant 'w' of node 'the Conv' \(Conv\) has values that are not numbers"),
        ([node("Conv", "x w", "y")], {"w": _W * np.inf}, "Conv with weights that are not finite"),
        ([node("Add", "x c", "y")], {"c": np.array(2.0)}, r"node 'the Add' \(Add\)"),
        ([node("Transpose", "x", "y", perm=[0, 1, 1, 2])], {}, "'the Transpose'"),
    ],
    ids=lambda value: None if not isinstance(value, str) else re.sub(r"\W+", "-", value)[:40],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_by_node_and_name(nodes: Any, constants: Any, words: str) -> None:
    with pytest.raises(Refused, match=words):
        convert(one(*nodes, constants=constants))


def test_an_input_of_a_type_that_tflite_lacks_is_not_told_to_be_checked_for_damage() -> None:
    model = one(node("Relu", "x", "y"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(Refused, match="input 'x' is float16") as caught:
        convert(model)
    assert "inputs and outputs in one of these" in caught.value.fields["hint"]


def test_control_flow_is_refused_by_node_and_name() -> None:
    branch = helper.make_graph(
        [node("Relu", "x", "inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)],
    )
    choice = node("If", "c", "y", then_branch=branch, else_branch=branch)
    with pytest.raises(Refused, match=r"no operator If \(node 'the If'\)"):
        convert(one(choice, constants={"c": np.bool_(True)}))


def test_another_domain_is_refused_with_its_name() -> None:
    model = one(node("Quant", "x", "y", domain="qonnx.custom_op.general"))
    with pytest.raises(Refused, match=r"no operator qonnx\.custom_op\.general\.Quant \(node 'the Quant'\)"):
        convert(model)


def test_an_operator_set_from_the_future_or_before_broadcasting_is_refused() -> None:
    for version in (1, 6, 99):
        with pytest.raises(Refused, match=f"its operator set is {version}; 7 to "):
            convert(one(node("Relu", "x", "y"), opset=version))


def test_external_data_is_refused_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 4)
    monkeypatch.chdir(tmp_path)
    model = one(node("Add", "x c", "y"), constants={"c": np.float32(2)})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    with pytest.raises(Refused, match="constant 'c' lies in another file"):
        convert(model)
    (model.graph.node.add()).CopyFrom(node("Constant", "", "k", value=tensor))
    model.graph.node[0].input[1] = "k"
    del model.graph.initializer[:], model.graph.node[1].input[:]
    with pytest.raises(Refused, match="lies in another file"):
        convert(model)


def test_a_tensor_with_too_little_data_or_absurd_dimensions_is_refused() -> None:
    model = one(node("Add", "x c", "y"), constants={"c": np.float32([2, 3, 4, 5])})
    model.graph.initializer[0].raw_data = b"\0" * 7
    with pytest.raises(Refused, match="constant 'c' can't be read"):
        convert(model)
    for size in (-1, 2**40):
        model.graph.initializer[0].dims[0] = size
        with pytest.raises(Refused, match=rf"constant 'c' has dimensions \[{size}\]"):
            convert(model)


@pytest.mark.parametrize("size", ["batch", 0, -1])
def test_a_dimension_without_a_size_is_refused(size: Any) -> None:
    with pytest.raises(Refused, match=f"input 'x' has a dimension '?{size}'? that is no size"):
        convert(one(node("Relu", "x", "y"), shape=(size, 3, 4, 4)))


def test_broken_graphs_are_refused_and_never_raise_anything_else() -> None:
    """Whatever is changed in a graph: it is converted or refused."""
    rng = np.random.default_rng(0)
    refused, words = 0, set()
    for number in range(400):
        op = sorted(CASES)[number % len(CASES)]
        model, _ = model_of(CASES[op](Dice(rng)), Dice(rng))
        spoil(model, rng)
        try:
            convert(model)
        except Refused as exc:
            refused += 1
            words.add(str(exc))
    assert 100 < refused < 400
    assert all(text.startswith("tflite ") for text in words)
