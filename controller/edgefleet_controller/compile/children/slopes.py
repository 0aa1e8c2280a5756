"""Stage 2, compile: PReLUs for onnxruntime. Receives a network, hands on the same with them in operators that it is fast at.

Its PRelu takes four times as long as the depthwise convolution before it (2.5 ns a value), ends the layout that its convolutions share, and has no int8: a network of
faces' shape was slower in int8 than in float. With slopes s, what a convolution makes scaled by 1 - s, which is free, it is relu(x) + x * s / (1 - s): the second of the two a
depthwise convolution of one tap. Such a network takes a quarter of the time, in float and in int8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from .names import Names
from .tidy import readers_of

# Beyond, what is scaled by 1 - s gets lost among what is not, or the other way round: from a fifth to five times.
STEEPEST, FALLING = 0.8, -4.0


def slopes_apart(graph: onnx.GraphProto) -> bool:
    """Replace PRelus of one slope for each channel behind convolutions, in place. Returns: whether there were any."""
    constants = {i.name: i for i in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers, served = readers_of(graph), {output.name for output in graph.output}
    names, new = Names(graph), dict[str, list[onnx.NodeProto]]()
    for node in [one for one in graph.node if one.op_type == "PRelu"]:
        made = maker.get(node.input[0])
        alone = len(readers.get(node.input[0], [])) == 1 and node.input[0] not in served
        if (
            made is None
            or made.op_type != "Conv"
            or not alone
            or not {*made.input[1:], node.input[1]} <= constants.keys()
        ):
            continue
        weight = numpy_helper.to_array(constants[made.input[1]])
        slopes = _by_channel(numpy_helper.to_array(constants[node.input[1]]), weight)
        if slopes is None or weight.dtype != np.float32 or not FALLING <= slopes.min() <= slopes.max() <= STEEPEST:
            continue
        scale = (1 - slopes).astype(np.float32)
        ones = [1] * (weight.ndim - 1)
        ramp = names.free(f"{node.name}/slopes")
        values = {ramp: (slopes / scale).astype(np.float32).reshape(-1, *ones)}
        made.input[1] = names.free(f"{node.name}/weight")
        values[made.input[1]] = weight * scale.reshape(-1, *ones)
        if len(made.input) > 2:
            bias = numpy_helper.to_array(constants[made.input[2]]) * scale
            made.input[2] = names.free(f"{node.name}/bias")
            values[made.input[2]] = bias
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
        x, y = node.input[0], node.output[0]
        above, sloping = (names.free(f"{y}/{part}") for part in ("above", "sloping"))
        new[node.name] = [
            helper.make_node("Relu", [x], [above], name=f"{node.name}/above"),
            helper.make_node(
                "Conv", [x, ramp], [sloping], name=f"{node.name}/sloping", group=len(slopes), kernel_shape=ones[1:],
            ),
            helper.make_node("Add", [above, sloping], [y], name=node.name),
        ]  # fmt: skip
    nodes = [one for node in graph.node for one in new.get(node.name, [node])]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(copies)
    return bool(new)


def _by_channel(slopes: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    """One slope for each channel that a convolution of that weight makes; None where they are others."""
    axis = slopes.ndim - (weight.ndim - 1)
    one_each = axis >= 0 and slopes.shape[axis] == len(weight) and slopes.size == len(weight)
    return slopes.reshape(-1) if one_each and np.isfinite(slopes).all() else None
