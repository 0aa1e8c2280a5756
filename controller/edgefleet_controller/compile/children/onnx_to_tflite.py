"""Stage 2, compile: ONNX to a float .tflite. Receives a simplified ONNX model with fixed shapes, hands on the file's bytes.

One emitter per operator; those of convolutional networks are covered (:data:`OPERATORS`), any other is refused by name. How
values lie in memory meanwhile is :mod:`.tflite_writer`'s affair.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import helper

from .tflite_writer import ACTIVATION, TO_NHWC, Emit, Value, Writer, attributes, refused, relu_kind


class Converted(NamedTuple):
    """A float .tflite, and names of tensors by which its quantizer is steered: the one that each ONNX node makes, by the node's name;
    those of whole numbers, whose operators must be left alone; and the ONNX value that a tensor of the file alone holds."""

    content: bytes
    made: dict[str, str]
    whole: list[str]
    same_as: dict[str, str]


def convert(model: onnx.ModelProto) -> Converted:
    """A float .tflite with ONNX's inputs and outputs.

    Raises:
        Refused: an operator, or a use of one, that TFLite or this writer lacks; names node and operator.
    """
    writer = Writer(model, OPERATORS)
    return Converted(writer.write(), writer.made, writer.graph.whole, writer.same_as)


# --- convolutions and pools -------------------------------------------------------------------------------------------


class _Window(NamedTuple):
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right

    def out(self, size: tuple[int, int]) -> tuple[int, ...]:
        return tuple(
            (size[i] + self.pads[i] + self.pads[i + 2] - (self.kernel[i] - 1) * self.dilations[i] - 1)
            // self.strides[i]
            + 1
            for i in (0, 1)
        )

    def same(self, size: tuple[int, int]) -> bool:
        """Whether the pads are TFLite's SAME, which puts the odd one after."""
        for i in (0, 1):
            total = _same_total(size[i], self.kernel[i], self.strides[i], self.dilations[i])
            if (self.pads[i], self.pads[i + 2]) != (total // 2, total - total // 2):
                return False
        return True


def _same_total(size: int, kernel: int, stride: int, dilation: int) -> int:
    return max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)


