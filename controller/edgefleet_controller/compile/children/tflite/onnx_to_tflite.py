"""Stage 2, compile: ONNX to a float .tflite. Receives a simplified ONNX model with fixed shapes, hands on the file's bytes.

The table of operators is put together here; each kind has a module of its own. ``docs/generated/tflite-operators.md`` is written
from it.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx

from . import (
    activation,
    convolution,
    elementwise,
    matrix,
    pooling,
    reduction,
    resize,
    shape,
)
from .writer import Operator, Writer

KINDS: dict[str, dict[str, Operator]] = {
    "Convolutions": convolution.TABLE,
    "Pools": pooling.TABLE,
    "Matrix products": matrix.TABLE,
    "Activations": activation.TABLE,
    "Element by element": elementwise.TABLE,
    "Reductions and normalisations": reduction.TABLE,
    "Resizing": resize.TABLE,
    "Shapes": shape.TABLE,
}
OPERATORS: dict[str, Operator] = {name: row for table in KINDS.values() for name, row in table.items()}


class Converted(NamedTuple):
    """A float .tflite, and names of tensors by which its quantizer is steered.

    Attributes:
        made: by the node's name, the tensor that comes out of it, after what is fused into it. What an operator needs beside is
            named ``<ONNX's value>/<part>``.
        whole: tensors whose operators must be left whole: of whole numbers, or without an int8 kernel in some runtime.
        same_as: for tensors that only the file has, the one whose numbers they hold in another order or shape.
    """

    content: bytes
    made: dict[str, str]
    whole: list[str]
    same_as: dict[str, str]


def convert(model: onnx.ModelProto) -> Converted:
    """A float .tflite with ONNX's inputs and outputs.

    Raises:
        Refused: an operator, or a use of one, that TFLite or this writer lacks, or a graph that is broken; names node and operator.
    """
    writer = Writer(model, OPERATORS)
    content = writer.write()
    return Converted(content, writer.made, writer.whole, writer.same_as)
