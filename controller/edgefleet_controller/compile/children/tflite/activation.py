"""Stage 2, compile: activations for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table.

A Relu or Clip that follows a convolution, a pool, a matrix product or arithmetic is fused into it and never comes here.
"""

from __future__ import annotations

import math

import numpy as np

from .elementwise import NUMBER, combined, scaled, shifted
from .layout import Value
from .node import Node
from .writer import ACTIVATION, FLOAT, Operator, Writer, bounds, relu_kind

SOFTMAX_BY_AXIS = 13  # before this operator set, Softmax ran over all axes from the given one on
_UNARY = {"Relu": "RELU", "Sigmoid": "LOGISTIC", "Tanh": "TANH", "HardSwish": "HARD_SWISH"}
_OPTIONS = {"HARD_SWISH": "HardSwishOptions"}


def _unary(writer: Writer, node: Node) -> None:
    op = _UNARY[node.op]
    writer.like(node.output, op, writer.value(node.inputs[0]), options=_OPTIONS.get(op, ""))
    if node.op in {"Relu", "Sigmoid"}:
        writer.mark_positive(node.output)


def _clip(writer: Writer, node: Node) -> None:
    x, name = writer.value(node.inputs[0]), node.output
    low, high = bounds(node)
    kinds = {int(ACTIVATION.RELU): "RELU", int(ACTIVATION.RELU6): "RELU6", int(ACTIVATION.RELU_N1_TO_1): "RELU_N1_TO_1"}
    kind = relu_kind(node) if x.dtype == FLOAT else None
    if kind is not None:
        writer.like(name, kinds[kind], x)
    else:
        writer.same_as[f"{name}/low"] = node.inputs[0]  # or less: what the limit takes away is no matter for a range
        for bound, op, part in ((low, "MAXIMUM", f"{name}/low"), (high, "MINIMUM", name)):
            if bound is not None and not math.isinf(bound):
                limit = writer.number(f"{part}/limit", bound if x.dtype == FLOAT else int(bound), x.dtype)
                x = combined(writer, name if high is None else part, op, x, limit)
        writer.alias(name, x)
    if low is not None and low >= 0:
        writer.mark_positive(name)


def _leaky(writer: Writer, node: Node) -> None:
    alpha = float(node.get("alpha", 0.01))
    writer.like(node.output, "LEAKY_RELU", writer.value(node.inputs[0]), options="LeakyReluOptions", alpha=alpha)


def _prelu(writer: Writer, node: Node) -> None:
    if len(node.shape) > 4:
        raise node.refused(f"in {len(node.shape)} dimensions")
    x, slope = writer.together(writer.value(node.inputs[0]), writer.value(node.inputs[1]))
    writer.like(node.output, "PRELU", x, slope)


def _hard_sigmoid(writer: Writer, node: Node) -> None:
    alpha, beta, name = float(node.get("alpha", 0.2)), float(node.get("beta", 0.5)), node.output
    # relu6(6 * (alpha x + beta)) / 6 needs no minimum and maximum, which int8 kernels of small boards lack.
    x = scaled(writer, f"{name}/scaled", writer.value(node.inputs[0]), 6 * alpha)
    x = combined(
        writer, f"{name}/clipped", "ADD", x, writer.number(f"{name}/shift", 6 * beta),
        fusedActivationFunction=int(ACTIVATION.RELU6),
    )  # fmt: skip
    scaled(writer, name, x, 1 / 6)
    writer.mark_positive(name)


def _exponential(writer: Writer, node: Node) -> None:
    """Elu, Selu, Celu: ``positive * relu(x) + negative * (exp(min(x, 0) / width) - 1)``."""
    x, name, alpha = writer.value(node.inputs[0]), node.output, float(node.get("alpha", 1.0))
    positive, negative, width = 1.0, alpha, 1.0
    if node.op == "Selu":
        gamma = float(node.get("gamma", 1.05070102214813232421875))
        positive, negative = gamma, gamma * float(node.get("alpha", 1.67326319217681884765625))
    elif node.op == "Celu":
        width = alpha
        if alpha == 0.0:
            raise node.refused("with alpha 0")
    if (positive, negative, width) == (1.0, 1.0, 1.0):
        writer.like(name, "ELU", x)
        return
    above = writer.like(f"{name}/above", "RELU", x)
    below = combined(writer, f"{name}/below", "MINIMUM", x, writer.number(f"{name}/zero", 0.0))
    below = below if width == 1.0 else scaled(writer, f"{name}/inner", below, 1 / width)
    below = scaled(writer, f"{name}/outer", writer.like(f"{name}/elu", "ELU", below), negative)
    above = above if positive == 1.0 else scaled(writer, f"{name}/linear", above, positive)
    combined(writer, name, "ADD", above, below)


def _softplus(writer: Writer, node: Node) -> None:
    """``relu(x) + log(1 + exp(-|x|))``, which does not overflow; Mish is ``x * tanh`` of it."""
    x, name = writer.value(node.inputs[0]), node.output
    tail = writer.like(f"{name}/minus", "NEG", writer.like(f"{name}/size", "ABS", x))
    tail = writer.like(
        f"{name}/log", "LOG", shifted(writer, f"{name}/one", writer.like(f"{name}/exp", "EXP", tail), 1.0)
    )
    above = writer.like(f"{name}/above", "RELU", x)
    total = combined(writer, f"{name}/plus" if node.op == "Mish" else name, "ADD", above, tail)
    if node.op == "Mish":
        combined(writer, name, "MUL", x, writer.like(f"{name}/tanh", "TANH", total))


