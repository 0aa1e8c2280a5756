"""Stage 2, compile: gates that came in pieces. Receives a network's graph, hands on the same with them whole.

Paddle writes a HardSwish as x * clip(x + 3, 0, 6) / 6, and so did torch for a long time. Each of the four is a step over all values and, in int8, a rounding of its own;
engines know the gate by its name.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

ALIKE = 1e-5  # relative; what numbers in float32 may differ by that mean the same


def gates_whole(graph: onnx.GraphProto, readers: dict[str, list[onnx.NodeProto]]) -> None:
    """Put HardSigmoid in place of a sum, a Clip and a division, in place: clip(x + c, 0, m) / m, also where what is divided is the product with x.

    Args:
        readers: by the names of tensors who reads them, inside branches too.
    """
    served = {output.name for output in graph.output}
    numbers = {
        i.name: float(numpy_helper.to_array(i).reshape(-1)[0]) for i in graph.initializer
        if i.data_type == onnx.TensorProto.FLOAT and list(i.dims) in ([], [1])
    }  # fmt: skip
    maker = {name: node for node in graph.node for name in node.output}

    def only_reader(name: str) -> onnx.NodeProto | None:
        reading = readers.get(name, [])
        return reading[0] if len(reading) == 1 and name not in served else None

    gone: set[int] = set()
    new: dict[int, list[onnx.NodeProto]] = {}
    for clip in graph.node:
        total = maker.get(clip.input[0]) if clip.op_type == "Clip" and len(clip.input) == 3 else None
        if total is None or total.op_type != "Add" or only_reader(clip.input[0]) is None:
            continue
        low, high = (numbers.get(name) for name in clip.input[1:])
        for x, summand in _either(total, numbers):
            after = only_reader(clip.output[0])
            if low != 0 or not high or after is None:
                continue
            product = after if after.op_type == "Mul" and {*after.input} == {x, clip.output[0]} else None
            last = after if product is None else only_reader(product.output[0])
            divided = clip.output[0] if product is None else product.output[0]
            if last is None or not np.isclose(_divisor(last, divided, numbers), high, rtol=ALIKE):
                continue
            gate = last.output[0] if product is None else clip.output[0]
            sigmoid = helper.make_node(
                "HardSigmoid",
                [x],
                [gate],
                name=clip.name if product is not None else last.name,
                alpha=1 / high,
                beta=summand / high,
            )
            gone |= {id(node) for node in (total, clip, last, product) if node is not None}
            new[id(last)] = [sigmoid]
            if product is not None:
                new[id(last)].append(helper.make_node("Mul", [x, gate], list(last.output), name=last.name))
            break
    if gone:
        kept = [one for node in graph.node for one in (new.get(id(node), []) if id(node) in gone else [node])]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _either(total: onnx.NodeProto, numbers: dict[str, float]) -> Iterator[tuple[str, float]]:
    """(the value, the number) of a sum of the two."""
    for value, number in (total.input, reversed(total.input)):
        if number in numbers and value not in numbers:
            yield value, numbers[number]


def _divisor(node: onnx.NodeProto, divided: str, numbers: dict[str, float]) -> float:
    """What a node divides a value by; NaN where it does something else."""
    if node.op_type == "Div" and node.input[0] == divided:
        return numbers.get(node.input[1], float("nan"))
    if node.op_type == "Mul" and divided in node.input:
        by = numbers.get(next((name for name in node.input if name != divided), ""), 0.0)
        return 1 / by if by else float("nan")
    return float("nan")
