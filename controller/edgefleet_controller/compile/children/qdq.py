"""Stage 2, compile: ONNX with QDQ int8. Receives a float network, its statistics and a recipe, hands on the quantized network.

onnxruntime's QDQ writer places the nodes; ranges, weight scales and biases are ours. It is run by every engine that reads QDQ
(onnxruntime, OpenVINO), so that both get the same numbers.
"""

from __future__ import annotations

import logging
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry

from . import fused
from .aligned import align
from .clipped import clip_levels
from .gates import PIECES, Pieces, by_levels, in_pieces, read_by_factor
from .gathered import Statistics
from .in_float import ACTIVATIONS, outside, with_passages
from .int8_weights import Settling
from .moves import FAR, settle_moves
from .rescaled import by_readings, settle_ranges
from .tidy import read_by, read_inside
from .weights import (
    LEVELS,
    PASSIVE,
    WEIGHTED,
    Array,
    axis_of,
    own_weights,
    scales_of,
    wide_enough,
)

Recipe = dict[str, Any]


def quantize(
    model: onnx.ModelProto, statistics: Statistics, recipe: Recipe, settling: Settling | None = None
) -> onnx.ModelProto:
    """The network in int8, as the recipe says (:class:`edgefleet_controller.compile.recipe.Recipe` as a dict).

    Args:
        settling: of this network and its statistics, where several recipes follow each other.
    """
    ranges = {name: methods[recipe["ranges"]] for name, methods in statistics.ranges.items()}
    own = onnx.ModelProto()
    own.CopyFrom(model)
    own_weights(own, set(recipe["in_float"]))
    _fold_factors(own)
    _flatten_biases(own)
    scales = _weight_scales(own, ranges, recipe)
    (settling or Settling(statistics)).settle(own, scales, recipe)
    overrides = {
        name: [
            {
                "scale": scale,
                "zero_point": np.int8(0),
                "quant_type": QuantType.QInt8,
                **({"axis": axis} if len(values) > 1 else {}),
            }
            for scale in values
        ]
        for name, values, axis in _with_axis(own, scales)
    }
    out_of_scope = outside(own, recipe["scope"])
    in_float = with_passages(own, {*recipe["in_float"], *out_of_scope}) | _unlike_a_range(own) | _read_unrounded(own)
    symmetric = recipe["activations"] == "symmetric"
    readings = settle_ranges(own, in_float, ranges) if recipe["gates_in_int8"] and not symmetric else {}
    pieces = in_pieces(own, in_float, ranges) if recipe["gates_in_int8"] else Pieces({}, set(), any=False)
    operators = {op for op in QDQRegistry if recipe["scope"] == "all" or op in WEIGHTED or op in PASSIVE}
    # Its warnings are about biases that _weight_scales has made room for.
    logging.getLogger().setLevel(logging.ERROR)
    writer = QDQQuantizer(
        own,
        True,
        False,
        QuantType.QInt8,
        QuantType.QInt8 if symmetric else QuantType.QUInt8,
        _tensors(ranges),
        [],
        sorted(in_float | pieces.others),
        sorted(operators.union(PIECES) if pieces.any else operators),
        {
            "QDQDisableWeightAdjustForInt32Bias": True,
            "TensorQuantOverrides": overrides,
            "MatMulConstBOnly": True,
            "ActivationSymmetric": symmetric,
            "QuantizeBias": not symmetric,
        },
    )
    writer.quantize_model()
    quantized: onnx.ModelProto = writer.model.model
    read_by_factor(quantized, pieces.sums)
    by_levels(quantized, pieces.sums)
    whole = fused.sums(own, in_float) if recipe["fused_activations"] else set()
    fused.unrounded(quantized, whole)
    _keep_float(quantized, in_float - out_of_scope | set(recipe["in_float"]), model)
    by_readings(quantized, readings)
    if recipe["gates_in_int8"]:
        clip_levels(quantized)
    _swept(quantized)
    fused.round_before_pools(quantized, whole)
    _sorted(quantized.graph)
    if not recipe["fused_activations"]:
        settle_moves(quantized)
        _sorted(quantized.graph)
    if recipe["aligned_channels"]:
        align(quantized)
        _swept(quantized)
        _sorted(quantized.graph)
    return quantized


def _fold_factors(model: onnx.ModelProto) -> None:
    """Gemm's factors go into what they multiply: the QDQ writer forgets the summand's, and onnxruntime up to 1.23 computes the product's wrongly in int8."""
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in constants:
            continue
        for place, name in ((1, "alpha"), (2, "beta")):
            factor = next((a for a in node.attribute if a.name == name), None)
            if factor is None or factor.f == 1.0 or len(node.input) <= place or node.input[place] not in constants:
                continue
            folded = f"{node.input[place]}/times{factor.f}"
            if folded not in constants:
                values = numpy_helper.to_array(constants[node.input[place]]) * np.float32(factor.f)
                constants[folded] = numpy_helper.from_array(values, folded)
                model.graph.initializer.append(constants[folded])
            node.input[place] = folded
            factor.f = 1.0


def _flatten_biases(model: onnx.ModelProto) -> None:
    """Gemm's bias may be a row, 1 x N, or one number for all; a scale per channel needs one for each, in a row of one axis, and it means the same."""
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or not {node.input[1], node.input[2]} <= constants.keys():
            continue
        weight, bias = constants[node.input[1]], constants[node.input[2]]
        channels, size = weight.dims[axis_of(node)], int(np.prod(bias.dims))
        flat = list(bias.dims) == [channels]
        if flat or size not in (1, channels) or (size > 1 and bias.dims[-1] != channels):
            continue
        name = f"{bias.name}/flat{channels}"
        if name not in constants:
            values = np.broadcast_to(numpy_helper.to_array(bias).reshape(-1), (channels,))
            constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
            model.graph.initializer.append(constants[name])
        node.input[2] = name


