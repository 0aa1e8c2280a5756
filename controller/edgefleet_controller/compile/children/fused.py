"""Stage 2, compile: what an engine computes in one. Receives a network, or what the QDQ writer made of it, hands on QDQ with fewer roundings.

Engines that compute a convolution and the activation behind it in one (OpenVINO, TensorRT) hold the sum in 32 bits until the activation is done. A rounding between the two
costs them a step, and the network most of its precision: YOLOv3-tiny's sums reach from -142 to 38, and a LeakyRelu leaves a tenth of what is below zero. A shortcut that is
added to a convolution is such a step, too.
A maximum over neighbours is cheaper in int8, so what it reads is rounded, not what it makes: the answers stay the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import onnx

from .readings import readings
from .tidy import read_by, readers_of
from .weights import WEIGHTED


def sums(model: onnx.ModelProto, in_float: Collection[str] = ()) -> set[str]:
    """The tensors that a weighted operator makes for one activation, or to be added to one other value, and for nobody else.

    Args:
        in_float: names of nodes that stay in float.
    """
    made = {
        name: number for number, node in enumerate(model.graph.node) for name in node.output
        if node.op_type in WEIGHTED and node.name not in in_float
    }  # fmt: skip
    found = {name for name, reading in readings(model).items() if reading.tensor == name and name in made}
    read = Counter(name for node in model.graph.node for name in read_by(node))
    read.update(output.name for output in model.graph.output)
    for node in model.graph.node:
        if node.op_type == "Add" and node.name not in in_float:
            # One of the two: it is added to what is there already, so it is the one that comes last.
            last = max(
                (name for name in node.input if name in made and read[name] == 1), key=made.__getitem__, default=""
            )
            found |= {last} - {""}
    return found


def unrounded(quantized: onnx.ModelProto, tensors: Collection[str]) -> None:
    """Let readers of these tensors have them as they are made, in place; the pairs of nodes that rounded them are left with no reader."""
    rounded = {n.output[0]: n.input[0] for n in quantized.graph.node if n.op_type == "QuantizeLinear"}
    again = {n.output[0]: rounded.get(n.input[0], "") for n in quantized.graph.node if n.op_type == "DequantizeLinear"}
    for node in quantized.graph.node:
        for place, name in enumerate(node.input):
            if again.get(name, "") in tensors:
                node.input[place] = again[name]


def round_before_pools(quantized: onnx.ModelProto, tensors: Collection[str]) -> None:
    """Let the rounding of a maximum over neighbours change places with it, in place, where it reads what becomes of these tensors. Call once nothing is left without a
    reader: a reader in float may not round at all."""
    readers = readers_of(quantized.graph)
    activated = {name for tensor in tensors for node in readers.get(tensor, []) for name in node.output}
    served = {output.name for output in quantized.graph.output}
    for pool in quantized.graph.node:
        if pool.op_type != "MaxPool" or len(pool.output) != 1 or pool.input[0] not in activated:
            continue
        made, rounding = pool.output[0], readers.get(pool.output[0], [])
        if made in served or len(rounding) != 1 or rounding[0].op_type != "QuantizeLinear":
            continue
        back = readers.get(rounding[0].output[0], [])
        if len(back) != 1 or back[0].op_type != "DequantizeLinear" or back[0].output[0] in served:
            continue
        rounding[0].input[0], pool.input[0] = pool.input[0], back[0].output[0]
        for node in readers.get(back[0].output[0], []):
            node.input[:] = [made if name == back[0].output[0] else name for name in node.input]
