"""What cases of one ONNX operator are made with: random choices, a model around the node, and ways to spoil it.

A case is one node with its inputs. Each computed input may come in through a Transpose, so that the converter meets it in any
order; nothing is drawn that the converter's table says it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

OPSETS = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)


@dataclass
class Case:
    """One node. Inputs are arrays; those in ``fixed`` become initializers, ``None`` is an input that is left out."""

    op: str
    opset: int
    inputs: list[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    outputs: int = 1


class Draw:
    """Short names for what the cases draw."""

    def __init__(self, data: Any) -> None:
        self._draw = data.draw
        self.rng = np.random.default_rng(self.int(0, 2**16))

    def int(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def flag(self) -> bool:
        return self._draw(st.booleans())

    def pick(self, choices: Any) -> Any:
        return self._draw(st.sampled_from(list(choices)))

    def perm(self, rank: int) -> list[int]:
        return self._draw(st.permutations(range(rank)))

    def opset(self, low: int = 11, high: int = 21) -> int:
        return self.pick(o for o in OPSETS if low <= o <= high)

    def shape(self, low: int = 1, high: int = 4, largest: int = 5) -> list[int]:
        return [self.int(1, largest) for _ in range(self.int(low, high))]

    def floats(self, shape: Any, scale: float = 1.0) -> Any:
        return (self.rng.normal(size=tuple(shape)) * scale).astype(np.float32)

    def positive(self, shape: Any) -> Any:
        return self.rng.uniform(0.2, 2.0, tuple(shape)).astype(np.float32)

    def ints(self, shape: Any, low: int = -5, high: int = 5) -> Any:
        return self.rng.integers(low, high + 1, tuple(shape)).astype(np.int32)

    def bools(self, shape: Any) -> Any:
        return self.rng.integers(0, 2, tuple(shape)).astype(bool)

    def numbers(self, shape: Any) -> Any:
        return self.ints(shape) if self.flag() else self.floats(shape)

    def axis(self, rank: int) -> int:
        return self.int(-rank, rank - 1)

    def axes(self, rank: int) -> list[int]:
        some = [a for a in range(rank) if self.flag()] or [0]
        return [a - rank if self.flag() else a for a in some]

    def broadcast(self) -> tuple[list[int], list[int]]:
        """Two shapes that broadcast to one another."""
        whole = self.shape(1, 4)
        sides = []
        for _ in range(2):
            start = self.int(0, len(whole)) if not sides else 0
            sides.append([1 if self.int(0, 3) == 0 else n for n in whole[start:]])
        return tuple(sides[:: -1 if self.flag() else 1])  # type: ignore[return-value]


class Dice(Draw):
    """The same without hypothesis: fast, and nothing to shrink."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def int(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def flag(self) -> bool:
        return bool(self.rng.integers(2))

    def pick(self, choices: Any) -> Any:
        choices = list(choices)
        return choices[self.int(0, len(choices) - 1)]

    def perm(self, rank: int) -> list[int]:
        return [int(a) for a in self.rng.permutation(rank)]


def spoil(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Change something in a graph that may break it: an attribute, a dimension, a tensor, a name, the operator set."""
    dice, graph = Dice(rng), model.graph
    node, given = dice.pick(graph.node), dice.pick(graph.input)
    number = dice.pick([0, -1, -5, 1, 2, 7, 2**31, 2**62])
    match dice.int(0, 6):
        case 0 if node.attribute:
            attribute = dice.pick(node.attribute)
            if attribute.ints:
                attribute.ints[dice.int(0, len(attribute.ints) - 1)] = number
            elif attribute.type == onnx.AttributeProto.INT:
                attribute.i = number
            elif attribute.type == onnx.AttributeProto.STRING:
                attribute.s = b"\xff?"
            else:
                attribute.f = float("nan")
        case 1 if node.attribute:
            attribute = dice.pick(node.attribute)
            if attribute.ints and dice.flag():
                attribute.ints.append(1)
            else:
                node.attribute.remove(attribute)
        case 2 if graph.initializer:
            tensor = dice.pick(graph.initializer)
            if tensor.dims and dice.flag():
                tensor.dims[0] = number
            else:
                tensor.dims.append(2)
        case 3 if graph.initializer:
            tensor = dice.pick(graph.initializer)
            if dice.flag():
                tensor.data_type = dice.int(0, 23)
            else:
                tensor.raw_data = tensor.raw_data[:-1]
        case 4:
            node.input[dice.int(0, len(node.input) - 1)] = dice.pick(["", "y0", "x0", "nothing"])
        case 5:
            model.opset_import[0].version = dice.pick([0, 1, 6, 8, 11, 13, 18, 22, 99])
        case _:
            dimensions = given.type.tensor_type.shape.dim
            if dimensions:
                dice.pick(dimensions).dim_value = number


def model_of(case: Case, draw: Draw) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The case as a model, and what to feed it."""
    nodes, given, constants, feeds, names = [], [], [], {}, []
    for position, array in enumerate(case.inputs):
        name = "" if array is None else f"x{position}"
        names.append(name)
        if array is None:
            continue
        array = np.asarray(array)
        if position in case.fixed:
            constants.append(numpy_helper.from_array(array, name))
            continue
        if array.ndim > 1 and draw.flag():
            perm = draw.perm(array.ndim)
            nodes.append(helper.make_node("Transpose", [f"{name}_turned"], [name], name=f"turn{position}", perm=perm))
            array, name = np.ascontiguousarray(array.transpose(np.argsort(perm))), f"{name}_turned"
        feeds[name] = array
        given.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    outputs = [f"y{i}" for i in range(case.outputs)]
    nodes.append(helper.make_node(case.op, names, outputs, name="it", **case.attributes))
    graph = helper.make_graph(nodes, "case", given, [onnx.ValueInfoProto(name=name) for name in outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)])
    model.ir_version = 8
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    for output in model.graph.output:
        # ONNX 1.23 infers nothing for GroupNormalization.
        output.type.tensor_type.elem_type = types[output.name].type.tensor_type.elem_type or onnx.TensorProto.FLOAT
    return model, feeds
