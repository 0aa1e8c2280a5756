"""Stage 2, compile: resizing for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table.

ONNX has some forty ways to resize, TFLite three of each kind. Both are worked out as what they do to one axis, which element
is taken or how much of each; where TFLite's own operator does the same it is written, else GATHER or a product with that matrix.
Source of the formulas: ONNX's Resize (operator set 19), TFLite's kernels resize_nearest_neighbor and resize_bilinear. They are
worked out in float32, as the engines do, because the choice between two neighbours may hang on the last bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .graph import Array
from .layout import Value, channels_last, with_last
from .node import Node
from .writer import Operator, Writer

COORDINATES_GIVEN = 11  # before this operator set, coordinates were asymmetric and rounded down
_FLAGS = ((False, True), (True, False), (False, False))  # TFLite's (align_corners, half_pixel_centers)
_SAME = 1e-5  # two matrices closer than this are one: the engines' own rounding is of that size


class _Axis(NamedTuple):
    old: int
    new: int
    scale: np.float32


def _resize(writer: Writer, node: Node) -> None:
    x, mode = writer.value(node.inputs[0]), node.get("mode", "nearest")
    where = (
        "asymmetric"
        if node.opset < COORDINATES_GIVEN or node.op == "Upsample"
        else node.get("coordinate_transformation_mode", "half_pixel")
    )
    if where == "tf_crop_and_resize":
        raise node.refused("with tf_crop_and_resize")
    axes = {i: axis for i, axis in enumerate(_axes(node, x)) if axis.old != axis.new or axis.scale != 1}
    if node.get("antialias") and any(axis.scale < 1 for axis in axes.values()):
        raise node.refused("with antialias")
    if mode == "nearest":
        low = node.opset < COORDINATES_GIVEN or node.op == "Upsample"
        rounding = "floor" if low else node.get("nearest_mode", "round_prefer_floor")
        if rounding not in {"round_prefer_floor", "round_prefer_ceil", "floor", "ceil"}:
            raise node.refused(f"with nearest_mode {rounding!r}")
        taken = {i: _taken(_places(axis, where), axis.old, rounding) for i, axis in axes.items()}
        _nearest(writer, node, x, axes, taken)
    elif mode in {"linear", "cubic"}:
        made = {
            i: _linear(_places(axis, where), axis) if mode == "linear" else _cubic(node, _places(axis, where), axis)
            for i, axis in axes.items()
        }
        _weighted(writer, node, x, axes, made)
    else:
        raise node.refused(f"with mode {mode}")


def _axes(node: Node, x: Value) -> list[_Axis]:
    rank = len(x.shape)
    places = [a % rank for a in node.get("axes", range(rank))]
    ratios = [1.0] * rank
    given = 1 if node.opset < COORDINATES_GIVEN or node.op == "Upsample" else 2
    scales = (
        np.array(node.get("scales"), np.float32)
        if node.get("scales")
        else node.optional(given)
        if node.has(given)
        else None
    )
    if scales is not None and scales.size:
        for place, scale in zip(places, scales.reshape(-1), strict=True):
            ratios[place] = float(scale)
    else:
        sizes = node.fixed(3).reshape(-1)
        for place, size in zip(places, sizes, strict=True):
            ratios[place] = int(size) / x.shape[place]
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            kept = (min if policy == "not_larger" else max)(ratios[place] for place in places)
            for place in places:
                ratios[place] = kept
    return [_Axis(old, new, np.float32(ratio)) for old, new, ratio in zip(x.shape, node.shape, ratios, strict=True)]


# --- ONNX's ways, for one axis ----------------------------------------------------------------------------------------


def _places(axis: _Axis, where: str) -> Array:
    """Where in the old axis each element of the new one lies, float32."""
    new, half, scale = np.arange(axis.new, dtype=np.float32), np.float32(0.5), axis.scale
    places: Array = (new + half) / scale - half
    if where == "align_corners":
        places = new * np.float32(axis.old - 1) / np.float32(max(axis.new - 1, 1))
    elif where == "asymmetric":
        places = new / scale
    elif where == "tf_half_pixel_for_nn":
        places = (new + half) / scale
    elif where == "pytorch_half_pixel" and axis.new == 1:
        places = new * 0
    elif where == "half_pixel_symmetric":
        adjustment = np.float32(axis.new) / (scale * np.float32(axis.old))
        places = np.float32(axis.old / 2) * (1 - adjustment) + (new + half) / scale - half
    return places


def _taken(places: Array, old: int, rounding: str) -> Array:
    """The element that each new one is, by ``nearest_mode``."""
    half = np.float32(0.5)
    rounded = {
        "round_prefer_floor": np.ceil(places - half), "round_prefer_ceil": np.floor(places + half),
        "floor": np.floor(places), "ceil": np.ceil(places),
    }[rounding]  # fmt: skip
    taken: Array = np.clip(rounded, 0, old - 1).astype(np.int32)
    return taken


def _linear(places: Array, axis: _Axis) -> Array:
    """How much of each old element (columns) is in each new one (rows)."""
    places = np.clip(places, 0, axis.old - 1)
    low = np.floor(places).astype(int)
    return _rows(axis, (low, 1 - (places - low)), (np.minimum(low + 1, axis.old - 1), places - low))


def _cubic(node: Node, places: Array, axis: _Axis) -> Array:
    """Keys' kernel over four neighbours; those outside repeat the edge, or count for nothing with ``exclude_outside``."""
    a = float(node.get("cubic_coeff_a", -0.75))
    low = np.floor(places).astype(int)
    parts = []
    for step in (-1, 0, 1, 2):
        away = np.abs(places - (low + step)).astype(np.float64)
        near = ((a + 2) * away - (a + 3)) * away * away + 1
        far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
        weight = np.where(away <= 1, near, np.where(away < 2, far, 0.0))
        if node.get("exclude_outside"):
            weight = np.where((low + step < 0) | (low + step >= axis.old), 0.0, weight)
        parts.append((np.clip(low + step, 0, axis.old - 1), weight))
    made = _rows(axis, *parts)
    return made / made.sum(axis=1, keepdims=True) if node.get("exclude_outside") else made


