"""Stage 2, compile: which layers suffer from int8. Receives a float network, statistics and samples, hands on noise per layer.

Each unit is quantized alone, everything else stays float, and the noise that this puts on the outputs is its own (Wu et al. 2020,
"Integer quantization for deep learning inference", section 6). Noise powers of independent layers add up, so that leaving a set
of units in float removes about the sum of theirs. A unit is one weighted operator with its activation, which must not read a rounded value
where the operator stays in float; or all operators of one other kind together: softmax and the like stand or fall as a kind, unless
the kind is among the noisiest: then it is looked at one by one, for it may be one of them.

Where the engine's int8 operators write int8 (TFLite), a value is exact only if its maker and its reader are in float: a loud unit whose noise is
mostly that of what it reads has the makers of that in it. Where an int8 operator can write float (QDQ), the reader alone will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from . import cuts, fused, job
from .gathered import Statistics
from .int8_weights import Settling
from .measure import Array
from .weights import LEVELS, PASSIVE, WEIGHTED, scales_of

SPLIT_SHARE = 0.02  # of all noise, from which a kind is split into its operators
ELEMENTWISE = {
    "Relu", "Clip", "LeakyRelu", "PRelu", "ThresholdedRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Celu", "Softplus",
    "Softsign", "Mish", "Gelu", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Pow", "Reciprocal", "Add", "Sub", "Mul", "Div", "Min", "Max",
}  # fmt: skip
MOSTLY = 0.5  # of a unit's noise
MOST_SPLIT = 80  # operators in all that are looked at one by one, those of the loudest kinds


def measure(
    model: onnx.ModelProto,
    statistics: Statistics,
    feeds: list[dict[str, Array]],
    recipe: dict[str, Any],
    parts: list[dict[str, Any]],
    progress: job.Progress,
    *,
    with_makers: bool = False,
) -> list[dict[str, Any]]:
    """One entry per unit, weighted operators first, in order of the network: ``nodes``, ``kind``, ``noise`` (power that it puts on that part of the outputs where it is the
    most, relative to the part's), ``weight_bytes`` (that stay when it stays float).

    Args:
        parts: each the name of an ``output``, or of it what lies on ``axis`` from ``begin`` to ``end``. With ``found_from`` the output's rows are boxes (corners, score,
            class) in the order of their scores, and are compared wherever they stand, from that score on.
        with_makers: the engine's int8 operators write int8.
    """
    exact = _outputs(model, feeds)
    references = _parts(exact, exact, parts)
    power = [float(np.sum(value**2)) or 1.0 for value in references]
    constants = {i.name: i for i in model.graph.initializer}

    def noise(rounded: onnx.ModelProto) -> float:
        outputs = _parts(_outputs(rounded, feeds), exact, parts)
        powers = [float(np.sum((a - b) ** 2)) for a, b in zip(outputs, references, strict=True)]
        relative = max(n / p for n, p in zip(powers, power, strict=True))
        return relative if np.isfinite(relative) else 1e9

    def size(nodes: Sequence[onnx.NodeProto]) -> int:
        weights = {node.input[1] for node in nodes if node.op_type in WEIGHTED and len(node.input) > 1}
        return sum(4 * int(np.prod(constants[name].dims)) for name in weights if name in constants)

    def unit(kind: str, nodes: Sequence[onnx.NodeProto]) -> dict[str, Any]:
        return {
            "nodes": [node.name for node in nodes], "kind": kind, "weight_bytes": size(nodes),
            "noise": noise(_only(model, nodes, statistics, recipe, settling)),
        }  # fmt: skip

    units, settling = _units(model), Settling(statistics)
    found: list[dict[str, Any]] = []
    for number, (kind, nodes) in enumerate(units):
        progress("sensitivity of layers", number, len(units))
        found.append(unit(kind, nodes))
    loud, left = SPLIT_SHARE * sum(one["noise"] for one in found), MOST_SPLIT
    for whole, (kind, nodes) in sorted(zip(found, units, strict=True), key=lambda pair: -pair[0]["noise"]):
        if not whole["weight_bytes"] and 1 < len(nodes) <= left and whole["noise"] >= loud:
            progress(f"sensitivity of every {kind}", len(units), len(units))
            left -= len(nodes)
            found.remove(whole)
            found += [unit(kind, [node]) for node in nodes]
    if with_makers:
        makers = _Makers(model, units)
        for one in found:
            if one["noise"] >= loud and len(one["nodes"]) < len(model.graph.node):
                nodes = makers.named(one["nodes"])
                read = noise(_only(model, nodes, statistics, recipe))
                if read > MOSTLY * one["noise"]:
                    nodes = makers.with_makers(nodes)
                    one |= {"nodes": [node.name for node in nodes], "weight_bytes": size(nodes)}
    weighted = [one for one in found if one["weight_bytes"]]
    for one, passing in zip(weighted, cuts.passing(model, [one["nodes"] for one in weighted]), strict=True):
        one["passing"] = passing
    progress("sensitivity of layers", len(units), len(units))
    return found


def _units(model: onnx.ModelProto) -> list[tuple[str, list[onnx.NodeProto]]]:
    constants = {i.name for i in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weighted, taken = [], set[str]()
    for node in model.graph.node:
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constants:
            nodes = [node, *_activation(node, readers, constants)]
            weighted.append((node.op_type, nodes))
            taken |= {one.name for one in nodes}
    kinds: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.name not in taken and node.op_type not in PASSIVE:
            kinds.setdefault(node.op_type, []).append(node)
    return weighted + list(kinds.items())


def _activation(
    node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], constants: set[str]
) -> list[onnx.NodeProto]:
    """What goes on element by element with the operator's output alone, in whatever pieces the network has it: SiLU is two, GELU five."""
    known, found = {*node.output, *constants, ""}, list[onnx.NodeProto]()
    open_values = list(node.output)
    while open_values:
        for reader in readers.get(open_values.pop(), []):
            if reader.op_type == "MaxPool" and len(reader.output) == 1:  # which activations may have let pass
                known.update(reader.output)
                open_values += reader.output
            elif reader.op_type in ELEMENTWISE and known.issuperset(reader.input) and reader not in found:
                found.append(reader)
                known.update(reader.output)
                open_values += reader.output
    return found


