"""Stage 2, compile: the weights and biases of a network as int8 will hold them. Receives scales and statistics, changes a network in place.

Whoever writes the int8 file afterwards rounds to the nearest whole number, which finds weights that are whole already.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import numpy_helper

from . import moments
from .fitting import fitted
from .gathered import Statistics
from .weights import WEIGHTED, Array, axis_of, correct_biases, correction, rounded

Recipe = dict[str, Any]


class Settling:
    """Settles one network's weights, by several recipes: what was fitted once is fitted."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._done: dict[tuple[tuple[str, ...], bytes, bool], Array] = {}

    def settle(self, model: onnx.ModelProto, scales: dict[str, Array], recipe: Recipe) -> None:
        """Give weights the values that int8 has for them, and biases what that takes from the mean output, as far as the recipe asks for either.

        Args:
            scales: of weights by their names, one per output channel or one alone.
        """
        constants = {i.name: i for i in model.graph.initializer}
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in scales:
                readers.setdefault(node.input[1], []).append(node)
        lost: dict[str, Array] = {}
        for name, nodes in readers.items():
            weight, axis = numpy_helper.to_array(constants[name]), axis_of(nodes[0])
            read, named = None, tuple(node.name for node in nodes)
            if recipe["fit_weights"]:
                read = moments.named(self._statistics.reads, self._statistics.moments, named)
            if read is None:
                lost[name] = weight - rounded(weight, scales[name], axis)
                continue
            centred = recipe["correct_bias"] and all(
                correction(node, weight, self._statistics.means, constants) is not None for node in nodes
            )
            key = (named, scales[name].tobytes(), centred)
            if key not in self._done:
                self._done[key] = fitted(weight, scales[name], axis, read, centred=centred)
            lost[name] = weight - self._done[key]
            constants[name].CopyFrom(numpy_helper.from_array(self._done[key], name))
        if recipe["correct_bias"]:
            correct_biases(model, self._statistics.means, lost)
