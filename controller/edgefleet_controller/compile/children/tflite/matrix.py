"""Stage 2, compile: matrix products for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table."""

from __future__ import annotations

import math

import numpy as np

from .elementwise import combined, scaled
from .graph import Array
from .layout import Value, plain, transposed, widened
from .node import Node
from .writer import Operator, Writer

MAX_RANK = 5  # of TFLite's BATCH_MATMUL


def _dense(
    writer: Writer, name: str, source: str, x: Value, weight: Array, bias: Array | None, weight_name: str, fused: int
) -> Value:
    """``x @ weight + bias``, weight in x out; the last of ONNX's axes is summed over.

    A value that was flattened just before is taken as it lay, and the weight's rows are sorted instead.
    """
    inputs, outputs = weight.shape
    before = writer.before_reshape(source)
    shape = (*x.shape[:-1], outputs)
    if before is not None and len(x.shape) == 2 and before.order[0] == 0 and before.shape[0] == x.shape[0]:
        rows = np.arange(inputs).reshape(before.shape[1:]).transpose([axis - 1 for axis in before.order[1:]])
        weight = weight[rows.reshape(-1)]
        x = writer.reshaped(f"{name}/flat", before, x.shape)
        weight_name = f"{weight_name}/sorted"
    rank = len(x.shape)
    if x.order[-1] != rank - 1:
        x = writer.laid(x, (*(a for a in x.order if a != rank - 1), rank - 1))
    w = writer.constant(weight_name, np.ascontiguousarray(weight.T))
    b = writer.constant(f"{name}/bias", np.zeros(outputs, np.float32) if bias is None else bias.astype(np.float32))
    return writer.emit(
        name, "FULLY_CONNECTED", [x, w, b], shape, "FullyConnectedOptions",
        order=x.order, fusedActivationFunction=fused, keepNumDims=rank > 2,
    )  # fmt: skip


def _gemm(writer: Writer, node: Node) -> None:
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    x, weight, source = writer.value(node.inputs[0]), node.values[1], node.inputs[0]
    if node.get("transA"):
        x, source = transposed(x, (1, 0)), ""
    term = node.values[2] if node.has(2) else None
    row = term is not None and math.prod(term.shape[:-1]) == 1  # one for all rows: the product's own bias
    more = node.has(2) and not (row and weight is not None)
    fused, name = (0, f"{node.output}/product") if more else writer.activation(node)
    if weight is not None:
        _finite(node, weight)
        weight = (weight.T if node.get("transB") else weight) * np.float32(alpha)
        bias = np.broadcast_to(term.reshape(-1) * beta, (weight.shape[1],)) if row and term is not None else None
        made = _dense(writer, name, source, x, weight, bias, node.inputs[1], fused)
    else:
        other = writer.value(node.inputs[1])
        made = _product(writer, name, x, transposed(other, (1, 0)) if node.get("transB") else other)
        made = made if alpha == 1.0 else scaled(writer, f"{node.output}/alpha", made, alpha)
    if more:
        added = writer.value(node.inputs[2])
        made = combined(
            writer,
            node.output,
            "ADD",
            made,
            added if beta == 1.0 else scaled(writer, f"{node.output}/beta", added, beta),
        )
    if not fused:
        writer.alias(node.output, made)


def _finite(node: Node, weight: Array) -> None:
    if not np.isfinite(weight).all():
        raise node.refused("with weights that are not finite")


def _matmul(writer: Writer, node: Node) -> None:
    x, other = writer.value(node.inputs[0]), writer.value(node.inputs[1])
    for values in node.values:
        if values is not None:
            _finite(node, values)
    if len(x.shape) == 1:  # a row; the axis goes again afterwards
        x = writer.reshape(f"{node.output}/row", x, (1, *x.shape))
    if len(other.shape) == 1:
        other = writer.reshape(f"{node.output}/column", other, (*other.shape, 1))
    left, right = node.values
    if right is not None and len(other.shape) == 2 and left is None:
        whole = len(node.shape) == len(x.shape) and right.ndim == 2
        fused, name = writer.activation(node) if whole else (0, node.output)
        made = _dense(writer, name, node.inputs[0], x, right.reshape(other.shape), None, node.inputs[1], fused)
        if whole:
            return
    elif left is not None and len(x.shape) == 2 and right is None:  # (other' x')': a constant has to be on the right
        turned = (*range(len(other.shape) - 2), len(other.shape) - 1, len(other.shape) - 2)
        weight = left.reshape(x.shape).T
        made = _dense(writer, f"{node.output}/turned", "", transposed(other, turned), weight, None, node.inputs[0], 0)
        made = transposed(made, turned)
    else:
        rank = max(len(x.shape), len(other.shape))
        if rank > MAX_RANK:
            raise node.refused(f"in {rank} dimensions")
        made = _product(writer, node.output, x, other)
    writer.alias(node.output, made)
    if made.shape != node.shape:
        writer.reshape(node.output, made, node.shape)


def _product(writer: Writer, name: str, one: Value, other: Value) -> Value:
    """A product of two matrices, or of stacks of them; a side that lies transposed stays so."""
    rank = max(len(one.shape), len(other.shape))
    sides, swapped = [], []
    for side in (one, other):
        wide = widened(side, rank)
        turned = (*range(rank - 2), rank - 1, rank - 2)
        if wide.order == turned:
            sides.append(wide)
        else:
            sides.append(writer.laid(_true(writer, wide), plain(rank)))
        swapped.append(wide.order == turned)
    shape = (*np.broadcast_shapes(sides[0].shape[:-2], sides[1].shape[:-2]), sides[0].shape[-2], sides[1].shape[-1])
    sides = [_true(writer, side) for side in sides]
    return writer.emit(name, "BATCH_MATMUL", sides, shape, "BatchMatMulOptions", adjX=swapped[0], adjY=swapped[1])


def _true(writer: Writer, value: Value) -> Value:
    """A widened value with the tensor that its shape tells."""
    if writer.graph.shape(value.tensor) == value.stored:
        return value
    name = f"{writer.graph.name(value.tensor)}/wide"
    return value._replace(tensor=writer.reshaped(name, value, value.stored).tensor)


TABLE = {
    "Gemm": Operator(_gemm, ("FULLY_CONNECTED", "BATCH_MATMUL", "MUL", "ADD")),
    "MatMul": Operator(
        _matmul, ("FULLY_CONNECTED", "BATCH_MATMUL"), limits=f"computed matrices in more than {MAX_RANK} dimensions"
    ),
}
