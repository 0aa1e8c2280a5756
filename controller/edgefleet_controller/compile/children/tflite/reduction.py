"""Stage 2, compile: reductions and normalisations for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table.

They run over stored axes, so a picture needs no other order for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..measure import Array
from .elementwise import NUMBER, combined, shifted
from .layout import Value, plain
from .node import Node
from .writer import INT, Operator, Writer

_REDUCE = {
    "ReduceMean": "MEAN",
    "ReduceSum": "SUM",
    "ReduceMax": "REDUCE_MAX",
    "ReduceMin": "REDUCE_MIN",
    "ReduceProd": "REDUCE_PROD",
}
_AROUND = {  # what is done before and after a sum
    "ReduceL1": ("ABS", ""), "ReduceL2": ("MUL", "SQRT"), "ReduceSumSquare": ("MUL", ""), "ReduceLogSum": ("", "LOG"),
}  # fmt: skip
GROUP_SCALES_CHANNELS = 21  # before this operator set, GroupNormalization's scale was one for each group


def reduced(writer: Writer, name: str, op: str, x: Value, axes: Sequence[int], keep: bool) -> Value:
    """An operator that reduces these of ONNX's axes."""
    left = [axis for axis in plain(len(x.shape)) if keep or axis not in axes]
    shape = tuple(1 if axis in axes else x.shape[axis] for axis in left)
    order = tuple(left.index(axis) for axis in x.order if axis in left)
    places = writer.integers(f"{name}/axes", sorted(x.place(axis) for axis in axes))
    return writer.emit(name, op, [x, places], shape, "ReducerOptions", order=order, dtype=x.dtype, keepDims=keep)


def _axes(node: Node, rank: int) -> list[int]:
    """Over which axes; empty for none at all."""
    axes = node.ints("axes", 1)
    if not axes:
        return [] if node.get("noop_with_empty_axes") else list(range(rank))
    return sorted({axis % rank for axis in axes})


def _reduce(writer: Writer, node: Node) -> None:
    x, name = writer.value(node.inputs[0]), node.output
    axes, keep = _axes(node, len(x.shape)), bool(node.get("keepdims", 1))
    if node.op == "ReduceLogSumExp":
        _log_sum_exp(writer, node, x, axes, keep)
        return
    before, after = _AROUND.get(node.op, ("", ""))
    if before:
        x = (
            combined(writer, f"{name}/square", "MUL", x, x)
            if before == "MUL"
            else writer.like(f"{name}/size", before, x)
        )
    if axes:
        x = reduced(writer, f"{name}/sum" if after else name, _REDUCE.get(node.op, "SUM"), x, axes, keep)
    writer.alias(name, writer.like(name, after, x) if after else x)


def _log_sum_exp(writer: Writer, node: Node, x: Value, axes: list[int], keep: bool) -> None:
    """The largest is taken out first, so that the exponential does not overflow."""
    name = node.output
    if not axes:
        writer.alias(name, x)
        return
    top = reduced(writer, f"{name}/top", "REDUCE_MAX", x, axes, True)
    powers = writer.like(f"{name}/exp", "EXP", combined(writer, f"{name}/rest", "SUB", x, top))
    total = writer.like(f"{name}/log", "LOG", reduced(writer, f"{name}/sum", "SUM", powers, axes, True))
    writer.reshape(name, combined(writer, f"{name}/back" if not keep else name, "ADD", total, top), node.shape)


