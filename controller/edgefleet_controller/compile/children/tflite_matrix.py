"""Stage 2, compile: matrix products for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table."""

from __future__ import annotations

import math

import numpy as np

from .tflite_elementwise import combined, scaled
from .tflite_graph import Array
from .tflite_layout import Value, plain, transposed, widened
from .tflite_source import Node
from .tflite_writer import Operator, Writer

MAX_RANK = 5  # of TFLite's BATCH_MATMUL


def _dense(
    writer: Writer, name: str, source: str, x: Value, weight: Array, bias: Array | None, weight_name: str, fused: int
) -> None:
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
    writer.emit(
        name, "FULLY_CONNECTED", [x, w, b], shape, "FullyConnectedOptions",
        order=x.order, fusedActivationFunction=fused, keepNumDims=rank > 2,
    )  # fmt: skip


def _gemm(writer: Writer, node: Node) -> None:
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    x, weight, source = writer.value(node.inputs[0]), node.values[1], node.inputs[0]
    if node.get("transA"):
        x, source = transposed(x, (1, 0)), ""
    bias = node.values[2] if node.has(2) else None
    inside = bias is None or math.prod(bias.shape[:-1]) == 1  # one row for all
    if weight is None or (node.has(2) and (bias is None or not inside)):
        _loose(writer, node, x, alpha, beta)
        return
    if not np.isfinite(weight).all():
        raise node.refused("with weights that are not finite")
    weight = weight.T if node.get("transB") else weight
    row = None if bias is None else np.broadcast_to(bias.reshape(-1) * beta, (weight.shape[1],))
    fused, name = writer.activation(node)
    _dense(writer, name, source, x, weight * np.float32(alpha), row, node.inputs[1], fused)


def _loose(writer: Writer, node: Node, x: Value, alpha: float, beta: float) -> None:
    """With a computed matrix, or something else than one row to add."""
    name, other = node.output, writer.value(node.inputs[1])
    if node.get("transB"):
        other = transposed(other, (1, 0))
    product = _product(writer, f"{name}/product", x, other)
    product = product if alpha == 1.0 else scaled(writer, f"{name}/alpha", product, alpha)
    if node.has(2):
        term = writer.value(node.inputs[2])
        product = combined(
            writer, name, "ADD", product, term if beta == 1.0 else scaled(writer, f"{name}/beta", term, beta)
        )
    writer.alias(name, product)


def _matmul(writer: Writer, node: Node) -> None:
    weight, x = node.values[1], writer.value(node.inputs[0])
    if weight is not None and not np.isfinite(weight).all():
        raise node.refused("with weights that are not finite")
    if weight is not None and weight.ndim == 2 and len(x.shape) > 1 and node.values[0] is None:
        fused, name = writer.activation(node)
        _dense(writer, name, node.inputs[0], x, weight, None, node.inputs[1], fused)
        return
    other = writer.value(node.inputs[1])
    if len(x.shape) == 1:  # a row; the axis goes again afterwards
        x = writer.reshape(f"{node.output}/row", x, (1, *x.shape))
    if len(other.shape) == 1:
        other = writer.reshape(f"{node.output}/column", other, (*other.shape, 1))
    if max(len(x.shape), len(other.shape)) > MAX_RANK:
        raise node.refused(f"in {max(len(x.shape), len(other.shape))} dimensions")
    made = _product(writer, node.output, x, other)
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
