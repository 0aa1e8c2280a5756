"""Stage 2, compile: one node of an ONNX graph as the writers of a .tflite see it, and the types of its values. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .. import job
from .graph import Array


class Type(NamedTuple):
    """A value's shape and element type, as ONNX has them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Node:
    """One node: attributes by name (strings decoded), constant inputs as arrays, and the types of what it makes.

    Attributes:
        inputs: names of values; ``""`` where an optional one is left out.
        values: for each input its array, or ``None`` where it is computed or left out.
        outputs: names; ``""`` for one that nobody asks for.
        made: the type of each output; nothing for ``""``.
    """

    op: str
    name: str
    opset: int
    inputs: tuple[str, ...]
    values: tuple[Array | None, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    made: dict[str, Type] = field(repr=False)

    @property
    def output(self) -> str:
        return self.outputs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.made[self.outputs[0]].shape

    def get(self, attribute: str, default: Any = None) -> Any:
        return self.attributes.get(attribute, default)

    def has(self, position: int) -> bool:
        """Whether that input is given."""
        return len(self.inputs) > position and self.inputs[position] != ""

    def fixed(self, position: int) -> Array:
        """An input that has to be a constant."""
        values = self.values[position] if self.has(position) else None
        if values is None:
            given = self.inputs[position] if self.has(position) else ""
            raise self.refused(f"with a computed input {given!r}" if given else f"without its input {position}")
        return values

    def optional(self, position: int) -> Array | None:
        """A constant input that may be left out."""
        return self.fixed(position) if self.has(position) else None

    def ints(self, attribute: str, position: int) -> list[int] | None:
        """A list that was an attribute in older operator sets and is a constant input in newer ones; ``None``: not given."""
        if attribute in self.attributes:
            return [int(i) for i in np.atleast_1d(self.attributes[attribute])]
        values = self.optional(position)
        return None if values is None else [int(i) for i in np.atleast_1d(values)]

    def number(self, attribute: str, position: int) -> float | None:
        """One number, given either way."""
        if attribute in self.attributes:
            return float(self.attributes[attribute])
        values = self.optional(position)
        return None if values is None or values.size != 1 else float(values.item())

    def refused(self, why: str = "") -> job.Refused:
        """This node can't be expressed: ``why`` continues "tflite has no operator Conv ..."."""
        return job.Refused(
            "bad_model",
            f"tflite has no operator {self.op}{' ' + why if why else ''} (node {self.name!r})",
            "what it has stands in docs/generated/tflite-operators.md: export the network without this one, or serve the class by onnxruntime",
        )
