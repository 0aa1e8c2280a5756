"""Stage 2, compile: arithmetic element by element for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table.

Sides of a broadcast are brought into the order of the largest; constants are sorted when compiling.
"""

from __future__ import annotations

import numpy as np

from .layout import Value
from .node import Node
from .writer import ACTIVATION, BOOL, FLOAT, INT, Operator, Writer

NUMBER = (FLOAT, INT)
_TINY = 1e-30  # a divisor below this has no inverse in float32
_ARITHMETIC = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}
_OPTIONS = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions", "DIV": "DivOptions"}
_COMPARE = {
    "Equal": "EQUAL", "Less": "LESS", "Greater": "GREATER", "LessOrEqual": "LESS_EQUAL", "GreaterOrEqual": "GREATER_EQUAL",
}  # fmt: skip
_LOGIC = {"And": "LOGICAL_AND", "Or": "LOGICAL_OR", "Xor": "NOT_EQUAL"}
_UNARY = {
    "Exp": "EXP", "Log": "LOG", "Sqrt": "SQRT", "Floor": "FLOOR", "Ceil": "CEIL", "Round": "ROUND", "Sin": "SIN", "Cos": "COS",
}  # fmt: skip
_UNARY_NUMBER = {"Abs": "ABS", "Neg": "NEG", "Sign": "SIGN"}


def combined(writer: Writer, name: str, op: str, one: Value, other: Value, **fields: int) -> Value:
    """An operator over two values that are broadcast."""
    sides = writer.together(one, other)
    shape = np.broadcast_shapes(*(s.shape for s in sides))
    fields = {"fusedActivationFunction": ACTIVATION.NONE, **fields} if op in _OPTIONS else fields
    return writer.emit(
        name, op, sides, shape, _OPTIONS.get(op, ""), order=sides[0].order, dtype=sides[0].dtype, **fields
    )


def scaled(writer: Writer, name: str, x: Value, factor: float) -> Value:
    """A value times a number."""
    return combined(writer, name, "MUL", x, writer.number(f"{name}/factor", factor))


def shifted(writer: Writer, name: str, x: Value, number: float) -> Value:
    """A value plus a number."""
    return combined(writer, name, "ADD", x, writer.number(f"{name}/term", number))


def _arithmetic(writer: Writer, node: Node) -> None:
    fused, name = writer.activation(node)
    op, divisor = _ARITHMETIC[node.op], node.values[1]
    sides = [writer.value(node.inputs[0])]
    if node.op == "Div" and divisor is not None and divisor.dtype == np.float32 and (np.abs(divisor) > _TINY).all():
        # The quantized DIV of TFLite is a slow reference kernel; MUL is fast everywhere.
        op, inverse = "MUL", (1 / divisor.astype(np.float64)).astype(np.float32)
        sides.append(writer.constant(f"{node.output}/inverse", inverse))
    else:
        sides.append(writer.value(node.inputs[1]))
    combined(writer, name, op, sides[0], sides[1], fusedActivationFunction=fused)


def _several(writer: Writer, node: Node) -> None:
    """Max, Min, Sum and Mean of any number of values."""
    op = {"Max": "MAXIMUM", "Min": "MINIMUM", "Sum": "ADD", "Mean": "ADD"}[node.op]
    total = writer.value(node.inputs[0])
    for position, name in enumerate(node.inputs[1:], 1):
        total = combined(
            writer,
            f"{node.output}/part" if position < len(node.inputs) - 1 else node.output,
            op,
            total,
            writer.value(name),
        )
    if node.op == "Mean" and len(node.inputs) > 1:
        total = scaled(writer, f"{node.output}/mean", total, 1 / len(node.inputs))
    writer.alias(node.output, total)


def _compare(writer: Writer, node: Node) -> None:
    sides = writer.together(*(writer.value(name) for name in node.inputs))
    op = (_COMPARE | _LOGIC)[node.op]
    writer.emit(node.output, op, sides, node.shape, order=sides[0].order, dtype=BOOL)


def _unary(writer: Writer, node: Node) -> None:
    writer.like(node.output, (_UNARY | _UNARY_NUMBER | {"Not": "LOGICAL_NOT"})[node.op], writer.value(node.inputs[0]))


def _reciprocal(writer: Writer, node: Node) -> None:
    combined(writer, node.output, "DIV", writer.number(f"{node.output}/one", 1.0), writer.value(node.inputs[0]))


def _power(writer: Writer, node: Node) -> None:
    x, exponent = writer.value(node.inputs[0]), node.values[1]
    if exponent is None:
        other = writer.value(node.inputs[1])
        if other.dtype != FLOAT or x.dtype != FLOAT:
            raise node.refused(f"with an exponent in {other.dtype}")
        combined(writer, node.output, "POW", x, other)
        return
    if exponent.size == 1 and exponent.item() == 2 and len(node.shape) == len(x.shape):
        combined(writer, node.output, "MUL", x, x)
    elif exponent.size == 1 and exponent.item() == 0.5 and len(node.shape) == len(x.shape):
        writer.like(node.output, "SQRT", x)
    else:
        combined(writer, node.output, "POW", x, writer.constant(f"{node.output}/exponent", exponent.astype(np.float32)))


def _remainder(writer: Writer, node: Node) -> None:
    if node.get("fmod"):
        raise node.refused("with fmod")
    combined(writer, node.output, "FLOOR_MOD", *(writer.value(name) for name in node.inputs))


def _where(writer: Writer, node: Node) -> None:
    sides = writer.together(*(writer.value(name) for name in node.inputs))
    writer.emit(node.output, "SELECT_V2", sides, node.shape, order=sides[0].order, dtype=sides[1].dtype)


def _cast(writer: Writer, node: Node) -> None:
    wanted = node.made[node.output].dtype
    writer.cast(node.output, writer.value(node.inputs[0]), np.dtype(np.int32) if wanted == np.int64 else wanted)


EVERY = (*NUMBER, BOOL, np.dtype(np.uint8), np.dtype(np.int8))

TABLE = {
    "Add": Operator(_arithmetic, ("ADD",), NUMBER),
    "Sub": Operator(_arithmetic, ("SUB",), NUMBER),
    "Mul": Operator(_arithmetic, ("MUL",), NUMBER),
    "Div": Operator(_arithmetic, ("DIV", "MUL"), NUMBER),
    "Max": Operator(_several, ("MAXIMUM",), NUMBER),
    "Min": Operator(_several, ("MINIMUM",), NUMBER),
    "Sum": Operator(_several, ("ADD",)),
    "Mean": Operator(_several, ("ADD", "MUL")),
    **{name: Operator(_compare, (op,), NUMBER) for name, op in _COMPARE.items()},
    **{name: Operator(_compare, (op,), (BOOL,)) for name, op in _LOGIC.items()},
    "Not": Operator(_unary, ("LOGICAL_NOT",), (BOOL,)),
    **{name: Operator(_unary, (op,)) for name, op in _UNARY.items()},
    **{name: Operator(_unary, (op,), NUMBER) for name, op in _UNARY_NUMBER.items()},
    "Reciprocal": Operator(_reciprocal, ("DIV",)),
    "Pow": Operator(_power, ("MUL", "SQRT", "POW"), (FLOAT,)),
    "Mod": Operator(_remainder, ("FLOOR_MOD",), (INT,), "`fmod`"),
    "Where": Operator(_where, ("SELECT_V2",), (*NUMBER, BOOL)),
    "Cast": Operator(_cast, ("CAST",), EVERY, "types other than float32, int32, int64, uint8, int8, bool"),
}
