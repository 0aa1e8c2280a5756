"""Stage 2, compile: names that are free. Receives a graph, hands on names for what is put into it that nothing has there, or in graphs inside it."""

from __future__ import annotations

import onnx


class Names:
    """The names of a graph's values and nodes: exporters name a PRelu's slopes as the rest of us would a weight that replaces them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._taken = _names_in(graph)

    def free(self, wanted: str) -> str:
        """``wanted``, or what is like it and free; it is taken then."""
        while wanted in self._taken:
            wanted += "/own"
        self._taken.add(wanted)
        return wanted


def _names_in(graph: onnx.GraphProto) -> set[str]:
    found = {one.name for one in (*graph.input, *graph.initializer, *graph.node)}
    for node in graph.node:
        found |= set(node.output)
        for attribute in node.attribute:
            for inside in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found |= _names_in(inside)
    return found
