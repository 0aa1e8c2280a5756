"""Stage 2, compile: paddings that OpenVINO computes rightly in int8. Receives ONNX in QDQ, hands on the same in which no Pad is computed in int8.

OpenVINO (2026.4) takes a Pad by a constant zero into the int8 around it, and where zero is another whole number than 0 there, it pads with twice that number, or breaks over
the network when others read what is padded: the channels that a residual network adds to a shortcut come out as a constant. MediaPipe's face mesh, which pads behind PReLUs, had
-0.2 dB of signal to noise, where onnxruntime has 28 by the same file. A zero that is rounded too is no constant to it, and it leaves such a Pad in float. The borders of
an AveragePool that counts them are such a Pad as well.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

ZERO, SCALE, LEVEL, MIDDLE = "pads/zero", "pads/scale", "pads/level", "pads/middle"


def pad_in_float(model: onnx.ModelProto) -> bool:
    """Give Pads by zero a rounded one to pad with, in place, where anything is rounded. Returns whether there was one."""
    graph = model.graph
    if not any(node.op_type == "QuantizeLinear" for node in graph.node):
        return False
    _borders_apart(graph)
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer if np.prod(i.dims) == 1}
    by_zero = []
    for node in graph.node:
        value = node.input[2] if len(node.input) > 2 else ""
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        untold = not value or (value in constants and not constants[value].any())
        if node.op_type == "Pad" and len(node.input) > 1 and mode == b"constant" and untold:
            by_zero.append(node)
    floats = _floats(model) if by_zero else set()
    by_zero = [pad for pad in by_zero if pad.input[0] in floats]
    for pad in by_zero:
        rest = [*pad.input[3:]]
        pad.input[:] = [*pad.input[:2], ZERO, *rest]
    if by_zero:
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), SCALE))
        for name in (LEVEL, MIDDLE):  # two that are alike: OpenVINO refuses one constant in both places
            graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), name))
        graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", [LEVEL, SCALE, MIDDLE], [ZERO], name=ZERO))
    return bool(by_zero)


def _borders_apart(graph: onnx.GraphProto) -> None:
    """Pad before rounded AveragePools that count the borders which they add, in place of these. What is padded is rounded again, as it was, which changes no
    number: OpenVINO would take the Pad back into the pool. Where the last windows may be cut off, borders are more than a Pad, and stay."""
    made = {name: node for node in graph.node for name in node.output}
    for number, node in reversed(list(enumerate(graph.node))):
        told = {a.name: a for a in node.attribute}
        counts, cut_off = (name in told and told[name].i for name in ("count_include_pad", "ceil_mode"))
        if node.op_type != "AveragePool" or not counts or cut_off or "pads" not in told or not any(told["pads"].ints):
            continue
        rounded = made.get(node.input[0])
        if rounded is None or rounded.op_type != "DequantizeLinear":
            continue
        pads = list(told["pads"].ints)
        half, name = len(pads) // 2, f"{node.output[0]}/padded"
        borders = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        graph.initializer.append(numpy_helper.from_array(borders, f"{name}/borders"))
        for op, reads, gives in reversed((
            ("Pad", [node.input[0], f"{name}/borders"], name),
            ("QuantizeLinear", [name, *rounded.input[1:]], f"{name}/int8"),
            ("DequantizeLinear", [f"{name}/int8", *rounded.input[1:]], f"{name}/rounded"),
        )):  # fmt: skip
            graph.node.insert(number, onnx.helper.make_node(op, reads, [gives], name=gives))
        pool = graph.node[number + 3]
        pool.input[0] = f"{name}/rounded"
        kept = [a for a in pool.attribute if a.name not in ("pads", "count_include_pad")]
        del pool.attribute[:]
        pool.attribute.extend(kept)


def _floats(model: onnx.ModelProto) -> set[str]:
    """Tensors of float32: what is padded may be a shape, too."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = [*graph.value_info, *graph.input, *graph.output]
    return {value.name for value in known if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
