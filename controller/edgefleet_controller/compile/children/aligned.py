"""Stage 2, compile: channels in numbers that int8 kernels are fast at. Receives a QDQ network, hands on the same with channels of zeros added.

onnxruntime's depthwise convolutions take 16 channels at once and what is left one by one, its other convolutions multiply 4 values at once: 72 channels take
three times as long as 80, and a picture's three channels twice as long as four (MobileNetV3 has 72, 120, 184 and 200). An added channel is made by weights of zero and read by
weights of zero, so that nothing else changes, not by a bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .measure import Array
from .tidy import read_inside, readers_of

AT_ONCE_DEPTHWISE, AT_ONCE = 16, 4  # channels
MOST_GROWTH = 2  # times the channels
PAD_OPSET = 13  # from which Pad takes 8 bits

# Operators that make each channel of one channel; what they make of zeros is finite, and read by weights of zero.
_UNARY = {
    "AveragePool", "Clip", "DequantizeLinear", "Elu", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
    "MaxPool", "QuantizeLinear", "Relu", "Resize", "Sigmoid", "Softplus", "Tanh",
}  # fmt: skip
_BINARY = {"Add", "Max", "Min", "Mul", "Sub"}


def align(model: onnx.ModelProto) -> None:
    """Add channels, in place, where a convolution in int8 has a number of them that it is slow at and weights alone decide how many there are.

    Args:
        model: sorted; new nodes are put at its end.
    """
    network = _Network(model)
    growth = network.growth()
    for node in network.convolutions:
        network.grow(node, growth)
    for node in network.widening:
        network.widen(node, growth)
    network.grow_pictures(growth)


class _Network:
    """A network's tensors by what has to grow together: sets of tensors with the same channels."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._graph = model, model.graph
        shapes = onnx.shape_inference.infer_shapes(model).graph
        self._shape = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*shapes.value_info, *shapes.input, *shapes.output)
        }
        self._constants = {i.name: i for i in self._graph.initializer}
        self._maker = {name: node for node in self._graph.node for name in node.output}
        self._readers = readers_of(self._graph)
        self._parent: dict[str, str] = {}
        self._fixed: set[str] = set()
        self.convolutions = [node for node in self._graph.node if node.op_type == "Conv"]
        self.widening: list[onnx.NodeProto] = []  # what puts channels of zeros behind those that it reads
        self._fix([v.name for v in (*self._graph.input, *self._graph.output)])
        for node in self._graph.node:
            self._fix(read_inside(node))
            self._take(node)

    def growth(self) -> dict[str, int]:
        """By the names of sets, how many channels are to be added."""
        wanted: dict[str, int] = {}
        for node in self.convolutions:
            if not self._is_int8(node):
                continue
            at_once = AT_ONCE if _groups(node) == 1 else AT_ONCE_DEPTHWISE
            whole = self._find(node.input[0])
            wanted[whole] = max(wanted.get(whole, 0), at_once)
        fixed = {self._find(name) for name in self._fixed}
        found = {}
        for whole, at_once in wanted.items():
            channels = self._channels(whole)
            more = -channels % at_once
            if more and whole not in fixed and channels + more <= MOST_GROWTH * channels:
                found[whole] = more
        # What is widened can't have more channels than what becomes of it.
        while too_many := [node for node in self.widening if self._widened(node, found) < 0]:
            for node in too_many:
                found.pop(self._find(node.input[0]), None)
        return found

    def _widened(self, node: onnx.NodeProto, growth: dict[str, int]) -> int:
        """By how many channels a node widens what it reads, all grown."""
        read, made = node.input[0], node.output[0]
        added = growth.get(self._find(made), 0) - growth.get(self._find(read), 0)
        return self._channels(made) - self._channels(read) + added

    def grow(self, node: onnx.NodeProto, growth: dict[str, int]) -> None:
        """Give a convolution's weights what the channels that it makes and reads grow by."""
        made, read = growth.get(self._find(node.output[0]), 0), growth.get(self._find(node.input[0]), 0)
        for place in range(1, len(node.input) if made else 0):
            self._grow(node, place, 0, made)
        if read and _groups(node) == 1:
            self._grow(node, 1, 1, read)
        elif read:
            next(a for a in node.attribute if a.name == "group").i += read

    def widen(self, node: onnx.NodeProto, growth: dict[str, int]) -> None:
        """Let a node put as many zeros behind what it reads as what it makes is wider now; those that were added are zeros as well."""
        if {self._find(node.input[0]), self._find(node.output[0])}.isdisjoint(growth):
            return
        more = self._widened(node, growth)
        if not more:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
            return
        pads = self._values(node.input[1]).copy()
        pads[pads.size // 2 + 1] = more
        node.input[1] = f"{node.output[0]}/pads"
        self._graph.initializer.append(numpy_helper.from_array(pads, node.input[1]))

    def _came_last(self, name: str) -> bool:
        """Whether a picture's channels came last, as TensorFlow has them: onnxruntime pads it as it came, pixel by pixel, which takes longer than is won."""
        while (made := self._maker.get(name)) is not None and made.op_type in _UNARY | _BINARY | {"Cast", "Div"}:
            name = next((read for read in made.input if read not in self._constants), "")
        if made is None or made.op_type != "Transpose":
            return False
        order = next((list(a.ints) for a in made.attribute if a.name == "perm"), [])
        return len(order) > 1 and order[1] == len(order) - 1

    def grow_pictures(self, growth: dict[str, int]) -> None:
        """Add channels to pictures behind their rounding, for convolutions in int8."""
        opset = next((entry.version for entry in self._model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        if opset < PAD_OPSET:
            return
        padded: dict[str, str] = {}
        for node in self.convolutions:
            read = self._maker.get(node.input[0])
            if not self._is_int8(node) or _groups(node) != 1 or read is None or read.op_type != "DequantizeLinear":
                continue
            if self._find(node.input[0]) in growth or len(self._readers[node.input[1]]) > 1:
                continue
            rounded = self._maker.get(read.input[0])
            shape = self._shape.get(node.input[0], [])
            if rounded is None or len(shape) < 3 or not 0 < shape[1] < AT_ONCE or len(read.input) < 3:
                continue
            if self._came_last(rounded.input[0]):
                continue
            more = AT_ONCE - shape[1]
            if read.output[0] not in padded:
                padded[read.output[0]] = self._pad(read, len(shape), more)
            self._grow(node, 1, 1, more)
            node.input[0] = padded[read.output[0]]

    def _pad(self, read: onnx.NodeProto, rank: int, more: int) -> str:
        """The name of what a DequantizeLinear makes, with channels of zeros behind its own."""
        name = f"{read.output[0]}/aligned"
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + 1] = more
        self._graph.initializer.append(numpy_helper.from_array(pads, f"{name}/pads"))
        pad = helper.make_node(
            "Pad", [read.input[0], f"{name}/pads", read.input[2]], [f"{name}/rounded"], name=f"{name}/Pad"
        )
        again = helper.make_node(
            "DequantizeLinear", [f"{name}/rounded", *read.input[1:]], [name], name=f"{name}/DequantizeLinear"
        )
        self._graph.node.extend([pad, again])
        return name

    def _grow(self, node: onnx.NodeProto, place: int, axis: int, more: int) -> None:
        """Zeros behind a constant's own values along an axis; of a rounded one the scales too, where there is one for each channel."""
        name = node.input[place]
        if name in self._constants:
            node.input[place] = self._longer(name, axis, more, repeat=False)
            return
        rounded = self._maker[name]
        per_channel = self._values(rounded.input[1]).ndim == 1 and axis == _axis(rounded)
        for number in range(len(rounded.input)):
            if number == 0 or per_channel:
                # A scale of zero would be none.
                rounded.input[number] = self._longer(
                    rounded.input[number], axis if number == 0 else 0, more, repeat=number == 1
                )

    def _longer(self, name: str, axis: int, more: int, *, repeat: bool) -> str:
        values = self._values(name)
        by = [(0, more if number == axis else 0) for number in range(values.ndim)]
        longer = np.pad(values, by, mode="edge") if repeat else np.pad(values, by)
        found = f"{name}/{axis}+{more}"
        if found not in self._constants:
            self._constants[found] = numpy_helper.from_array(np.ascontiguousarray(longer), found)
            self._graph.initializer.append(self._constants[found])
        return found

    def _take(self, node: onnx.NodeProto) -> None:
        """Learn which of a node's tensors grow together, and which can't."""
        read = [name for name in node.input if name and not self._is_constant(name)]
        if node.domain == "" and len(node.output) == 1 and read:
            match node.op_type:
                case "Conv" if len(read) == 1 and node.input[0] == read[0] and self._owns_weights(node):
                    if _groups(node) == 1:
                        return
                    if _groups(node) == self._channels(read[0]) == self._channels(node.output[0]):
                        self._join(read[0], node.output[0])
                        return
                case "Pad" if len(read) == 1 and self._is_widening(node):
                    self.widening.append(node)
                    return
                case op if op in _UNARY and len(read) == 1 and self._alike(node):
                    self._join(read[0], node.output[0])
                    return
                case op if op in _BINARY and self._alike(node):
                    for name in read:
                        if self._channels(name) > 1:
                            self._join(name, node.output[0])
                    return
        self._fix([*read, *node.output])

    def _alike(self, node: onnx.NodeProto) -> bool:
        """Whether all that a node reads and makes has its channels in one place, and none of it says how many there are."""
        rank, channels = len(self._shape.get(node.output[0], [])), self._channels(node.output[0])
        if rank < 3 or (node.op_type == "Resize" and len(node.input) > 3):
            return False
        for name in filter(None, node.input):
            if self._is_constant(name):
                # Limits, scales and summands: numbers for all channels alike. What Resize multiplies sizes by has a number for each axis.
                if node.op_type != "Resize" and self._values(name).size != 1:
                    return False
            elif len(self._shape.get(name, [])) != rank or self._channels(name) not in (1, channels):
                return False
        return node.op_type in _BINARY or self._channels(node.input[0]) == channels

    def _is_widening(self, node: onnx.NodeProto) -> bool:
        """Whether a node puts channels of zeros behind those that it reads, and does nothing else."""
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        given = [*node.input, "", ""]
        if mode != b"constant" or given[1] not in self._constants or given[3] or not self._channels(node.input[0]):
            return False
        if given[2] and not (
            self._is_constant(given[2]) and self._values(given[2]).size == 1 and not self._values(given[2]).any()
        ):
            return False
        pads = self._values(given[1])
        others = np.delete(pads, pads.size // 2 + 1)
        return (
            not others.any()
            and int(pads[pads.size // 2 + 1]) == self._channels(node.output[0]) - self._channels(node.input[0]) > 0
        )

    def _owns_weights(self, node: onnx.NodeProto) -> bool:
        """Whether nobody else reads a convolution's weights, or what they are rounded to."""
        return all(len(self._readers[name]) == 1 for name in node.input[1:])

    def _is_int8(self, node: onnx.NodeProto) -> bool:
        return all(
            (maker := self._maker.get(name)) is not None and maker.op_type == "DequantizeLinear"
            for name in node.input[:2]
        )

    def _is_constant(self, name: str) -> bool:
        """Whether a value is one, or a rounded one."""
        maker = self._maker.get(name)
        rounded = maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self._constants
        return name in self._constants or rounded

    def _values(self, name: str) -> Array:
        """Of a constant; of a rounded one what it is rounded to."""
        values: Array = numpy_helper.to_array(
            self._constants[name if name in self._constants else self._maker[name].input[0]]
        )
        return values

    def _channels(self, name: str) -> int:
        """0 where it has none, or nobody knows how many."""
        shape = self._shape.get(name, [])
        return int(shape[1]) if len(shape) >= 3 else 0

    def _find(self, name: str) -> str:
        """The name of the set that a tensor is in."""
        while (parent := self._parent.get(name, name)) != name:
            name = parent
        return name

    def _join(self, one: str, other: str) -> None:
        one, other = self._find(one), self._find(other)
        if one != other:
            self._parent[one] = other

    def _fix(self, names: Iterable[str]) -> None:
        self._fixed.update(names)


def _groups(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def _axis(rounded: onnx.NodeProto) -> int:
    return next((int(a.i) for a in rounded.attribute if a.name == "axis"), 1)
