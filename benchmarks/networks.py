"""Networks for benchmarks: receives a kind and a seed, hands on ONNX. All take ``x`` UINT8 [1, 224, 224, 3] and give ``y`` FP32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

SIDE = 224
CACHE = Path.home() / ".cache" / "edgefleet"


def null(seed: int) -> bytes:
    """Looks at one pixel."""
    constants = [nh.from_array(np.array([0, 0, 0], np.int64), "from"), nh.from_array(np.array([1, 1, 1], np.int64), "to"),
                 nh.from_array(np.array([1, 2, 3], np.int64), "axes"), _weights(seed, "head", 1, 10)]  # fmt: skip
    nodes = [h.make_node("Slice", ["x", "from", "to", "axes"], ["pixels"]), h.make_node("Cast", ["pixels"], ["f"], to=T.FLOAT),
             h.make_node("Flatten", ["f"], ["flat"]), h.make_node("MatMul", ["flat", "head"], ["y"])]  # fmt: skip
    return _model(nodes, constants)


def conv(seed: int, ballast_bytes: int = 0, *, crashes: bool = False) -> bytes:
    """Three convolutions.

    Args:
        ballast_bytes: unused weights that make the file, and the memory that loading it takes, as large as one wants.
        crashes: it loads, and its first inference divides an integer as no CPU can.
    """
    constants = [_weights(seed, "k1", 16, 3, 7, 7), _weights(seed, "k2", 32, 16, 3, 3), _weights(seed, "k3", 64, 32, 3, 3),
                 _weights(seed, "head", 64, 10), nh.from_array(np.array(0, np.float32), "nothing")]  # fmt: skip
    nodes = [h.make_node("Cast", ["x"], ["f"], to=T.FLOAT), h.make_node("Transpose", ["f"], ["c0"], perm=[0, 3, 1, 2])]
    for i, stride in enumerate((4, 2, 2), 1):
        nodes += [h.make_node("Conv", [f"c{i - 1}", f"k{i}"], [f"a{i}"], strides=[stride, stride], auto_pad="SAME_UPPER"),
                  h.make_node("Relu", [f"a{i}"], [f"c{i}"])]  # fmt: skip
    nodes += [h.make_node("GlobalAveragePool", ["c3"], ["pool"]), h.make_node("Flatten", ["pool"], ["flat"]),
              h.make_node("MatMul", ["flat", "head"], ["logits"])]  # fmt: skip
    added = "nothing"
    if ballast_bytes:
        # Looked up, not reduced: the optimizer would compute the sum while loading and drop the rest.
        constants.append(_weights(seed, "ballast", ballast_bytes // 4 // 1024, 1024))
        nodes += [h.make_node("ArgMax", ["logits"], ["row"], axis=1), h.make_node("Gather", ["ballast", "row"], ["looked"]),
                  h.make_node("ReduceSum", ["looked"], ["sum"], keepdims=0), h.make_node("Mul", ["sum", "nothing"], ["weightless"])]  # fmt: skip
        added = "weightless"
    if crashes:
        constants += [
            nh.from_array(np.array([np.iinfo(np.int32).min], np.int32), "smallest"),
            nh.from_array(np.array([-1], np.int32), "one"),
        ]
        # The division must wait for the picture, or the optimizer would do it while loading.
        nodes += [h.make_node("ArgMax", ["logits"], ["any"], axis=1, keepdims=0), h.make_node("Cast", ["any"], ["int"], to=T.INT32),
                  h.make_node("Sub", ["int", "int"], ["zero"]), h.make_node("Add", ["zero", "one"], ["divisor"]),
                  h.make_node("Div", ["smallest", "divisor"], ["quotient"]), h.make_node("Cast", ["quotient"], ["real"], to=T.FLOAT),
                  h.make_node("Mul", ["real", "nothing"], ["dead"])]  # fmt: skip
        added = "dead"
    nodes.append(h.make_node("Add", ["logits", added], ["y"]))
    return _model(nodes, constants)


def lite0(seed: int = 0) -> bytes:
    """EfficientNet-Lite0 from its public package, quantized to int8 (QDQ, per channel) on random pictures: the speed is the same.

    Args:
        seed: which of its classes is told first: versions with the same work and other answers.
    """
    from edgefleet_controller.source.importers import efficientnet_lite
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            random = np.random.default_rng(0)
            self._left = [random.integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8) for _ in range(8)]

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            return {"x": self._left.pop()} if self._left else None

    network = onnx.load_from_string(efficientnet_lite.fetch(CACHE))
    graph = network.graph
    taken, given = graph.input[0].name, graph.output[0].name
    graph.node.insert(0, h.make_node("Cast", ["x"], ["as_float"], to=T.FLOAT))
    graph.node.insert(1, h.make_node("Sub", ["as_float", "mean"], ["centred"]))
    graph.node.insert(2, h.make_node("Div", ["centred", "std"], ["scaled"]))
    graph.node.insert(3, h.make_node("Transpose", ["scaled"], [taken], perm=[0, 3, 1, 2]))
    graph.node.append(h.make_node("Gather", [given, "order"], ["y"], axis=1))
    order = nh.from_array(np.roll(np.arange(1000), seed), "order")
    graph.initializer.extend(
        [nh.from_array(np.array(127, np.float32), "mean"), nh.from_array(np.array(128, np.float32), "std"), order]
    )
    del graph.input[:], graph.output[:]
    graph.input.append(h.make_tensor_value_info("x", T.UINT8, [1, SIDE, SIDE, 3]))
    graph.output.append(h.make_tensor_value_info("y", T.FLOAT, [1, 1000]))
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder, "plain.onnx"), Path(folder, "small.onnx")
        onnx.save(network, plain)
        quantize_static(plain, small, Pictures(), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
        return small.read_bytes()


def _weights(seed: int, name: str, *shape: int) -> T:
    random = np.random.default_rng([seed, *name.encode()])
    return nh.from_array((random.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))), name)


def _model(nodes: list[onnx.NodeProto], constants: list[T]) -> bytes:
    graph = h.make_graph(nodes, "bench", [h.make_tensor_value_info("x", T.UINT8, [1, SIDE, SIDE, 3])],
                         [h.make_tensor_value_info("y", T.FLOAT, [1, 10])], constants)  # fmt: skip
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())