def _window(node: onnx.NodeProto, kernel: tuple[int, ...], size: tuple[int, int]) -> _Window:
    given = attributes(node)
    if len(kernel) != 2:
        raise refused(node, f"in {len(kernel)} dimensions")
    if given.get("ceil_mode"):
        raise refused(node, "with ceil_mode")
    strides, dilations = tuple(given.get("strides", (1, 1))), tuple(given.get("dilations", (1, 1)))
    pads = tuple(given.get("pads", (0, 0, 0, 0)))
    auto = given.get("auto_pad", b"NOTSET").decode()
    if auto in {"SAME_UPPER", "SAME_LOWER"}:
        totals = [_same_total(size[i], kernel[i], strides[i], dilations[i]) for i in (0, 1)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = tuple(small + large if auto == "SAME_UPPER" else large + small)
    return _Window(kernel, strides, dilations, pads)


def _padded(writer: Writer, node: onnx.NodeProto, x: Value, window: _Window, fill: float) -> tuple[Value, int]:
    """(input, TFLite padding) for a window; pads that TFLite can't express become an operator of their own."""
    size = (x.shape[2], x.shape[3])
    if not any(window.pads):
        return x, schema.Padding.VALID
    if window.same(size):
        return x, schema.Padding.SAME
    top, left, bottom, right = window.pads
    pads = writer.graph.constant(
        f"{node.name}/pads", np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
    )
    shape = (x.shape[0], x.shape[1], size[0] + top + bottom, size[1] + left + right)
    padded = Value(-1, shape, True)
    padded = padded._replace(tensor=writer.graph.tensor(f"{node.output[0]}/padded", padded.stored))
    if fill == 0.0:
        writer.graph.operator("PAD", [x.tensor, pads], [padded.tensor], "PadOptions")
    else:
        value = writer.graph.constant(f"{node.name}/fill", np.array([fill], np.float32))
        writer.graph.operator("PADV2", [x.tensor, pads, value], [padded.tensor], "PadV2Options")
    return padded, schema.Padding.VALID


def _conv(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.picture(node.input[0])
    weight = writer.fixed(node, 1)
    bias = writer.optional(node, 2)
    out_channels, per_group = weight.shape[:2]
    groups, channels = attributes(node).get("group", 1), x.shape[1]
    window = _window(node, weight.shape[2:], (x.shape[2], x.shape[3]))
    shape = (x.shape[0], out_channels, *window.out((x.shape[2], x.shape[3])))
    x, padding = _padded(writer, node, x, window, 0.0)
    fused, name = writer.activation(node)
    common = {
        "padding": padding, "strideH": window.strides[0], "strideW": window.strides[1],
        "dilationHFactor": window.dilations[0], "dilationWFactor": window.dilations[1], "fusedActivationFunction": fused,
    }  # fmt: skip
    bias = np.zeros(out_channels, np.float32) if bias is None else bias.reshape(out_channels)
    b = writer.graph.constant(f"{node.output[0]}/bias", bias)
    if groups > 1 and groups == channels and per_group == 1:
        w = writer.graph.constant(
            node.input[1], weight.reshape(out_channels, *weight.shape[2:]).transpose(1, 2, 0)[None]
        )
        writer.emit(
            name, "DEPTHWISE_CONV_2D", [x.tensor, w, b], shape, "DepthwiseConv2DOptions",
            nhwc=True, depthMultiplier=out_channels // channels, **common,
        )  # fmt: skip
    elif groups == 1:
        w = writer.graph.constant(node.input[1], weight.transpose(0, 2, 3, 1))
        writer.emit(name, "CONV_2D", [x.tensor, w, b], shape, "Conv2DOptions", nhwc=True, **common)
    else:
        raise refused(node, f"with {groups} groups over {channels} channels")


def _pool(writer: Writer, node: onnx.NodeProto) -> None:
    x, given = writer.picture(node.input[0]), attributes(node)
    window = _window(node, tuple(given["kernel_shape"]), (x.shape[2], x.shape[3]))
    if window.dilations != (1, 1) or len([o for o in node.output if o]) > 1:
        raise refused(node, "with dilations or indices")
    shape = (x.shape[0], x.shape[1], *window.out((x.shape[2], x.shape[3])))
    average = node.op_type == "AveragePool"
    if (
        average
        and any(window.pads)
        and not given.get("count_include_pad")
        and not window.same((x.shape[2], x.shape[3]))
    ):
        raise refused(node, "with these pads")
    if average and given.get("count_include_pad") and any(window.pads):
        # SAME leaves padding out of the mean, so padding that counts has to be real zeros.
        window_without = window._replace(kernel=(10**6, 10**6))
        x, padding = _padded(writer, node, x, window_without, 0.0)
    else:
        x, padding = _padded(writer, node, x, window, 0.0 if average else float("-inf"))
    fused, name = writer.activation(node)
    writer.emit(
        name, "AVERAGE_POOL_2D" if average else "MAX_POOL_2D", [x.tensor], shape, "Pool2DOptions",
        nhwc=True, padding=padding, strideH=window.strides[0], strideW=window.strides[1],
        filterHeight=window.kernel[0], filterWidth=window.kernel[1], fusedActivationFunction=fused,
    )  # fmt: skip


def _global_average(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.picture(node.input[0])
    axes = writer.graph.constant("axes/hw", np.array([1, 2], np.int32))
    writer.emit(
        node.output[0], "MEAN", [x.tensor, axes], (*x.shape[:2], 1, 1), "ReducerOptions", nhwc=True, keepDims=True
    )


_REDUCE = {"ReduceMean": "MEAN", "ReduceMax": "REDUCE_MAX", "ReduceMin": "REDUCE_MIN", "ReduceSum": "SUM"}


def _reduce(writer: Writer, node: onnx.NodeProto) -> None:
    given, x = attributes(node), writer.value(node.input[0])
    axes = given.get("axes")
    if axes is None:
        found = writer.optional(node, 1)
        axes = range(len(x.shape)) if found is None else found.tolist()
    axes = sorted(a % len(x.shape) for a in axes)
    keep = bool(given.get("keepdims", 1))
    if x.nhwc and not keep:
        x = writer.plain(node.input[0])
    stored = [TO_NHWC.index(a) for a in axes] if x.nhwc else list(axes)
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes)
    constant = writer.graph.constant(f"{node.output[0]}/axes", np.array(stored, np.int32))
    writer.emit(
        node.output[0], _REDUCE[node.op_type], [x.tensor, constant], shape, "ReducerOptions",
        nhwc=x.nhwc, dtype=x.dtype, keepDims=keep,
    )  # fmt: skip


# --- element by element -----------------------------------------------------------------------------------------------

_BINARY = {
    "Add": ("ADD", "AddOptions"),
    "Sub": ("SUB", "SubOptions"),
    "Mul": ("MUL", "MulOptions"),
    "Div": ("DIV", "DivOptions"),
}
_UNARY = {
    "Sigmoid": "LOGISTIC",
    "Tanh": "TANH",
    "Relu": "RELU",
    "Exp": "EXP",
    "Sqrt": "SQRT",
    "Abs": "ABS",
    "Neg": "NEG",
}


def _binary(writer: Writer, node: onnx.NodeProto) -> None:
    op, options = _BINARY[node.op_type]
    shape = tuple(np.broadcast_shapes(*(writer.shape(name) for name in node.input)))
    nhwc = any(writer.value(name).nhwc for name in node.input)
    sides = [_side(writer, name, len(shape), nhwc) for name in node.input]
    fused, name = writer.activation(node) if sides[0].dtype == np.float32 else (ACTIVATION.NONE, node.output[0])
    writer.emit(
        name,
        op,
        [s.tensor for s in sides],
        shape,
        options,
        nhwc=nhwc,
        dtype=sides[0].dtype,
        fusedActivationFunction=fused,
    )


def _side(writer: Writer, name: str, rank: int, nhwc: bool) -> Value:
    """One side of a broadcast, in the order of the result."""
    if not nhwc:
        return writer.plain(name)
    array = writer.constant(name)
    if array is not None:
        laid = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(TO_NHWC)
        return Value(writer.graph.constant(f"{name}/nhwc", laid), (), True, array.dtype)
    value = writer.value(name)
    if len(value.shape) == rank:
        return writer.picture(name)
    wide = (1,) * (rank - len(value.shape)) + value.shape
    _reshaped(writer, f"{name}/wide", value, wide)
    return writer.picture(f"{name}/wide")


def _unary(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.value(node.input[0])
    writer.emit(node.output[0], _UNARY[node.op_type], [x.tensor], x.shape, nhwc=x.nhwc, dtype=x.dtype)


def _scalar(writer: Writer, name: str, op: str, x: Value, number: float, options: str = "") -> Value:
    constant = writer.graph.constant(
        f"scalar/{number}/{len(x.shape)}", np.full((1,) * len(x.shape), number, np.float32)
    )
    return writer.emit(name, op, [x.tensor, constant], x.shape, options, nhwc=x.nhwc)


def _clip(writer: Writer, node: onnx.NodeProto) -> None:
    x, name = writer.value(node.input[0]), node.output[0]
    if relu_kind(writer, node) == ACTIVATION.RELU6:
        writer.emit(name, "RELU6", [x.tensor], x.shape, nhwc=x.nhwc)
        return
    low, high = writer.optional(node, 1), writer.optional(node, 2)
    if low is not None:
        writer.same_as[f"{name}/low"] = node.input[
            0
        ]  # or less: what the lower limit takes away is no matter for its range
        x = _scalar(
            writer, f"{name}/low" if high is not None else name, "MAXIMUM", x, low.item(), "MaximumMinimumOptions"
        )
    if high is not None:
        x = _scalar(writer, name, "MINIMUM", x, high.item(), "MaximumMinimumOptions")
    writer.alias(name, x)


def _leaky(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.value(node.input[0])
    alpha = float(attributes(node).get("alpha", 0.01))
    writer.emit(node.output[0], "LEAKY_RELU", [x.tensor], x.shape, "LeakyReluOptions", nhwc=x.nhwc, alpha=alpha)


def _hard_swish(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.value(node.input[0])
    writer.emit(node.output[0], "HARD_SWISH", [x.tensor], x.shape, "HardSwishOptions", nhwc=x.nhwc)


def _hard_sigmoid(writer: Writer, node: onnx.NodeProto) -> None:
    given, name = attributes(node), node.output[0]
    alpha, beta = float(given.get("alpha", 0.2)), float(given.get("beta", 0.5))
    # relu6(6 * (alpha x + beta)) / 6 needs no minimum and maximum, which int8 kernels of small boards lack.
    x = _scalar(writer, f"{name}/scaled", "MUL", writer.value(node.input[0]), 6 * alpha, "MulOptions")
    x = _scalar(writer, f"{name}/shifted", "ADD", x, 6 * beta, "AddOptions")
    x = writer.emit(f"{name}/clipped", "RELU6", [x.tensor], x.shape, nhwc=x.nhwc)
    _scalar(writer, name, "MUL", x, 1 / 6, "MulOptions")


def _batch_norm(writer: Writer, node: onnx.NodeProto) -> None:
    scale, bias, mean, variance = (writer.fixed(node, i) for i in (1, 2, 3, 4))
    factor = scale / np.sqrt(variance + attributes(node).get("epsilon", 1e-5))
    x, name = writer.value(node.input[0]), node.output[0]
    width = (-1,) if x.nhwc or len(x.shape) == 2 else (-1, *(1,) * (len(x.shape) - 2))
    for suffix, op, options, values in (
        ("/scaled", "MUL", "MulOptions", factor),
        ("", "ADD", "AddOptions", bias - mean * factor),
    ):
        constant = writer.graph.constant(f"{name}{suffix}/constant", values.astype(np.float32).reshape(width))
        x = writer.emit(name + suffix, op, [x.tensor, constant], x.shape, options, nhwc=x.nhwc)


def _softmax(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.plain(node.input[0])
    if attributes(node).get("axis", -1) % len(x.shape) != len(x.shape) - 1:
        raise refused(node, "over another axis than the last")
    writer.emit(node.output[0], "SOFTMAX", [x.tensor], x.shape, "SoftmaxOptions", beta=1.0)


def _cast(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.value(node.input[0])
    wanted = np.dtype(helper.tensor_dtype_to_np_dtype(attributes(node)["to"]))
    wanted = np.dtype(np.int32) if wanted == np.int64 else wanted
    if wanted not in (np.dtype(np.float32), np.dtype(np.int32)):
        raise refused(node, f"to {wanted}")
    if wanted == x.dtype:
        writer.alias(node.output[0], x)
        return
    writer.emit(node.output[0], "CAST", [x.tensor], x.shape, nhwc=x.nhwc, dtype=wanted)


# --- shapes -----------------------------------------------------------------------------------------------------------


def _reshaped(writer: Writer, name: str, x: Value, shape: tuple[int, ...]) -> Value:
    constant = writer.graph.constant(f"{name}/shape", np.array(shape, np.int32))
    return writer.emit(
        name, "RESHAPE", [x.tensor, constant], shape, "ReshapeOptions", dtype=x.dtype, newShape=list(shape)
    )


def _reshape(writer: Writer, node: onnx.NodeProto) -> None:
    source = writer.shape(node.input[0])
    given = attributes(node)
    shape: tuple[int, ...]
    match node.op_type:
        case "Flatten":
            axis = given.get("axis", 1) % (len(source) + 1)
            shape = (int(np.prod(source[:axis])), int(np.prod(source[axis:])))
        case "Reshape":
            wanted = writer.fixed(node, 1).tolist()
            if not given.get("allowzero"):
                wanted = [source[i] if n == 0 else n for i, n in enumerate(wanted)]
            known = int(np.prod([n for n in wanted if n != -1]))
            shape = tuple(int(np.prod(source)) // known if n == -1 else int(n) for n in wanted)
        case "Squeeze":
            axes = given.get("axes") or (writer.fixed(node, 1).tolist() if len(node.input) > 1 else None)
            gone = {a % len(source) for a in axes} if axes else {i for i, n in enumerate(source) if n == 1}
            shape = tuple(n for i, n in enumerate(source) if i not in gone)
        case _:  # Unsqueeze
            axes = given.get("axes") or writer.fixed(node, 1).tolist()
            rank = len(source) + len(axes)
            new, left = {a % rank for a in axes}, iter(source)
            shape = tuple(1 if i in new else next(left) for i in range(rank))
    _reshaped(writer, node.output[0], writer.plain(node.input[0]), shape)


def _transpose(writer: Writer, node: onnx.NodeProto) -> None:
    x = writer.plain(node.input[0])
    order = attributes(node).get("perm", list(range(len(x.shape)))[::-1])
    constant = writer.graph.constant(f"{node.output[0]}/order", np.array(order, np.int32))
    writer.emit(
        node.output[0],
        "TRANSPOSE",
        [x.tensor, constant],
        tuple(x.shape[i] for i in order),
        "TransposeOptions",
        dtype=x.dtype,
    )


def _concat(writer: Writer, node: onnx.NodeProto) -> None:
    shapes = [writer.shape(name) for name in node.input]
    axis = attributes(node)["axis"] % len(shapes[0])
    nhwc = any(writer.value(name).nhwc for name in node.input)
    values = [_side(writer, name, 4, True) if nhwc else writer.plain(name) for name in node.input]
    shape = tuple(sum(s[i] for s in shapes) if i == axis else n for i, n in enumerate(shapes[0]))
    stored = TO_NHWC.index(axis) if nhwc else axis
    writer.emit(
        node.output[0], "CONCATENATION", [v.tensor for v in values], shape, "ConcatenationOptions",
        nhwc=nhwc, axis=stored, fusedActivationFunction=ACTIVATION.NONE,
    )  # fmt: skip


def _pad(writer: Writer, node: onnx.NodeProto) -> None:
    given = attributes(node)
    if given.get("mode", b"constant") != b"constant" or len(node.input) > 3:
        raise refused(node, "in this mode")
    fill = writer.optional(node, 2)
    if fill is not None and fill.item() != 0.0:
        raise refused(node, "with a value other than 0")
    x = writer.value(node.input[0])
    pads = np.array(given.get("pads") or writer.fixed(node, 1)).reshape(2, -1).T
    shape = tuple(int(n + a + b) for n, (a, b) in zip(x.shape, pads, strict=True))
    stored = pads[list(TO_NHWC)] if x.nhwc else pads
    constant = writer.graph.constant(f"{node.output[0]}/pads", stored.astype(np.int32))
    writer.emit(node.output[0], "PAD", [x.tensor, constant], shape, "PadOptions", nhwc=x.nhwc)


def _dense(writer: Writer, node: onnx.NodeProto) -> None:
    given = attributes(node)
    if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise refused(node, "with transA, alpha or beta")
    x, weight = writer.plain(node.input[0]), writer.fixed(node, 1)
    if weight.ndim != 2:
        raise refused(node, f"with a matrix of {weight.ndim} dimensions")
    weight = weight if given.get("transB") else weight.T
    bias = writer.optional(node, 2) if node.op_type == "Gemm" else None
    bias = (
        np.zeros(weight.shape[0], np.float32) if bias is None else np.broadcast_to(bias.reshape(-1), (weight.shape[0],))
    )
    w = writer.graph.constant(node.input[1], weight)
    b = writer.graph.constant(f"{node.output[0]}/bias", bias)
    fused, name = writer.activation(node)
    writer.emit(
        name, "FULLY_CONNECTED", [x.tensor, w, b], (*x.shape[:-1], weight.shape[0]), "FullyConnectedOptions",
        fusedActivationFunction=fused, keepNumDims=len(x.shape) > 2,
    )  # fmt: skip


def _same(writer: Writer, node: onnx.NodeProto) -> None:
    writer.alias(node.output[0], writer.value(node.input[0]))


OPERATORS: dict[str, Emit] = {
    "Conv": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_average,
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    "Clip": _clip,
    "LeakyRelu": _leaky,
    "HardSwish": _hard_swish,
    "HardSigmoid": _hard_sigmoid,
    "BatchNormalization": _batch_norm,
    "Softmax": _softmax,
    "Cast": _cast,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Concat": _concat,
    "Pad": _pad,
    "Gemm": _dense,
    "MatMul": _dense,
    **dict.fromkeys(("Identity", "Dropout"), _same),
}
