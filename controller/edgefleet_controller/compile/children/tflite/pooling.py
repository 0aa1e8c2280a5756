"""Stage 2, compile: pools for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table."""

from __future__ import annotations

import numpy as np

from .graph import Array
from .layout import Value, channels_last
from .node import Node
from .window import SAME, VALID, Window, window_of, with_border
from .writer import Operator, Writer


def _pool(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    rank = len(x.shape)
    if rank not in (3, 4):
        raise node.refused(f"in {rank - 2} dimensions")
    if rank == 3:
        x = writer.reshape(f"{node.output}/picture", x, (x.shape[0], x.shape[1], 1, x.shape[2]))
    x = writer.laid(x, channels_last(4))
    kernel = (1,) * (4 - rank) + tuple(node.get("kernel_shape"))
    window = window_of(node, kernel, (x.shape[2], x.shape[3]))
    if window.dilations != (1, 1):
        raise node.refused("with dilations")
    if len([name for name in node.outputs if name]) > 1:
        raise node.refused("with indices")
    out = node.shape[2:] if rank == 4 else (1, *node.shape[2:])
    window = window._replace(pads=_whole(window, x, out))
    (_average if node.op == "AveragePool" else _largest)(writer, node, x, window)


def _whole(window: Window, x: Value, out: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The pads with which an output of that size comes out evenly: ceil_mode asks for more after, others may need less."""
    top, left = window.pads[:2]
    ends = [(out[i] - 1) * window.strides[i] + window.span(i) - x.shape[2 + i] - window.pads[i] for i in (0, 1)]
    return top, left, max(ends[0], 0), max(ends[1], 0)


def _largest(writer: Writer, node: Node, x: Value, window: Window) -> None:
    if not any(window.pads):
        padding = VALID
    elif window.pads == window.same_pads((x.shape[2], x.shape[3])):
        padding = SAME
    else:
        x, padding = (
            with_border(writer, f"{node.output}/padded", x, window.pads, _border(writer, node, x, window)),
            VALID,
        )
    _emit(writer, node, "MAX_POOL_2D", x, window, padding)
    if writer.is_positive(node.inputs[0]):
        writer.mark_positive(node.output)


def _border(writer: Writer, node: Node, x: Value, window: Window) -> str:
    """Which border leaves the largest as it is. The lowest number does always, but as part of an int8 tensor's range it would
    ruin it: zeros do where nothing is below, and mirrored edges where each window holds what is mirrored into it."""
    if writer.is_positive(node.inputs[0]):
        return "PAD"
    inside = all(
        2 * max(window.pads[i], window.pads[i + 2]) <= window.kernel[i]
        and max(window.pads[i], window.pads[i + 2]) <= x.shape[2 + i]
        for i in (0, 1)
    )
    return "MIRROR_PAD" if inside else "PADV2"


def _average(writer: Writer, node: Node, x: Value, window: Window) -> None:
    size = (x.shape[2], x.shape[3])
    counted = bool(node.get("count_include_pad"))
    if not any(window.pads):
        _emit(writer, node, "AVERAGE_POOL_2D", x, window, VALID)
    elif window.pads == window.same_pads(size) and not counted:
        _emit(writer, node, "AVERAGE_POOL_2D", x, window, SAME)
    else:
        # SAME leaves the border out of the mean. Here it is real zeros, and then the mean is put right where that was wrong.
        given = window_of(node, window.kernel, size).pads
        wide = with_border(writer, f"{node.output}/padded", x, window.pads, "PAD")
        _emit(
            writer,
            node,
            "AVERAGE_POOL_2D",
            wide,
            window,
            VALID,
            _correction(window, given if counted else (0, 0, 0, 0), size),
        )


def _correction(window: Window, counted: tuple[int, int, int, int], size: tuple[int, int]) -> Array:
    """Window's size by the number of elements that count, 1 x 1 x height x width: those of the picture and of the border that
    ``count_include_pad`` counts; what ceil_mode adds beyond never counts."""
    ratios = []
    for i in (0, 1):
        line = np.zeros(size[i] + window.pads[i] + window.pads[i + 2])
        start = window.pads[i] - counted[i]
        line[start : window.pads[i] + size[i] + counted[i + 2]] = 1
        places = range(0, len(line) - window.kernel[i] + 1, window.strides[i])
        ratios.append([window.kernel[i] / line[p : p + window.kernel[i]].sum() for p in places])
    factor: Array = np.outer(np.array(ratios[0]), np.array(ratios[1]))[None, None].astype(np.float32)
    return factor


def _emit(
    writer: Writer, node: Node, op: str, x: Value, window: Window, padding: int, factor: Array | None = None
) -> None:
    fits = factor is None or bool((factor == 1).all())
    line = len(node.shape) == 3
    fused, name = writer.activation(node) if fits and not line else (0, node.output)
    out = window.unpadded((x.shape[2], x.shape[3])) if padding == VALID else window.same_size((x.shape[2], x.shape[3]))
    made = writer.emit(
        name if fits and not line else f"{name}/pooled", op, [x], (*x.shape[:2], *out), "Pool2DOptions",
        order=x.order, padding=padding, strideH=window.strides[0], strideW=window.strides[1],
        filterHeight=window.kernel[0], filterWidth=window.kernel[1], fusedActivationFunction=fused,
    )  # fmt: skip
    if factor is not None and not fits:
        c = writer.laid(writer.constant(f"{name}/factor", factor), x.order)
        made = writer.like(name if not line else f"{name}/mean", "MUL", made, c, options="MulOptions")
    if line:
        writer.reshape(name, made, node.shape)


_LIMITS = "3 and more dimensions beside batch and channels; dilations"

TABLE = {
    "MaxPool": Operator(_pool, ("MAX_POOL_2D", "PAD", "PADV2", "MIRROR_PAD"), limits=f"{_LIMITS}; indices"),
    "AveragePool": Operator(_pool, ("AVERAGE_POOL_2D", "PAD", "MUL"), limits=_LIMITS),
}