def _unlike_a_range(model: onnx.ModelProto) -> set[str]:
    """The names of Clips that the range of a rounded value can't stand for: it always holds zero, which their limits leave out, or may."""
    limits = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if not i.dims}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            limits[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def holds_zero(node: onnx.NodeProto) -> bool:
        low, high = (limits.get(name, np.nan) if name else 0.0 for name in [*node.input[1:], "", ""][:2])
        return bool(low <= 0 <= high)

    return {node.name for node in model.graph.node if node.op_type == "Clip" and not holds_zero(node)}


def _read_unrounded(model: onnx.ModelProto) -> set[str]:
    """The names of activations that graphs inside a node read, a branch's or a loop's: these read what is made, not what is rounded."""
    inside = {name for node in model.graph.node for name in read_inside(node)}
    return {node.name for node in model.graph.node if node.op_type in ACTIVATIONS and node.output[0] in inside}


def _keep_float(model: onnx.ModelProto, in_float: set[str], source: onnx.ModelProto) -> None:
    """Give nodes that stay in float what they are meant to read.

    A value that was made in float, or that no int8 node reads, is not rounded for them; an activation that the rounding's range stood for comes back as ``source`` has it, with
    limits of its own: the writer drops constants that nothing reads any more, or has given them int8 forms. Where one does, the float node reads the rounded value through a Clip that
    clips nothing: onnxruntime's WeightBiasQuantization pass gives a float weight between DequantizeLinear and QuantizeLinear int8 values
    of its own, one scale for all, at load (EfficientNet-Lite0 fell from 21 to 7 dB by one layer kept in "float"); the Clip breaks its pattern.
    """
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    constants = {i.name for i in graph.initializer}
    inputs, outputs = {i.name for i in graph.input}, {o.name for o in graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    activations = {node.output[0]: node for node in source.graph.node if node.op_type in ACTIVATIONS}
    limits_before = {i.name: i for i in source.graph.initializer}
    guards: dict[str, str] = {}
    clips = []

    def active(exact: str) -> str:
        activation = activations.get(exact)
        if activation is None or made[exact].op_type == activation.op_type:
            return exact
        name = f"{exact}/active"
        if name not in guards:
            guards[name] = name
            again = onnx.NodeProto()
            again.CopyFrom(activation)
            again.input[0], again.output[0], again.name = exact, name, name
            for place, limit in enumerate(again.input):
                if limit in limits_before:
                    again.input[place] = f"{name}/{limit}"
                    value = numpy_helper.to_array(limits_before[limit])
                    graph.initializer.append(numpy_helper.from_array(value, again.input[place]))
            clips.append(again)
        return name

    for node in graph.node:
        if node.name not in in_float:
            continue
        for place, name in enumerate(node.input):
            dequantize = made.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.input[0] in constants:
                continue
            exact = made[dequantize.input[0]].input[0]
            made_in_float = exact in inputs or (exact in made and made[exact].name in in_float)
            if name not in outputs and (made_in_float or all(r.name in in_float for r in readers[name])):
                node.input[place] = active(exact)
            elif node.op_type in WEIGHTED:
                if name not in guards:
                    guards[name] = f"{name}/in_float"
                    limits = [f"{name}/low", f"{name}/high"]
                    graph.initializer.extend(
                        numpy_helper.from_array(np.float32(v), n) for v, n in zip((-FAR, FAR), limits, strict=True)
                    )
                    clips.append(onnx.helper.make_node("Clip", [name, *limits], [guards[name]], name=guards[name]))
                node.input[place] = guards[name]
    graph.node.extend(clips)


def _swept(model: onnx.ModelProto) -> None:
    """Take away what nothing reads, and zero points that are zero anyway: five bytes per channel.

    A Gemm's stay: onnxruntime up to 1.23 refuses such a product as it runs when its weights have many scales and no zero points.
    """
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    of_products = {name for node in graph.node if node.op_type == "Gemm" for name in node.input[1:2]}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants and len(node.input) == 3:
            if node.output[0] in of_products:
                continue
            zero = numpy_helper.to_array(constants[node.input[2]])
            if not zero.any() and zero.dtype in (np.int8, np.int32):
                del node.input[2]
    outputs = {o.name for o in graph.output}
    while True:
        read = {name for node in graph.node for name in read_by(node)} | outputs
        kept = [node for node in graph.node if any(name in read for name in node.output)]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    used = [i for i in graph.initializer if i.name in read]
    del graph.initializer[:]
    graph.initializer.extend(used)
    del graph.value_info[:]


def _sorted(graph: onnx.GraphProto) -> None:
    """Every node behind those that make what it reads, as ONNX wants it; the writer and :func:`_keep_float` put theirs at the end."""
    makers = {name: number for number, node in enumerate(graph.node) for name in node.output}
    before = {
        number: {makers[name] for name in read_by(node) if name in makers} for number, node in enumerate(graph.node)
    }
    nodes = [
        onnx.NodeProto.FromString(graph.node[n].SerializeToString()) for n in TopologicalSorter(before).static_order()
    ]
    graph.ClearField("node")
    graph.node.extend(nodes)


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
        scales = scales_of(node, weight, recipe["weights"], recipe["granularity"])
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
