"""Stage 2, compile: how a value lies in a .tflite. Receives shapes and axis orders, hands on orders; pure arithmetic.

ONNX keeps pictures as N x C x H x W, TFLite computes on N x H x W x C. A value therefore carries, beside the shape that ONNX sees,
an *order*: at place ``i`` of the stored tensor is ONNX's axis ``order[i]``. ONNX's Transpose only renames axes, most reshapes only
split or join stored neighbours, and an operator asks for the order that it computes in; a TRANSPOSE is written where
the two differ, and nowhere else (ADR 0009). Axes of size 1 can stand anywhere: moving them moves no bytes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Order = tuple[int, ...]
Shape = tuple[int, ...]


class Value(NamedTuple):
    """A tensor under way: its index in the file, its shape as ONNX sees it, and the order in which it lies."""

    tensor: int
    shape: Shape
    order: Order
    dtype: np.dtype[Any]

    @property
    def stored(self) -> Shape:
        """The tensor's shape in the file."""
        return tuple(self.shape[axis] for axis in self.order)

    def place(self, axis: int) -> int:
        """Where one of ONNX's axes is stored."""
        return self.order.index(axis)


def plain(rank: int) -> Order:
    """ONNX's own order."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """N x H x W x C, and the like in other ranks."""
    return (0, *range(2, rank), 1) if rank > 1 else plain(rank)


def with_last(order: Order, *axes: int) -> Order:
    """The order with these axes moved to its end."""
    return (*(axis for axis in order if axis not in axes), *axes)


def same_bytes(shape: Shape, one: Order, other: Order) -> bool:
    """Whether a tensor lies alike in both orders."""
    return [a for a in one if shape[a] != 1] == [a for a in other if shape[a] != 1]


def transposed(value: Value, perm: Order) -> Value:
    """ONNX's Transpose: the same bytes under other names."""
    names = {old: new for new, old in enumerate(perm)}
    return value._replace(shape=tuple(value.shape[a] for a in perm), order=tuple(names[a] for a in value.order))


def widened(value: Value, rank: int) -> Value:
    """The value with axes of size 1 put in front, as broadcasting does; the bytes stay."""
    more = rank - len(value.shape)
    order = (*range(more), *(axis + more for axis in value.order))
    return value._replace(shape=(1,) * more + value.shape, order=order)


def regrouped(shape: Shape, order: Order, target: Shape) -> tuple[Order, Order]:
    """How a reshape goes without leaving the order more than it has to.

    Returns:
        The order of the source from which it is a mere reinterpretation of the bytes (``order`` itself where possible), and the
        order in which the result then lies.
    """
    blocks = _blocks(shape, target)
    block_of = {axis: block for block in blocks for axis in block[0]}
    source: list[int] = []
    result: list[int] = []
    for axis in order:
        if axis in source or shape[axis] == 1:
            continue
        sources, targets = block_of[axis]
        source += sources
        result += targets
    units = [axis for axis in order if shape[axis] == 1]
    candidate = (*units, *source)
    return order if same_bytes(shape, candidate, order) else candidate, _with_units(result, target)


def _blocks(shape: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes that hold the same elements on both sides; axes of size 1 are in none."""
    left = [axis for axis, size in enumerate(shape) if size != 1]
    right = [axis for axis, size in enumerate(target) if size != 1]
    blocks: list[tuple[list[int], list[int]]] = []
    while left:
        sources, targets = [left.pop(0)], [right.pop(0)]
        while (a := math.prod(shape[i] for i in sources)) != (b := math.prod(target[i] for i in targets)):
            if a < b:
                sources.append(left.pop(0))
            else:
                targets.append(right.pop(0))
        blocks.append((sources, targets))
    return blocks


def _with_units(result: list[int], target: Shape) -> Order:
    """Places for the axes of size 1: as pictures lie if that fits, else in ONNX's order where it can be kept."""
    for order in (plain(len(target)), channels_last(len(target))):
        if [a for a in order if target[a] != 1] == result:
            return order
    return (*(a for a, size in enumerate(target) if size == 1), *result)
