"""Networks that tf2onnx wrote are named by what they are, whatever it called them in that run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children.canonical import canonical
from onnx import TensorProto, helper, numpy_helper


def written(axes: str, made: str) -> bytes:
    """A network as tf2onnx writes it, with the names that it gave in one run."""
    nodes = [
        helper.make_node("Unsqueeze", ["image:0", axes], [made], name=made),
        helper.make_node("Squeeze", [made, axes], ["Identity:0"], name="last"),
    ]
    graph = helper.make_graph(
        nodes, "tf2onnx",
        [helper.make_tensor_value_info("image:0", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("Identity:0", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.array([2]), axes)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    canonical(model, ["image"], ["scores"])
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("once", "again"),
    [
        (("axes__12", "Unsqueeze__7"), ("axes__345", "Unsqueeze__8")),
        # Of constants with one value it keeps one, whichever comes first; an einsum's are called by an address of that process.
        (("einsum140013760614608_id_axes", "Unsqueeze__7"), ("einsum139738449222992_ba_ones", "Unsqueeze__7")),
        (("axes", "model/query/einsum140013760614608_tr"), ("axes", "model/query/einsum139738449222992_tr")),
    ],
    ids=["numbers", "constants", "values"],
)
def test_another_run_of_the_converter_gives_the_same_network(once: tuple[str, str], again: tuple[str, str]) -> None:
    assert written(*once) == written(*again)