class _Makers:
    """Who makes what a unit reads."""

    def __init__(self, model: onnx.ModelProto, units: list[tuple[str, list[onnx.NodeProto]]]) -> None:
        self._nodes = {node.name: node for node in model.graph.node}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._with = {node.name: nodes for _, nodes in units if nodes[0].op_type in WEIGHTED for node in nodes}

    def named(self, names: Sequence[str]) -> list[onnx.NodeProto]:
        return [self._nodes[name] for name in names]

    def with_makers(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """The nodes, and each operator that computes what they read, with its activation; what only moves values is passed by."""
        found = {node.name: node for node in nodes}
        read = [name for node in nodes for name in node.input]
        while read:
            maker = self._makers.get(read.pop())
            if maker is None or maker.name in found:
                continue
            if maker.op_type in PASSIVE and maker.name not in self._with:
                read += maker.input[:1]
            else:
                found |= {node.name: node for node in self._with.get(maker.name, [maker])}
        return list(found.values())


def _only(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    statistics: Statistics,
    recipe: dict[str, Any],
    settling: Settling | None = None,
) -> onnx.ModelProto:
    """The network with these nodes' weights and inputs, and what no other node rounds of their outputs, rounded to 8 bits.

    Args:
        settling: of the weights; None: only what they read is rounded.
    """
    own = onnx.ModelProto()
    own.CopyFrom(model)
    wanted = {node.name for node in nodes if node.op_type not in PASSIVE}
    constants = {i.name: i for i in own.graph.initializer}
    ranges = statistics.ranges
    rounder = _Rounder(own, {name: methods[recipe["ranges"]] for name, methods in ranges.items()})
    whole = fused.sums(model) if recipe["fused_activations"] else set()
    outputs = {output.name for output in own.graph.output}
    if settling is not None:
        _settle(own, wanted, constants, recipe, settling)
    kept = list(own.graph.node)
    del own.graph.node[:]
    for node in kept:
        if node.name not in wanted:
            own.graph.node.append(node)
            continue
        for place, name in enumerate(node.input):
            tensor = constants.get(name)
            if tensor is None and name not in whole:
                node.input[place] = rounder.before(name)
        # A weighted operator's output is rounded where it is read, after the activation that is fused into it.
        rounds_its_own = settling is not None and node.op_type not in WEIGHTED
        made = [n for n in node.output if n in ranges and (rounds_its_own or (n in outputs and settling is not None))]
        node.output[:] = [f"{name}/exact" if name in made else name for name in node.output]
        own.graph.node.append(node)
        for name in made:
            rounder.pair(f"{name}/exact", name, of=name)
    return own


def _settle(
    own: onnx.ModelProto,
    wanted: set[str],
    constants: dict[str, onnx.TensorProto],
    recipe: dict[str, Any],
    settling: Settling,
) -> None:
    """Give these nodes weights of their own as int8 holds them."""
    scales: dict[str, Array] = {}
    for node in own.graph.node:
        tensor = constants.get(node.input[1]) if node.op_type in WEIGHTED and len(node.input) > 1 else None
        if node.name not in wanted or tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = node.input[1] = f"{tensor.name}/rounded/{node.name}"
        own.graph.initializer.append(copy)
        scales[copy.name] = scales_of(node, numpy_helper.to_array(copy), recipe["weights"], recipe["granularity"])
    settling.settle(own, scales, recipe)


class _Rounder:
    """Puts QuantizeLinear and DequantizeLinear around single tensors."""

    def __init__(self, model: onnx.ModelProto, ranges: dict[str, list[float]]) -> None:
        self._graph, self._ranges = model.graph, ranges
        self._done: dict[str, str] = {}

    def before(self, name: str) -> str:
        """The rounded form of a tensor that exists already; itself where it is not float."""
        if name not in self._ranges:
            return name
        if name not in self._done:
            self.pair(name, f"{name}/rounded", of=name)
            self._done[name] = f"{name}/rounded"
        return self._done[name]

    def pair(self, source: str, target: str, of: str) -> None:
        """``target`` becomes ``source`` rounded, over the range of ``of``."""
        low, high = self._ranges[of]
        scale = max((high - low) / LEVELS, 1e-12)
        stem = f"{target}/q"
        self._graph.initializer.extend([
            numpy_helper.from_array(np.float32(scale), f"{stem}/scale"),
            numpy_helper.from_array(np.uint8(np.clip(np.round(-low / scale), 0, LEVELS)), f"{stem}/zero"),
        ])  # fmt: skip
        for op, x, y in (("QuantizeLinear", source, stem), ("DequantizeLinear", stem, target)):
            self._graph.node.append(
                helper.make_node(op, [x, f"{stem}/scale", f"{stem}/zero"], [y], name=f"{target}/{op}")
            )


def _parts(
    outputs: dict[str, list[Array]], references: dict[str, list[Array]], parts: list[dict[str, Any]]
) -> list[Array]:
    """Each part's values over all samples, in one row, float64; of rows in the order of their scores those that are beside the reference's."""
    found = []
    for part in parts:
        axis, samples = part.get("axis", 0), outputs[part["output"]]
        if "found_from" in part:
            samples = _side_by_side(samples, references[part["output"]], part["found_from"])
        place = (slice(None),) * axis + (slice(part.get("begin"), part.get("end")),)
        found.append(np.concatenate([sample[place].astype(np.float64).ravel() for sample in samples]))
    return found


def _side_by_side(outputs: list[Array], references: list[Array], found_from: float) -> list[Array]:
    """For each of the reference's boxes the nearest of the same class, zeros where there is none. Of samples of 1 x N x 6: two boxes that change places, which
    a hair's breadth of their scores does, are no noise, and what is no box is none either."""
    found = []
    least = min(found_from, max(float(want[..., 4].max()) for want in references))
    for have, want in zip(outputs, references, strict=True):
        rows = want[0][want[0][:, 4] >= least]
        beside = np.zeros_like(rows)
        for row, box in zip(beside, rows, strict=True):
            own = have[0][np.rint(have[0][:, 5]) == np.rint(box[5])]
            if len(own):
                row[:] = own[np.square(own[:, :4] - box[:4]).sum(axis=1).argmin()]
        found.append(beside[None])
    return found


def _outputs(model: onnx.ModelProto, feeds: list[dict[str, Array]]) -> dict[str, list[Array]]:
    """What the network answers to each sample, by output."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Only the basic passes: the others would fuse the roundings into int8 kernels and cost more than these few runs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = [session.run(None, feed) for feed in feeds]
    return {output.name: [np.asarray(row[i]) for row in rows] for i, output in enumerate(model.graph.output)}
