"""Stage 2, compile: computing now what a network computes from constants. Receives a checked node, hands on arrays or nothing.

Shape arithmetic and prepared weights, evaluated by ONNX's reference implementation. Bounded: a node that would make more than
:data:`MAX_ELEMENTS` is not evaluated.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.reference

from .graph import Array
from .node import Node, Type

MAX_ELEMENTS = 2**26  # 256 MB of float
SHAPED = frozenset({"Shape", "Size"})
FOLDED = SHAPED | frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "CumSum",
        "Div",
        "Equal",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "Round",
        "ScatterND",
        "Sign",
        "Slice",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
    ]
)


def folded(
    proto: onnx.NodeProto, node: Node, shapes: dict[str, tuple[int, ...]], made: dict[str, Type]
) -> dict[str, Array] | None:
    """What a node makes of constants, by name; ``None`` if it has to be computed at run time.

    Args:
        shapes: of the node's inputs; they are fixed, so ``Shape`` needs no more.
        made: the node's outputs, which say how large the result is.
    """
    if node.op not in FOLDED or not made or sum(math.prod(kind.shape) for kind in made.values()) > MAX_ELEMENTS:
        return None
    if node.op == "Constant" and "value" in node.attributes:
        return {node.output: node.attributes["value"]}
    if node.op in SHAPED:
        shape = np.array(shapes[node.inputs[0]], np.int64)
        if node.op == "Size":
            return {node.output: np.array(math.prod(shape.tolist()), np.int64)}
        return {node.output: shape[slice(node.get("start", 0), node.get("end"))]}
    given = {name: values for name, values in zip(node.inputs, node.values, strict=True) if name and values is not None}
    if len(given) < len({name for name in node.inputs if name}):
        return None
    plain = onnx.NodeProto()
    plain.CopyFrom(proto)
    plain.domain = ""
    try:
        with np.errstate(all="ignore"):  # a division by zero is the network's own affair
            results = onnx.reference.ReferenceEvaluator(plain, opsets={"": node.opset}).run(None, given)
    except Exception as exc:
        raise node.refused(f"over these constants: {str(exc).strip().splitlines()[0] if str(exc) else exc!r}") from exc
    return {name: np.asarray(values) for name, values in zip(node.outputs, results, strict=False) if name}