def _rows(axis: _Axis, *parts: tuple[Array, Array]) -> Array:
    made = np.zeros((axis.new, axis.old))
    for columns, weights in parts:
        np.add.at(made, (np.arange(axis.new), columns), weights)
    return made.astype(np.float32)


# --- TFLite's ways ----------------------------------------------------------------------------------------------------


def _step(axis: _Axis, align: bool) -> Any:
    return (
        np.float32(axis.old - 1) / np.float32(axis.new - 1)
        if align and axis.new > 1
        else np.float32(axis.old) / np.float32(axis.new)
    )


def _tflite_taken(axis: _Axis, align: bool, half: bool) -> Array:
    places = (np.arange(axis.new, dtype=np.float32) + np.float32(0.5 if half else 0)) * _step(axis, align)
    return _taken(places, axis.old, "round_prefer_ceil" if align else "floor")


def _tflite_linear(axis: _Axis, align: bool, half: bool) -> Array:
    new, middle = np.arange(axis.new, dtype=np.float32), np.float32(0.5)
    step = _step(axis, align)
    return _linear((new + middle) * step - middle if half else new * step, axis)


def _native(
    writer: Writer, node: Node, x: Value, op: str, axes: dict[int, _Axis], agree: list[tuple[bool, bool]]
) -> bool:
    """Write TFLite's own operator, if it does the same under some of its flags."""
    if len(x.shape) != 4 or not set(axes) <= {2, 3} or not agree:
        return False
    x = writer.laid(x, channels_last(4))
    size = writer.integers(f"{node.output}/size", node.shape[2:])
    options = "ResizeNearestNeighborOptions" if op == "RESIZE_NEAREST_NEIGHBOR" else "ResizeBilinearOptions"
    align, half = agree[0]
    writer.emit(
        node.output, op, [x, size], node.shape, options, order=x.order, alignCorners=align, halfPixelCenters=half
    )
    return True


def _nearest(writer: Writer, node: Node, x: Value, axes: dict[int, _Axis], taken: dict[int, Array]) -> None:
    agree = [f for f in _FLAGS if all(np.array_equal(_tflite_taken(axes[i], *f), taken[i]) for i in axes)]
    if axes and _native(writer, node, x, "RESIZE_NEAREST_NEIGHBOR", axes, agree):
        return
    for axis, places in taken.items():
        shape = tuple(len(places) if i == axis else n for i, n in enumerate(x.shape))
        index = writer.constant(f"{node.output}/places", places)
        x = writer.emit(
            f"{node.output}/taken",
            "GATHER",
            [x, index],
            shape,
            "GatherOptions",
            order=x.order,
            dtype=x.dtype,
            axis=x.place(axis),
        )
    writer.alias(node.output, x)


def _weighted(writer: Writer, node: Node, x: Value, axes: dict[int, _Axis], made: dict[int, Array]) -> None:
    linear = node.get("mode") == "linear"
    agree = [
        f for f in _FLAGS
        if linear and all(np.allclose(_tflite_linear(axes[i], *f), made[i], rtol=0, atol=_SAME) for i in axes)
    ]  # fmt: skip
    if axes and _native(writer, node, x, "RESIZE_BILINEAR", axes, agree):
        return
    for axis, matrix in made.items():
        x = writer.laid(x, with_last(x.order, axis))
        shape = tuple(len(matrix) if i == axis else n for i, n in enumerate(x.shape))
        w = writer.constant(f"{node.output}/weights", matrix)
        b = writer.constant(f"{node.output}/bias", np.zeros(len(matrix), np.float32))
        x = writer.emit(
            f"{node.output}/mixed", "FULLY_CONNECTED", [x, w, b], shape, "FullyConnectedOptions", order=x.order,
            keepNumDims=True,
        )  # fmt: skip
    writer.alias(node.output, x)


_MAKES = ("RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR", "GATHER", "FULLY_CONNECTED")

TABLE = {
    "Resize": Operator(
        _resize, _MAKES, limits="`tf_crop_and_resize`; `antialias` when it gets smaller; computed sizes"
    ),
    "Upsample": Operator(_resize, _MAKES, limits="computed scales"),
}