def _global(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    op = "MEAN" if node.op == "GlobalAveragePool" else "REDUCE_MAX"
    reduced(writer, node.output, op, x, range(2, len(x.shape)), True)


def _arg(writer: Writer, node: Node) -> None:
    x, name = writer.value(node.inputs[0]), node.output
    if node.get("select_last_index"):
        raise node.refused("with select_last_index")
    axis, keep = node.get("axis", 0) % len(x.shape), bool(node.get("keepdims", 1))
    left = [a for a in plain(len(x.shape)) if a != axis]
    order = tuple(left.index(a) for a in x.order if a != axis)
    op, options = ("ARG_MAX", "ArgMaxOptions") if node.op == "ArgMax" else ("ARG_MIN", "ArgMinOptions")
    place = writer.number(f"{name}/axis", x.place(axis), np.int32)
    shape = tuple(x.shape[a] for a in left)
    found = writer.emit(
        name if not keep else f"{name}/found", op, [x, place], shape, options, order=order, dtype=INT, outputType=2
    )
    if keep:
        writer.reshape(name, found, node.shape)


def _top(writer: Writer, node: Node) -> None:
    axis, rank = node.get("axis", -1), len(node.shape)
    if not node.get("largest", 1):
        raise node.refused("for the smallest")
    x = writer.ending(node.inputs[0], axis % rank)
    count = node.number("k", 1)
    if count is None:
        raise node.refused("with a computed number")
    names = [name or f"{node.output}/{part}" for name, part in zip(node.outputs, ("values", "places"), strict=True)]
    shape = tuple(int(count) if a == axis % rank else n for a, n in enumerate(x.shape))
    stored = tuple(shape[a] for a in x.order)
    tensors = [writer.graph.tensor(name, stored, t) for name, t in zip(names, (x.dtype, INT), strict=True)]
    limit = writer.number(f"{names[0]}/count", int(count), np.int32)
    writer.graph.operator("TOPK_V2", [x.tensor, limit.tensor], tensors, "TopKV2Options")
    for name, tensor, dtype in zip(names, tensors, (x.dtype, INT), strict=True):
        writer.alias(name, Value(tensor, shape, x.order, dtype))


def _cumulated(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    axis = int(node.fixed(1).item()) % len(x.shape)
    place = writer.number(f"{node.output}/axis", x.place(axis), np.int32)
    fields = {"exclusive": bool(node.get("exclusive", 0)), "reverse": bool(node.get("reverse", 0))}
    writer.like(node.output, "CUMSUM", x, place, options="CumsumOptions", **fields)


# --- normalisations ---------------------------------------------------------------------------------------------------


def _channelwise(writer: Writer, name: str, x: Value, factor: Array, term: Array) -> None:
    """``x * factor + term``, one number of each for every channel."""
    wide = (-1, *(1,) * (len(x.shape) - 2))
    x = combined(
        writer, f"{name}/scaled", "MUL", x, writer.constant(f"{name}/factor", factor.astype(np.float32).reshape(wide))
    )
    combined(writer, name, "ADD", x, writer.constant(f"{name}/term", term.astype(np.float32).reshape(wide)))


def _batch(writer: Writer, node: Node) -> None:
    if node.get("training_mode") or len([name for name in node.outputs if name]) > 1:
        raise node.refused("in training")
    scale, bias, mean, variance = (node.fixed(i).astype(np.float64) for i in (1, 2, 3, 4))
    variance = variance + node.get("epsilon", 1e-5)
    if not (variance > 0).all():
        raise node.refused("with a variance below zero")
    factor = scale / np.sqrt(variance)
    _channelwise(writer, node.output, writer.value(node.inputs[0]), factor, bias - mean * factor)


def _standardised(writer: Writer, name: str, x: Value, axes: Sequence[int], epsilon: float) -> Value:
    """``(x - mean) / sqrt(variance + epsilon)`` over these axes."""
    mean = reduced(writer, f"{name}/mean", "MEAN", x, axes, True)
    apart = combined(writer, f"{name}/apart", "SUB", x, mean)
    square = combined(writer, f"{name}/square", "MUL", apart, apart)
    variance = shifted(
        writer, f"{name}/variance", reduced(writer, f"{name}/spread", "MEAN", square, axes, True), epsilon
    )
    return combined(writer, f"{name}/standard", "DIV", apart, writer.like(f"{name}/deviation", "SQRT", variance))


def _instance(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    x = _standardised(writer, node.output, x, range(2, len(x.shape)), node.get("epsilon", 1e-5))
    _channelwise(writer, node.output, x, node.fixed(1), node.fixed(2))


def _layer(writer: Writer, node: Node) -> None:
    if len([name for name in node.outputs if name]) > 1:
        raise node.refused("with the outputs of training")
    x, name = writer.value(node.inputs[0]), node.output
    rank = len(x.shape)
    x = _standardised(writer, name, x, range(node.get("axis", -1) % rank, rank), node.get("epsilon", 1e-5))
    x = combined(writer, f"{name}/scaled" if node.has(2) else name, "MUL", x, writer.value(node.inputs[1]))
    if node.has(2):
        combined(writer, name, "ADD", x, writer.value(node.inputs[2]))


def _group(writer: Writer, node: Node) -> None:
    x, name, groups = writer.value(node.inputs[0]), node.output, node.get("num_groups")
    batch, channels, *rest = x.shape
    if groups < 1 or channels % groups or len(rest) > 3:
        raise node.refused(f"with {groups} groups over {channels} channels in {len(x.shape)} dimensions")
    split = writer.reshape(f"{name}/groups", x, (batch, groups, channels // groups, *rest))
    split = _standardised(writer, name, split, range(2, len(split.shape)), node.get("epsilon", 1e-5))
    joined = writer.reshape(f"{name}/joined", split, x.shape)
    factor, term = node.fixed(1), node.fixed(2)
    if node.opset < GROUP_SCALES_CHANNELS:
        factor, term = (np.repeat(values, channels // groups) for values in (factor, term))
    _channelwise(writer, name, joined, factor, term)


def _unit_length(writer: Writer, node: Node) -> None:
    x, name = writer.value(node.inputs[0]), node.output
    axis = node.get("axis", -1) % len(x.shape)
    if node.get("p", 2) == 2:
        square = combined(writer, f"{name}/square", "MUL", x, x)
        length = writer.like(f"{name}/length", "SQRT", reduced(writer, f"{name}/sum", "SUM", square, [axis], True))
    else:
        length = reduced(writer, f"{name}/sum", "SUM", writer.like(f"{name}/size", "ABS", x), [axis], True)
    combined(writer, name, "DIV", x, length)


def _local(writer: Writer, node: Node) -> None:
    size = node.get("size")
    if size % 2 == 0 or len(node.shape) != 4:
        raise node.refused(f"over {size} channels in {len(node.shape)} dimensions")
    writer.like(
        node.output, "LOCAL_RESPONSE_NORMALIZATION", writer.picture(node.inputs[0]), options="LocalResponseNormalizationOptions",
        radius=size // 2, bias=node.get("bias", 1.0), alpha=node.get("alpha", 1e-4) / size, beta=node.get("beta", 0.75),
    )  # fmt: skip


_STANDARD = ("MEAN", "SUB", "MUL", "ADD", "SQRT", "DIV")

TABLE = {
    "ReduceMean": Operator(_reduce, ("MEAN",)),
    **{name: Operator(_reduce, (op,), NUMBER) for name, op in _REDUCE.items() if name != "ReduceMean"},
    **{
        name: Operator(_reduce, tuple(filter(None, (before, "SUM", after))))
        for name, (before, after) in _AROUND.items()
    },
    "ReduceLogSumExp": Operator(_reduce, ("REDUCE_MAX", "SUB", "EXP", "SUM", "LOG", "ADD")),
    "GlobalAveragePool": Operator(_global, ("MEAN",)),
    "GlobalMaxPool": Operator(_global, ("REDUCE_MAX",)),
    "ArgMax": Operator(_arg, ("ARG_MAX",), NUMBER, "`select_last_index`"),
    "ArgMin": Operator(_arg, ("ARG_MIN",), NUMBER, "`select_last_index`"),
    "TopK": Operator(_top, ("TOPK_V2",), NUMBER, "the smallest; a computed number"),
    "CumSum": Operator(_cumulated, ("CUMSUM",), NUMBER, "a computed axis"),
    "BatchNormalization": Operator(_batch, ("MUL", "ADD"), limits="training; computed parameters"),
    "InstanceNormalization": Operator(_instance, _STANDARD, limits="computed parameters"),
    "LayerNormalization": Operator(_layer, _STANDARD, limits="the outputs of training"),
    "GroupNormalization": Operator(
        _group, _STANDARD, limits="computed parameters; more than 3 axes beside batch and channels"
    ),
    "LpNormalization": Operator(_unit_length, ("MUL", "ABS", "SUM", "SQRT", "DIV")),
    "LRN": Operator(_local, ("LOCAL_RESPONSE_NORMALIZATION",), limits="an even size; other than 4 dimensions"),
}
