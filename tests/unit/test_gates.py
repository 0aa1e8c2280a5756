"""Gates that int8 has no operator for: in pieces they answer as before, and onnxruntime computes all of them in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import qdq
from edgefleet_controller.compile.children.gates import in_pieces
from support.int8 import RECIPE, answers, db, kernels, known_of
from support.networks import Net


def hard_swish(net: Net, *, pieces: bool) -> None:
    before = net.last
    if pieces:
        net.add("HardSigmoid", alpha=1 / 6, beta=0.5)
        net.add("Mul", net.last, first=before)
    else:
        net.add("HardSwish")


def mobile(*, pieces: bool, alpha: float = 0.2, beta: float = 0.5) -> onnx.ModelProto:
    """Convolutions with HardSwish, and channels weighed by what they are on average, as MobileNetV3 has it; sums that have nothing to do with gates."""
    net = Net(3)
    net.conv(3, 16)
    hard_swish(net, pieces=pieces)
    features = net.conv(16, 16)
    net.add("GlobalAveragePool")
    net.conv(16, 16, 1, pads=[0, 0, 0, 0])
    gate = net.add("HardSigmoid", alpha=alpha, beta=beta)
    weighed = net.add("Mul", gate, first=features)
    net.conv(16, 16)
    net.add("Add", weighed)
    net.conv(16, 8)
    return onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.5), (1 / 6, 0.5), (0.5, 0.1), (0.3, -0.2)])
def test_gates_in_pieces_answer_as_gates_in_float_do(tmp_path: Path, alpha: float, beta: float, pieces: bool) -> None:
    model = mobile(pieces=pieces, alpha=alpha, beta=beta)
    known, wanted = known_of(model, tmp_path), answers(model)
    quantized = qdq.quantize(model, known, RECIPE)
    onnx.checker.check_model(quantized)
    in_float = db(
        answers(qdq.quantize(model, known, RECIPE | {"fused_activations": False, "gates_in_int8": False})), wanted
    )
    assert in_float > 20
    assert db(answers(quantized), wanted) > in_float - 2


def test_a_gate_behind_which_an_activation_ends_it_again_answers_as_in_float(tmp_path: Path) -> None:
    """Whoever writes QDQ takes such an activation away, and calls what is before it by its name."""
    net = Net(3)
    features = net.conv(3, 16)
    net.add("HardSigmoid", alpha=0.2, beta=0.5)
    net.add("Clip", net.constant(np.float32(0)), net.constant(np.float32(0.9)))
    net.add("Mul", net.last, first=features)
    net.conv(16, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))
    known, wanted = known_of(model, tmp_path), answers(model)
    in_float = db(answers(qdq.quantize(model, known, RECIPE | {"gates_in_int8": False})), wanted)
    assert db(answers(qdq.quantize(model, known, RECIPE)), wanted) > in_float - 2


@pytest.mark.parametrize("pieces", [True, False])
def test_the_engine_computes_all_of_them_in_int8(tmp_path: Path, pieces: bool) -> None:
    model = mobile(pieces=pieces)
    ran = kernels(qdq.quantize(model, known_of(model, tmp_path), RECIPE), tmp_path)
    assert ran.count("QLinearMul") == 2
    assert not {"Mul", "Add", "HardSigmoid", "HardSwish"} & {*ran}


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("scale", [0.5, 2.0, 20.0])
def test_levels_that_say_exactly_where_a_gate_begins_are_clipped_themselves(
    tmp_path: Path, swish: bool, scale: float
) -> None:
    """And are rounded no second time: the answers come nearer to those in float."""
    net = Net(3)
    net.conv(3, 16)
    net.constants[-2].CopyFrom(
        onnx.numpy_helper.from_array(
            onnx.numpy_helper.to_array(net.constants[-2]) * np.float32(scale), net.constants[-2].name
        )
    )
    before = net.last
    if swish:
        hard_swish(net, pieces=False)
    else:
        net.add("HardSigmoid", alpha=0.2, beta=0.5)
        net.add("Mul", net.last, first=before)
    net.conv(16, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))
    known, wanted = known_of(model, tmp_path), answers(model)
    quantized = qdq.quantize(model, known, RECIPE)
    onnx.checker.check_model(quantized, full_check=True)
    operators = [node.op_type for node in quantized.graph.node]
    # A step that is a good part of what is added says nothing exactly.
    assert ("Clip" in operators, "Add" in operators) == ((False, True) if scale == 20 else (True, False))
    in_float = db(answers(qdq.quantize(model, known, RECIPE | {"gates_in_int8": False})), wanted)
    assert db(answers(quantized), wanted) > in_float - 1


def test_a_range_that_ends_above_where_a_gate_begins_has_its_sum(tmp_path: Path) -> None:
    net = Net(3)
    net.conv(3, 16)
    net.add("LeakyRelu", alpha=0.01)
    hard_swish(net, pieces=False)
    net.conv(16, 8)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))
    known, wanted = known_of(model, tmp_path), answers(model)
    quantized = qdq.quantize(model, known, RECIPE)
    assert "Add" in [node.op_type for node in quantized.graph.node]
    in_float = db(answers(qdq.quantize(model, known, RECIPE | {"gates_in_int8": False})), wanted)
    assert db(answers(quantized), wanted) > in_float - 2


def weighing(net: Net, *, gate_read: bool = False) -> None:
    """Convolutions with SiLU, and channels weighed by a Sigmoid, as EfficientNet and YOLOv5 have them."""
    before = net.conv(3, 16)
    gate = net.add("Sigmoid")
    features = net.add("Mul", gate, first=before)
    net.add("GlobalAveragePool")
    net.conv(16, 16, 1, pads=[0, 0, 0, 0])
    gate = net.add("Sigmoid")
    weighed = net.add("Mul", gate, first=features)
    net.conv(16, 16)
    if gate_read:
        net.add("Add", gate)
    net.add("Add", weighed)
    net.conv(16, 8)


def test_gates_by_sigmoid_are_computed_in_int8_and_answer_as_in_float(tmp_path: Path) -> None:
    net = Net(3)
    weighing(net)
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))
    known, wanted = known_of(model, tmp_path), answers(model)
    quantized = qdq.quantize(model, known, RECIPE)
    onnx.checker.check_model(quantized)
    in_float = db(answers(qdq.quantize(model, known, RECIPE | {"gates_in_int8": False})), wanted)
    assert in_float > 20
    assert db(answers(quantized), wanted) > in_float - 2
    names = kernels(quantized, tmp_path)
    assert (names.count("QLinearSigmoid"), names.count("QLinearMul")) == (2, 2)
    assert not {"Sigmoid", "Mul"} & {*names}


def test_a_sigmoid_that_is_no_gate_is_not_rounded(tmp_path: Path) -> None:
    """What is served, a detector's scores, and what others read too."""
    net = Net(3)
    weighing(net, gate_read=True)
    net.add("Sigmoid")
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32], opset=14))
    quantized = qdq.quantize(model, known_of(model, tmp_path), RECIPE)
    rounded = {node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    made = [node.output[0] for node in model.graph.node if node.op_type == "Sigmoid"]
    assert [name in rounded for name in made] == [True, False, False]


@pytest.mark.parametrize("why", ["in float", "read in float", "read in a branch", "served", "falls", "no range"])
def test_a_gate_stays_whole_where_it_must(why: str) -> None:
    net = Net(3)
    before = net.conv(3, 4)
    gate = net.add("HardSigmoid", alpha=-0.2 if why == "falls" else 0.2)
    product = net.add("Mul", gate, first=before)
    net.conv(4, 4)
    model = net.model([1, 4, 32, 32])
    if why == "served":
        model.graph.output[0].name = gate
        del model.graph.node[-1]
    if why == "read in a branch":
        branches = {
            f"{side}_branch": onnx.helper.make_graph(
                [onnx.helper.make_node("Identity", [gate], [side])], side, [],
                [onnx.helper.make_tensor_value_info(side, onnx.TensorProto.FLOAT, None)],
            )
            for side in ("then", "else")
        }  # fmt: skip
        model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["chosen"], name="if", **branches))
    ranges = {} if why == "no range" else {before: [-1.0, 1.0]}
    found = in_pieces(model, {"in float": {gate}, "read in float": {product}}.get(why, set()), ranges)
    assert found.sums == {}
    assert [node.op_type for node in model.graph.node][:3] == ["Conv", "HardSigmoid", "Mul"]


def test_a_layer_in_float_beside_gates_reads_what_was_meant(tmp_path: Path) -> None:
    model = mobile(pieces=True)
    known, wanted = known_of(model, tmp_path), answers(model)
    plain = db(answers(qdq.quantize(model, known, RECIPE)), wanted)
    for node in model.graph.node:
        if node.op_type in ("Conv", "HardSigmoid", "Mul"):
            found = answers(qdq.quantize(model, known, RECIPE | {"in_float": [node.name]}))
            assert db(found, wanted) > plain - 2, node.name
