"""Stage 2, compile: where a network is narrow. Receives a network, hands on how many values pass from what is up to a node to what is behind it.

Where int8 begins behind layers in float, what passes is rounded, a step over each value: it costs least where fewest do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx

from .tidy import read_by


def passing(model: onnx.ModelProto, groups: Sequence[Collection[str]]) -> list[int]:
    """How many values pass behind the last node of each group of nodes.

    Args:
        model: sorted, with shapes inferred; what has none counts as nothing.
        groups: of names of nodes.
    """
    graph = model.graph
    place = {node.name: number for number, node in enumerate(graph.node)}
    made = {i.name: -1 for i in graph.input}
    made |= {name: number for number, node in enumerate(graph.node) for name in node.output}
    last = {name: number for number, node in enumerate(graph.node) for name in read_by(node)}
    last |= {output.name: len(graph.node) for output in graph.output}
    sizes = {
        value.name: int(np.prod([dim.dim_value for dim in value.type.tensor_type.shape.dim], dtype=np.int64))
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    ends = [max(place[name] for name in group) for group in groups]
    return [
        sum(sizes.get(name, 0) for name, number in made.items() if number <= end < last.get(name, -1)) for end in ends
    ]