def _softsign(writer: Writer, node: Node) -> None:
    x, name = writer.value(node.inputs[0]), node.output
    combined(writer, name, "DIV", x, shifted(writer, f"{name}/plus", writer.like(f"{name}/size", "ABS", x), 1.0))


def _swish(writer: Writer, node: Node) -> None:
    x, name, alpha = writer.value(node.inputs[0]), node.output, float(node.get("alpha", 1.0))
    inner = x if alpha == 1.0 else scaled(writer, f"{name}/scaled", x, alpha)
    combined(writer, name, "MUL", x, writer.like(f"{name}/gate", "LOGISTIC", inner))


def _thresholded(writer: Writer, node: Node) -> None:
    x, name = writer.value(node.inputs[0]), node.output
    limit = writer.number(f"{name}/limit", float(node.get("alpha", 1.0)))
    above = writer.emit(f"{name}/above", "GREATER", writer.together(x, limit), x.shape, order=x.order, dtype=np.bool_)
    combined(writer, name, "MUL", x, writer.cast(f"{name}/mask", above, FLOAT))


def _gelu(writer: Writer, node: Node) -> None:
    near = node.get("approximate", "none") == "tanh"
    writer.like(node.output, "GELU", writer.value(node.inputs[0]), options="GeluOptions", approximate=near)


def _erf(writer: Writer, node: Node) -> None:
    """``sign(x) (1 - poly(t) exp(-x²))`` with ``t = 1 / (1 + p |x|)``: Abramowitz and Stegun, 7.1.26, off by 1.5e-7 at most."""
    x, name, first = writer.value(node.inputs[0]), node.output, writer.graph.size
    size = writer.like(f"{name}/size", "ABS", x)
    divisor = shifted(writer, f"{name}/divisor", scaled(writer, f"{name}/stretched", size, 0.3275911), 1.0)
    t = combined(writer, f"{name}/inverse", "DIV", writer.number(f"{name}/unit", 1.0), divisor)
    poly = scaled(writer, f"{name}/power", t, 1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = combined(writer, f"{name}/power", "MUL", shifted(writer, f"{name}/sum", poly, factor), t)
    fall = writer.like(f"{name}/minus", "NEG", combined(writer, f"{name}/square", "MUL", x, x))
    tail = combined(writer, f"{name}/tail", "MUL", poly, writer.like(f"{name}/exp", "EXP", fall))
    rest = combined(writer, f"{name}/rest", "SUB", writer.number(f"{name}/whole", 1.0), tail)
    combined(writer, name, "MUL", writer.like(f"{name}/sign", "SIGN", x), rest)
    writer.graph.leave(range(first, writer.graph.size))


def _softmax(writer: Writer, node: Node) -> None:
    op, fields = ("SOFTMAX", {"beta": 1.0}) if node.op == "Softmax" else ("LOG_SOFTMAX", {})
    options = "SoftmaxOptions" if fields else "LogSoftmaxOptions"
    rank = len(node.shape)
    axis = node.get("axis", -1 if node.opset >= SOFTMAX_BY_AXIS else 1)
    axis = axis % rank if rank else 0
    if node.opset < SOFTMAX_BY_AXIS and any(n != 1 for n in node.shape[axis + 1 :]):
        flat = (math.prod(node.shape[:axis]), math.prod(node.shape[axis:]))
        x = writer.reshape(f"{node.output}/flat", writer.value(node.inputs[0]), flat)
        x = writer.laid(x, (0, 1))
        made = writer.like(f"{node.output}/soft", op, x, options=options, **fields)
        writer.reshape(node.output, made, node.shape)
        return
    x = _last(writer, node, axis)
    writer.like(node.output, op, x, options=options, **fields)


def _last(writer: Writer, node: Node, axis: int) -> Value:
    value = writer.value(node.inputs[0])
    return value if not value.order or value.order[-1] == axis else writer.ending(node.inputs[0], axis)


TABLE = {
    **{name: Operator(_unary, (op,)) for name, op in _UNARY.items()},
    "Clip": Operator(_clip, ("RELU", "RELU6", "RELU_N1_TO_1", "MAXIMUM", "MINIMUM"), NUMBER, "computed bounds"),
    "LeakyRelu": Operator(_leaky, ("LEAKY_RELU",)),
    "PRelu": Operator(_prelu, ("PRELU",), (FLOAT,), "more than 4 dimensions"),
    "HardSigmoid": Operator(_hard_sigmoid, ("MUL", "ADD")),
    "Elu": Operator(_exponential, ("ELU", "RELU", "MINIMUM", "MUL", "ADD")),
    "Selu": Operator(_exponential, ("ELU", "RELU", "MINIMUM", "MUL", "ADD")),
    "Celu": Operator(_exponential, ("ELU", "RELU", "MINIMUM", "MUL", "ADD")),
    "Softplus": Operator(_softplus, ("ABS", "NEG", "EXP", "ADD", "LOG", "RELU")),
    "Mish": Operator(_softplus, ("ABS", "NEG", "EXP", "ADD", "LOG", "RELU", "TANH", "MUL")),
    "Softsign": Operator(_softsign, ("ABS", "ADD", "DIV")),
    "Swish": Operator(_swish, ("LOGISTIC", "MUL")),
    "ThresholdedRelu": Operator(_thresholded, ("GREATER", "CAST", "MUL")),
    "Erf": Operator(_erf, ("ABS", "MUL", "ADD", "DIV", "NEG", "EXP", "SUB", "SIGN")),
    "Gelu": Operator(_gelu, ("GELU",)),
    "Softmax": Operator(_softmax, ("SOFTMAX",)),
    "LogSoftmax": Operator(_softmax, ("LOG_SOFTMAX",)),
}
