"""Stage 2, compile: one number for all values. Receives a network's graph, hands on the same with such factors and summands in weights.

Paddle's mobile networks have a learned factor and summand before and behind each activation ("learnable affine blocks"), others a factor for each head. onnxruntime puts
such into a convolution's weights where there is one number per channel, not where there is one for all: each is then a step over all values and, in int8, a rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from .names import Names

Array = npt.NDArray[Any]
CONVOLUTIONS = ("Conv", "ConvTranspose")
LEAST_RANK = 3  # of what a convolution makes: a number of no more axes adds none
MOST_FACTOR, MOST_SUMMAND = 16.0, 1e4  # beyond, half precision may not hold weights or biases


class Affine(NamedTuple):
    """What a node does to ``value``, all of it: ``factor`` * value + ``summand``; one of the two is idle."""

    value: str
    factor: float
    summand: float


def numbers_of(graph: onnx.GraphProto) -> dict[str, float]:
    """The float32 constants that are one number for all values of a picture, by name."""
    found = {}
    for tensor in graph.initializer:
        if (
            tensor.data_type == onnx.TensorProto.FLOAT
            and len(tensor.dims) <= LEAST_RANK
            and all(size == 1 for size in tensor.dims)
        ):
            value = float(numpy_helper.to_array(tensor).reshape(-1)[0])
            if np.isfinite(value):
                found[tensor.name] = value
    return found


def affine_of(node: onnx.NodeProto, numbers: Mapping[str, float]) -> Affine | None:
    """What a node does, where it multiplies by one number for all values, or adds one; None for what else it does, and where it takes all away."""
    if node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    first, second = node.input
    if second in numbers and first not in numbers:
        value, number = first, numbers[second]
    elif first in numbers and second not in numbers and node.op_type in ("Mul", "Add"):
        value, number = second, numbers[first]
    else:
        return None
    if node.op_type in ("Add", "Sub"):
        return Affine(value, 1.0, number if node.op_type == "Add" else -number)
    if not number:
        return None
    return Affine(value, number if node.op_type == "Mul" else 1 / number, 0.0)


def fold_affine(graph: onnx.GraphProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put factors and summands into the weights of the convolution before them, else of all those behind them, in place.

    Args:
        graph: sorted.
        readers: by the names of tensors who reads them, inside branches too.
    """
    fold = _Folding(graph, readers)
    for node in list(graph.node):
        affine = fold.affine_of(node)
        if affine is not None and fold.into_maker(node, affine):
            graph.node.remove(node)
    for node in reversed(list(graph.node)):  # the summand behind a factor goes first
        affine = fold.affine_of(node)
        if affine is not None and (fold.into_readers(node, affine) or fold.past_summand(node, affine)):
            graph.node.remove(node)


