"""Stage 2, compile: ONNX with QDQ int8. Receives a float network, its statistics and a recipe, hands on the quantized network.

onnxruntime's QDQ writer places the nodes; ranges, weight scales and biases are ours. It is run by every engine that reads QDQ
(onnxruntime, OpenVINO), so that both get the same numbers.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry

from .statistics import Statistics
from .weights import (
    LEVELS,
    PASSIVE,
    WEIGHTED,
    Array,
    axis_of,
    channel_scales,
    correct_biases,
    tensor_scale,
    wide_enough,
)

Recipe = dict[str, Any]
FAR = 1e30  # a limit that no activation reaches


def quantize(model: onnx.ModelProto, statistics: Statistics, recipe: Recipe) -> onnx.ModelProto:
    """The network in int8, as the recipe says (:class:`edgefleet_controller.compile.recipe.Recipe` as a dict)."""
    ranges = {name: methods[recipe["ranges"]] for name, methods in statistics["ranges"].items()}
    own = onnx.ModelProto()
    own.CopyFrom(model)
    scales = _weight_scales(own, ranges, recipe)
    if recipe["correct_bias"]:
        correct_biases(own, statistics["means"], scales)
    overrides = {
        name: [
            {"scale": scale, "zero_point": np.int8(0), "quant_type": QuantType.QInt8, "axis": axis} for scale in values
        ]
        for name, values, axis in _with_axis(own, scales)
    }
    # Its warnings are about biases that _weight_scales has made room for.
    logging.getLogger().setLevel(logging.ERROR)
    writer = QDQQuantizer(
        own,
        True,
        False,
        QuantType.QInt8,
        QuantType.QUInt8,
        _tensors(ranges),
        [],
        _with_activations(own, recipe["in_float"]),
        [op for op in sorted(QDQRegistry) if recipe["scope"] == "all" or op in WEIGHTED or op in PASSIVE],
        {
            "QDQDisableWeightAdjustForInt32Bias": True,
            "TensorQuantOverrides": overrides,
            "MatMulConstBOnly": True,
        },
    )
    writer.quantize_model()
    quantized: onnx.ModelProto = writer.model.model
    _guard(quantized, set(recipe["in_float"]))
    return quantized


def _guard(model: onnx.ModelProto, in_float: set[str]) -> None:
    """Keep onnxruntime from quantizing what stays in float.

    Its WeightBiasQuantization pass gives a float weight between DequantizeLinear and QuantizeLinear int8 values of its own, one scale
    for all, at load: EfficientNet-Lite0 fell from 21 to 7 dB by one layer kept in "float". A Clip that clips nothing breaks the pattern.
    """
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    constants = {i.name for i in model.graph.initializer}
    nodes, guarded = list(model.graph.node), dict[str, str]()
    del model.graph.node[:]
    for node in nodes:
        kept = node.op_type in WEIGHTED and node.name in in_float
        if kept and node.input[0] in dequantized and dequantized[node.input[0]].input[0] not in constants:
            source = node.input[0]
            if source not in guarded:
                guarded[source] = f"{source}/in_float"
                limits = [f"{source}/low", f"{source}/high"]
                model.graph.initializer.extend(
                    numpy_helper.from_array(np.float32(value), name)
                    for value, name in zip((-FAR, FAR), limits, strict=True)
                )
                model.graph.node.append(
                    onnx.helper.make_node("Clip", [source, *limits], [guarded[source]], name=guarded[source])
                )
            node.input[0] = guarded[source]
        model.graph.node.append(node)


def _with_activations(model: onnx.ModelProto, in_float: list[str]) -> list[str]:
    """Nodes that stay in float, and the activations behind them: to round what an activation is about to clip wastes the range."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = set(in_float)
    for node in model.graph.node:
        if node.name in found and node.op_type in WEIGHTED:
            found |= {reader.name for reader in readers.get(node.output[0], []) if reader.op_type in ("Relu", "Clip")}
    return sorted(found)


def _weight_scales(model: onnx.ModelProto, ranges: dict[str, list[float]], recipe: Recipe) -> dict[str, Array]:
    """Scales of every weight that is to become int8, by its name."""
    constants = {i.name: i for i in model.graph.initializer}
    skipped = set(recipe["in_float"])
    found: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED or node.name in skipped or len(node.input) < 2:
            continue
        tensor = constants.get(node.input[1])
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or node.input[0] not in ranges:
            continue
        weight = numpy_helper.to_array(tensor)
        if weight.ndim < 2 or not np.any(weight):
            continue
        axis = axis_of(node)
        channels = weight.shape[axis]
        scales = (
            channel_scales(weight, axis, recipe["weights"])
            if recipe["granularity"] == "channel"
            else np.full(channels, tensor_scale(weight, recipe["weights"]), np.float32)
        )
        bias = constants.get(node.input[2]) if len(node.input) > 2 else None
        low, high = ranges[node.input[0]]
        scale = max((high - low) / LEVELS, 1e-30)
        scales = wide_enough(scales, None if bias is None else numpy_helper.to_array(bias), scale)
        found[tensor.name] = np.maximum(scales, found[tensor.name]) if tensor.name in found else scales
    return found


def _with_axis(model: onnx.ModelProto, scales: dict[str, Array]) -> list[tuple[str, Array, int]]:
    ranks = {i.name: len(i.dims) for i in model.graph.initializer}
    axes = {
        node.input[1]: axis_of(node) for node in model.graph.node if len(node.input) > 1 and node.input[1] in scales
    }
    return [(name, values, axes[name] % ranks[name]) for name, values in scales.items()]


def _tensors(ranges: dict[str, list[float]]) -> TensorsData:
    return TensorsData(
        CalibrationMethod.MinMax,
        {n: TensorData(lowest=np.float32(low), highest=np.float32(high)) for n, (low, high) in ranges.items()},
    )
