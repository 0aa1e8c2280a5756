"""Stage 2, compile: what is made of a value before it counts. Receives a network, hands on per tensor the function that its readers apply.

A convolution's output that a LeakyRelu reads goes down to -140 and up to 40, and a tenth of what is below zero is left behind it: a range that holds all of it
gives most of its 255 levels to what hardly counts. So a range is judged by what comes out of the readers (:mod:`.statistics`). A maximum over neighbours comes
first where it may (:func:`pools_first`): a rising function of the largest is the largest of the function, at a fourth of the places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx

from .measure import Array
from .tidy import readers_of

Function = Callable[[Array], Array]


REACH = 16.0  # below the largest a Softmax makes a ten-millionth of a value, and 8 bits hold 256ths


class Reading(NamedTuple):
    """``tensor``: whose values are read, which maxima over neighbours may have thinned out; ``function``: what is made of them."""

    tensor: str
    function: Function


def _sigmoid(x: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-np.clip(x, -80, 80)))
    return found


# Operator -> of its attributes, the function. Relu and Clip are not among them: a range stands for those by itself.
_FUNCTIONS: dict[str, Callable[[dict[str, Any]], Function]] = {
    "LeakyRelu": lambda a: lambda x: np.where(x < 0, a.get("alpha", 0.01) * x, x),
    "Elu": lambda a: lambda x: np.where(x < 0, a.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x),
    "HardSigmoid": lambda a: lambda x: np.clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda _: lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Sigmoid": lambda _: _sigmoid,
    "Softplus": lambda _: lambda x: np.logaddexp(0, x),
    "Tanh": lambda _: np.tanh,
}
_GATES = ("HardSigmoid", "Sigmoid")  # of a value that is then multiplied by it: SiLU, HardSwish in two pieces
_RISING = ("Elu", "HardSigmoid", "LeakyRelu", "Sigmoid", "Softplus", "Tanh")


def readings(model: onnx.ModelProto) -> dict[str, Reading]:
    """By the tensors that are read by one known function, or by a maximum over neighbours, and by nothing else."""
    readers, served = readers_of(model.graph), {output.name for output in model.graph.output}
    found = {}
    for node in model.graph.node:
        for name in node.output:
            last, reading = name, readers.get(name, [])
            while len(reading) == 1 and reading[0].op_type == "MaxPool" and last not in served:
                last = reading[0].output[0]
                reading = readers.get(last, [])
            function = None if last in served else _function(last, reading, readers)
            if name not in served and (function or last != name):
                found[name] = Reading(last, function or _as_is)
    return found


def weighed(model: onnx.ModelProto) -> dict[str, int]:
    """By the tensors that nothing but a Softmax reads, the axis along which it weighs their values against each other: what lies far below the largest
    of them counts as nothing, however far. Masks put it there."""
    readers, served = readers_of(model.graph), {output.name for output in model.graph.output}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Softmax" and readers[node.input[0]] == [node] and node.input[0] not in served:
            found[node.input[0]] = next((int(a.i) for a in node.attribute if a.name == "axis"), -1)
    return found


def within_reach(values: Array, axis: int) -> Array:
    """The values as a Softmax along the axis takes them: none further below the largest than matters."""
    found: Array = np.maximum(values, values.max(axis=axis, keepdims=True) - REACH)
    return found


def _as_is(x: Array) -> Array:
    return x


def _function(name: str, reading: list[onnx.NodeProto], readers: dict[str, list[onnx.NodeProto]]) -> Function | None:
    if len(reading) == 1 and reading[0].op_type in _FUNCTIONS:
        return _of(reading[0])
    gates = [node for node in reading if node.op_type in _GATES]
    if len(reading) != 2 or len(gates) != 1:
        return None
    gate, product = _of(gates[0]), next(node for node in reading if node is not gates[0])
    made = gates[0].output[0]
    if product.op_type != "Mul" or set(product.input) != {name, made} or readers.get(made, []) != [product]:
        return None
    return lambda x: x * gate(x)


def _of(node: onnx.NodeProto) -> Function:
    return _FUNCTIONS[node.op_type]({a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})


def pools_first(model: onnx.ModelProto) -> None:
    """Let rising activations that only a MaxPool reads change places with it, in place. The answers stay the same; so do the nodes' names, only what
    lies between the two has another."""
    readers, served = readers_of(model.graph), {output.name for output in model.graph.output}
    order = {node.name: number for number, node in enumerate(model.graph.node)}
    nodes = list(model.graph.node)
    for number, activation in enumerate(nodes):
        reading = readers.get(activation.output[0], [])
        if not _rises(activation) or activation.output[0] in served or len(reading) != 1:
            continue
        pool = reading[0]
        # Someone else who reads what the activation does would need both sizes of it.
        if pool.op_type != "MaxPool" or len(pool.output) != 1 or len(readers[activation.input[0]]) != 1:
            continue
        between = f"{pool.output[0]}/before_{activation.name}"
        activation.output[0], pool.output[0] = pool.output[0], between
        pool.input[0], activation.input[0] = activation.input[0], between
        readers[pool.input[0]], readers[between] = [pool], [activation]
        place = order[pool.name]
        nodes[number], nodes[place] = pool, activation
        order[pool.name], order[activation.name] = number, place
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _rises(node: onnx.NodeProto) -> bool:
    """Whether a larger value never makes a smaller one."""
    alpha = next((a.f for a in node.attribute if a.name == "alpha"), 0.0)
    return node.op_type in _RISING and alpha >= 0