class _Folding:
    """A graph's constants, and who makes and reads what, kept up to date."""

    def __init__(self, graph: onnx.GraphProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
        self._graph = graph
        self._constants = {i.name: i for i in graph.initializer}
        self._names, self._numbers = Names(graph), numbers_of(graph)
        self._maker = {name: node for node in graph.node for name in node.output}
        self._readers = {name: list(nodes) for name, nodes in readers.items()}
        self._served = {output.name for output in graph.output}

    def affine_of(self, node: onnx.NodeProto) -> Affine | None:
        """None also for what is too much for weights."""
        affine = affine_of(node, self._numbers)
        if affine is None or abs(affine.summand) > MOST_SUMMAND:
            return None
        return affine if 1 / MOST_FACTOR <= abs(affine.factor) <= MOST_FACTOR else None

    def into_maker(self, node: onnx.NodeProto, affine: Affine) -> bool:
        """Whether the weights of what makes the value have it now."""
        made = self._maker.get(affine.value)
        alone = len(self._readers[affine.value]) == 1 and affine.value not in self._served
        if made is None or not alone or not self._takes(made):
            return False
        weight, bias = self._weight(made), self._bias(made)
        self._set(
            made, weight * np.float32(affine.factor), bias * np.float32(affine.factor) + np.float32(affine.summand)
        )
        made.output[0] = node.output[0]
        self._maker[node.output[0]] = made
        return True

    def into_readers(self, node: onnx.NodeProto, affine: Affine) -> bool:
        """Whether the weights of all that read what a node makes have it now. A summand can't be put behind a frame of zeros."""
        reading = self._all_convolutions(node.output[0])
        if (
            not reading
            or self._adds_axes(node, reading)
            or (affine.summand and any(_has_frame(one) for one in reading))
        ):
            return False
        for one in reading:
            weight, bias = self._weight(one), self._bias(one)
            summed = weight.reshape(len(weight), -1).sum(axis=1, dtype=np.float64) * affine.summand
            self._set(one, weight * np.float32(affine.factor), (bias + summed).astype(np.float32))
            one.input[0] = affine.value
        self._read_by(affine.value, node, reading)
        return True

    def past_summand(self, node: onnx.NodeProto, affine: Affine) -> bool:
        """Whether a factor is in the weights behind a summand that stays before a frame now: a * x + b is a * (x + b / a)."""
        behind = self._readers.get(node.output[0], [])
        stays = self.affine_of(behind[0]) if len(behind) == 1 and node.output[0] not in self._served else None
        reading = self._all_convolutions(behind[0].output[0]) if stays is not None and stays.summand else []
        if affine.summand or stays is None or not reading or any(self._adds_axes(n, reading) for n in (node, *behind)):
            return False
        for one in reading:
            self._set(one, self._weight(one) * np.float32(affine.factor), self._bias(one))
        summand = self._constant(f"{behind[0].name}/summand", np.float32(stays.summand / affine.factor))
        self._numbers[summand] = stays.summand / affine.factor
        behind[0].op_type, behind[0].input[:] = "Add", [affine.value, summand]
        self._read_by(affine.value, node, behind)
        return True

    def _all_convolutions(self, name: str) -> list[onnx.NodeProto]:
        """Who reads a value, where these are convolutions alone."""
        reading = self._readers.get(name, [])
        alone = all(self._takes(one) and one.op_type == "Conv" and one.input[0] == name for one in reading)
        return reading if alone and name not in self._served else []

    def _adds_axes(self, node: onnx.NodeProto, reading: Sequence[onnx.NodeProto]) -> bool:
        """Whether the number of a node may have axes that its value has not: as many as who reads it then."""
        axes = min(len(self._constants[one.input[1]].dims) for one in reading)
        return any(len(self._constants[name].dims) >= axes for name in node.input if name in self._constants)

    def _read_by(self, value: str, gone: onnx.NodeProto, instead: list[onnx.NodeProto]) -> None:
        self._readers[value] = [one for one in self._readers[value] if one is not gone] + instead

    def _takes(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a convolution whose weight and bias are known."""
        return (
            node.op_type in CONVOLUTIONS
            and self._float(node.input[1])
            and (len(node.input) < 3 or self._float(node.input[2]))
        )

    def _float(self, name: str) -> bool:
        return name in self._constants and self._constants[name].data_type == onnx.TensorProto.FLOAT

    def _weight(self, node: onnx.NodeProto) -> Array:
        weight: Array = numpy_helper.to_array(self._constants[node.input[1]])
        return weight

    def _bias(self, node: onnx.NodeProto) -> Array:
        """One per output channel; zeros where there is none."""
        if len(node.input) > 2:
            bias: Array = numpy_helper.to_array(self._constants[node.input[2]])
            return bias
        weight = self._weight(node)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        return np.zeros(len(weight) if node.op_type == "Conv" else weight.shape[1] * groups, np.float32)

    def _set(self, node: onnx.NodeProto, weight: Array, bias: Array) -> None:
        """Give a node a weight and a bias of its own; a bias of zeros that it did not have it does not get."""
        node.input[1] = self._constant(f"{node.name}/weight", weight)
        if len(node.input) > 2:
            node.input[2] = self._constant(f"{node.name}/bias", bias)
        elif bias.any():
            node.input.append(self._constant(f"{node.name}/bias", bias))

    def _constant(self, name: str, values: Array) -> str:
        """The name of a constant of these values: this one, or where others have it already one like it."""
        name = self._names.free(name)
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        self._constants[name] = self._graph.initializer[-1]
        return name


def _has_frame(node: onnx.NodeProto) -> bool:
    """Whether a convolution puts zeros around what it reads."""
    told = {a.name: a for a in node.attribute}
    automatic = "auto_pad" in told and told["auto_pad"].s not in (b"NOTSET", b"VALID")
    return automatic or ("pads" in told and any(told["pads"].ints))
