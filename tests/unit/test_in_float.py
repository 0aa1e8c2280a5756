"""What stays in float beside int8: what a node in float makes is not rounded on its way to another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import qdq, statistics
from edgefleet_controller.compile.children.in_float import with_passages
from edgefleet_controller.compile.children.measure import SampleFile
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

RNG = np.random.default_rng(3)
PICTURES = RNG.normal(size=(4, 8, 16, 16)).astype(np.float32)
RECIPE = {
    "ranges": "minmax", "weights": "full", "granularity": "channel", "activations": "uint8", "scope": "all", "correct_bias": True, "fit_weights": True, "fused_activations": False, "gates_in_int8": False, "aligned_channels": False,
}  # fmt: skip


def network() -> onnx.ModelProto:
    """A block as small detectors have it: the shortcut is pooled and padded, the trunk is two convolutions.

    ::

        image ─ stem ─ clip ─┬─ pool ─ pad ─┐
                             └─ down ───────┴─ add ─ relu ─┬─ left ─ flat   (an output)
                                                           └─ right         (the other)
    """
    pads = np.array([0, 0, 0, 0, 0, 8, 0, 0], np.int64)
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["s"], name="stem", pads=[1] * 4),
        helper.make_node("Clip", ["s", "low"], ["c"], name="clip"),
        helper.make_node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Pad", ["p", "pads"], ["q"], name="pad"),
        helper.make_node("Conv", ["c", "w1"], ["d"], name="down", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Add", ["q", "d"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w2"], ["l"], name="left"),
        helper.make_node("Flatten", ["l"], ["first"], name="flat"),
        helper.make_node("Conv", ["r", "w3"], ["second"], name="right"),
    ]
    weights = {"w0": (8, 8, 3, 3), "w1": (16, 8, 3, 3), "w2": (4, 16, 1, 1), "w3": (4, 16, 1, 1)}
    constants = [numpy_helper.from_array(RNG.normal(size=s).astype(np.float32), n) for n, s in weights.items()]
    constants += [numpy_helper.from_array(np.float32(0), "low"), numpy_helper.from_array(pads, "pads")]
    float_, shapes = onnx.TensorProto.FLOAT, {"first": [1, 256], "second": [1, 4, 8, 8]}
    outputs = [helper.make_tensor_value_info(name, float_, shape) for name, shape in shapes.items()]
    image = helper.make_tensor_value_info("image", float_, [1, 8, 16, 16])
    graph = helper.make_graph(nodes, "g", [image], outputs, constants)
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    )


@pytest.mark.parametrize(
    ("chosen", "added"),
    [
        ([], []),
        (["stem"], ["clip"]),  # what is clipped is not rounded before; the pool may be in int8, like all that reads it
        (["stem", "add"], ["clip", "pool", "pad", "relu"]),
        (["add"], ["relu"]),  # the shortcut is of int8 already
        (["left"], ["flat"]),  # moved to an output
        (["right"], []),
    ],
)
def test_what_moves_values_between_nodes_in_float_stays_in_float(chosen: list[str], added: list[str]) -> None:
    assert with_passages(network(), chosen) == {*chosen, *added}


def rounded_reads(tmp_path: Path, in_float: list[str]) -> dict[str, list[str]]:
    """What each node of the quantized network reads, by its name: the operators, through those that move values, that made it."""
    save_file({"image": PICTURES}, tmp_path / "samples.safetensors")
    samples = SampleFile(str(tmp_path / "samples.safetensors"))
    known = statistics.collect(network(), samples, lambda *_: None, histograms=False)
    quantized = qdq.quantize(network(), known, RECIPE | {"in_float": in_float})
    makers = {name: node.op_type for node in quantized.graph.node for name in node.output}
    return {node.name: [makers.get(name, "") for name in node.input] for node in quantized.graph.node}


def test_a_node_in_float_reads_what_was_made_in_float_though_int8_reads_it_too(
    tmp_path: Path,
) -> None:
    reads = rounded_reads(tmp_path, ["stem", "add"])
    assert reads["pool"] == ["Clip"]
    assert reads["add"][0] == "Pad"
    assert reads["down"][0] == "DequantizeLinear"
    assert reads["left"][0] == reads["right"][0] == "DequantizeLinear"


def test_a_value_of_int8_is_read_as_it_was_rounded_for_others(tmp_path: Path) -> None:
    assert rounded_reads(tmp_path, ["left"])["right"][0] == "DequantizeLinear"
