"""Stage 2, compile: what moves elements without computing, for :mod:`.onnx_to_tflite`. Receives nodes, appends operators; hands on its table.

Transposes only rename axes, and reshapes keep the order where they can: see :mod:`.layout`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from .elementwise import EVERY, NUMBER
from .layout import Value, plain, widened
from .node import Node
from .writer import ACTIVATION, BOOL, Operator, Writer

MAX_RANK = 5  # of slices and pads in TFLite's kernels
MAX_EDGE = 8  # an edge is repeated by so many operators at most


def _reshape(writer: Writer, node: Node) -> None:
    writer.reshape(node.output, writer.value(node.inputs[0]), node.shape)
    _pass_on(writer, node)


def _transpose(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    perm = node.get("perm", plain(len(x.shape))[::-1])
    if sorted(perm) != list(plain(len(x.shape))):
        raise node.refused(f"with perm {list(perm)}")
    writer.transpose(node.output, x, perm)
    _pass_on(writer, node)


def _same(writer: Writer, node: Node) -> None:
    if len([name for name in node.outputs if name]) > 1:
        raise node.refused("with its mask")
    if node.op == "Dropout" and node.has(2) and bool(node.fixed(2).item()):
        raise node.refused("in training")
    writer.alias(node.output, writer.value(node.inputs[0]))
    _pass_on(writer, node)


def _pass_on(writer: Writer, node: Node) -> None:
    if writer.is_positive(node.inputs[0]):
        writer.mark_positive(node.output)


def _concat(writer: Writer, node: Node) -> None:
    values = [writer.value(name) for name in node.inputs]
    if len(values) == 1:
        writer.alias(node.output, values[0])
        return
    computed = [v for name, v in zip(node.inputs, values, strict=True) if node.values[node.inputs.index(name)] is None]
    rank = len(node.shape)
    order = max(computed or values, key=lambda v: (np.prod(v.shape), v.order != plain(rank))).order
    values = [writer.laid(v, order) for v in values]
    if len({v.dtype for v in values}) > 1:
        raise node.refused("of several types")
    place = values[0].place(node.get("axis") % rank)
    writer.emit(
        node.output, "CONCATENATION", values, node.shape, "ConcatenationOptions",
        order=order, dtype=values[0].dtype, axis=place, fusedActivationFunction=ACTIVATION.NONE,
    )  # fmt: skip
    if all(writer.is_positive(name) for name in node.inputs):
        writer.mark_positive(node.output)


def _split(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    axis = node.get("axis", 0) % len(x.shape)
    node.ints("split", 1)  # refuses a computed one
    sizes = [node.made[name].shape[axis] if name else 0 for name in node.outputs]
    if len(set(sizes)) == 1:
        stored = tuple(sizes[0] if a == axis else x.shape[a] for a in x.order)
        tensors = [writer.graph.tensor(name, stored, x.dtype) for name in node.outputs]
        place = writer.number(f"{node.output}/axis", x.place(axis), np.int32)
        writer.graph.operator("SPLIT", [place.tensor, x.tensor], tensors, "SplitOptions", numSplits=len(tensors))
        for name, tensor in zip(node.outputs, tensors, strict=True):
            writer.alias(name, Value(tensor, node.made[name].shape, x.order, x.dtype))
        return
    if "" in node.outputs:
        raise node.refused("with an output that is left out")
    _limit(node, x)
    start = 0
    for name, size in zip(node.outputs, sizes, strict=True):
        sliced(writer, name, x, {axis: (start, size)})
        start += size


def sliced(writer: Writer, name: str, x: Value, parts: dict[int, tuple[int, int]]) -> Value:
    """The part of a value: of each of these axes, from where and how much."""
    begin = [parts.get(a, (0, 0))[0] for a in x.order]
    size = [parts[a][1] if a in parts else x.shape[a] for a in x.order]
    start, extent = writer.integers(f"{name}/start", begin), writer.integers(f"{name}/extent", size)
    shape = tuple(parts[a][1] if a in parts else n for a, n in enumerate(x.shape))
    return writer.emit(name, "SLICE", [x, start, extent], shape, "SliceOptions", order=x.order, dtype=x.dtype)


def _limit(node: Node, x: Value) -> None:
    if len(x.shape) > MAX_RANK:
        raise node.refused(f"in {len(x.shape)} dimensions")


def _slice(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    rank = len(x.shape)
    _limit(node, x)
    starts, ends = node.ints("starts", 1), node.ints("ends", 2)
    axes = node.ints("axes", 3) if node.has(3) or "axes" in node.attributes else None
    steps = node.ints("steps", 4) if node.has(4) else None
    if starts is None or ends is None:
        raise node.refused("without starts and ends")
    axes = [a % rank for a in (range(len(starts)) if axes is None else axes)]
    ranges = {
        a: range(x.shape[a])[slice(start, end, step)]
        for a, start, end, step in zip(axes, starts, ends, steps or [1] * len(axes), strict=True)
    }
    if all(r.step == 1 for r in ranges.values()):
        sliced(writer, node.output, x, {a: (r.start, len(r)) for a, r in ranges.items()})
        return
    begin, end, step, mask = [], [], [], 0
    for place, axis in enumerate(x.order):
        r = ranges.get(axis, range(x.shape[axis]))
        begin.append(r.start)
        end.append(r.stop)
        step.append(r.step)
        mask |= (r.stop < 0) << place  # down to the first element: an end of -1 would mean the last
    parts = [writer.integers(f"{node.output}/{n}", v) for n, v in (("begin", begin), ("end", end), ("step", step))]
    writer.emit(
        node.output, "STRIDED_SLICE", [x, *parts], node.shape, "StridedSliceOptions", order=x.order, dtype=x.dtype,
        beginMask=0, endMask=mask, ellipsisMask=0, newAxisMask=0, shrinkAxisMask=0,
    )  # fmt: skip


def _gather(writer: Writer, node: Node) -> None:
    x, places = writer.value(node.inputs[0]), node.values[1]
    axis = node.get("axis", 0) % len(x.shape)
    size = x.shape[axis]
    if places is not None:
        if places.size and (places.min() < -size or places.max() >= size):
            raise node.refused(f"with places outside of {size} elements")
        index = writer.constant(f"{node.output}/places", np.where(places < 0, places + size, places).astype(np.int32))
    else:
        index = writer.plain(node.inputs[1])
    more = len(index.shape)
    names = {a: a if a < axis else a + more - 1 for a in range(len(x.shape))}
    order: list[int] = []
    for a in x.order:
        order += range(axis, axis + more) if a == axis else [names[a]]
    writer.emit(
        node.output,
        "GATHER",
        [x, index],
        node.shape,
        "GatherOptions",
        order=tuple(order),
        dtype=x.dtype,
        axis=x.place(axis),
    )


def _gather_elements(writer: Writer, node: Node) -> None:
    """ONNX names a place on one axis for each element; TFLite wants it on all."""
    x = writer.plain(node.inputs[0])
    axis = node.get("axis", 0) % len(x.shape)
    stay = np.indices(node.shape, np.int32)
    _gather_places(
        writer,
        node,
        x,
        [*stay[:axis, ..., None]],
        [*stay[axis + 1 :, ..., None]],
        (*node.shape, 1),
        x.shape[axis : axis + 1],
    )


def _gather_nd(writer: Writer, node: Node) -> None:
    x = writer.plain(node.inputs[0])
    batch, places = node.get("batch_dims", 0), writer.plain(node.inputs[1]).shape
    stay = np.indices(places[:-1], np.int32)
    _gather_places(writer, node, x, [*stay[:batch, ..., None]], [], places, x.shape[batch : batch + places[-1]])


def _gather_places(
    writer: Writer,
    node: Node,
    x: Value,
    before: list[Any],
    after: list[Any],
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
) -> None:
    """GATHER_ND of elements, or slices, whose place on some axes is told by the second input and stays on others.

    Args:
        before, after: places on the axes that come before and after those that are told, each with last axis 1.
        shape: of what tells the others, in last axis.
        sizes: of the axes that are told.
    """
    places = node.values[1]
    if places is not None:
        told = places.reshape(shape)
        if told.size and ((told < -np.array(sizes)) | (told >= np.array(sizes))).any():
            raise node.refused(f"with places outside of {' x '.join(map(str, sizes))} elements")
        told = np.where(told < 0, told + np.array(sizes), told).astype(np.int32)
        index = writer.constant(f"{node.output}/places", np.concatenate([*before, told, *after], axis=-1))
    else:
        index = writer.reshape(f"{node.output}/told", writer.plain(node.inputs[1]), shape)
        parts = [writer.constant(f"{node.output}/axis{n}", part) for n, part in enumerate((*before, *after))]
        if parts:
            parts.insert(len(before), index)
            index = writer.emit(
                f"{node.output}/places", "CONCATENATION", parts, (*shape[:-1], shape[-1] + len(parts) - 1), "ConcatenationOptions",
                dtype=np.int32, axis=len(shape) - 1, fusedActivationFunction=ACTIVATION.NONE,
            )  # fmt: skip
    writer.emit(node.output, "GATHER_ND", [x, index], node.shape, "GatherNdOptions", dtype=x.dtype)


def _pad(writer: Writer, node: Node) -> None:
    x, mode = writer.value(node.inputs[0]), node.get("mode", "constant")
    rank = len(x.shape)
    _limit(node, x)
    pads = node.ints("pads", 1) or []
    axes = [a % rank for a in node.fixed(3).tolist()] if node.has(3) else list(range(rank))
    first, last = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        first[axis], last[axis] = pads[i], pads[i + len(axes)]
    if min(*first, *last, 0) < 0:
        parts = {a: (max(-first[a], 0), x.shape[a] - max(-first[a], 0) - max(-last[a], 0)) for a in range(rank)}
        x = sliced(writer, f"{node.output}/cut", x, parts)
        first, last = [max(n, 0) for n in first], [max(n, 0) for n in last]
    fill = node.number("value", 2) or 0.0
    if not any((*first, *last)):
        writer.alias(node.output, x)
    elif mode == "constant":
        _bordered(writer, node.output, x, first, last, fill)
    elif mode == "reflect":
        if any(max(first[a], last[a]) >= n for a, n in enumerate(x.shape) if first[a] or last[a]):
            raise node.refused("in mode reflect by more than there is")
        _bordered(writer, node.output, x, first, last, 0.0, schema.MirrorPadMode.REFLECT)
    elif mode == "edge" and max(*first, *last) <= MAX_EDGE:
        for _ in range(max(*first, *last)):  # mirrored by one element, the edge is repeated
            x = _bordered(
                writer, f"{node.output}/edge", x, [min(n, 1) for n in first], [min(n, 1) for n in last], 0.0,
                schema.MirrorPadMode.SYMMETRIC,
            )  # fmt: skip
            first, last = [max(n - 1, 0) for n in first], [max(n - 1, 0) for n in last]
        writer.alias(node.output, x)
    else:
        raise node.refused(f"in mode {mode} by {max(*first, *last)}")


def _bordered(
    writer: Writer, name: str, x: Value, first: list[int], last: list[int], fill: float, mirror: int | None = None
) -> Value:
    pads = writer.constant(f"{name}/pads", np.array([[first[a], last[a]] for a in x.order], np.int32))
    shape = tuple(n + first[a] + last[a] for a, n in enumerate(x.shape))
    common: dict[str, Any] = {"order": x.order, "dtype": x.dtype}
    if mirror is not None:
        return writer.emit(name, "MIRROR_PAD", [x, pads], shape, "MirrorPadOptions", mode=int(mirror), **common)
    if fill == 0.0:
        return writer.emit(name, "PAD", [x, pads], shape, "PadOptions", **common)
    value = writer.number(f"{name}/fill", fill, x.dtype)
    return writer.emit(name, "PADV2", [x, pads, value], shape, "PadV2Options", **common)


def _expand(writer: Writer, node: Node) -> None:
    x = widened(writer.value(node.inputs[0]), len(node.shape))
    if x.shape == node.shape:
        writer.reshape(node.output, writer.value(node.inputs[0]), node.shape)
        return
    wide = x._replace(tensor=writer.reshaped(f"{node.output}/wide", x, x.stored).tensor)
    size = writer.integers(f"{node.output}/size", [node.shape[a] for a in x.order])
    writer.emit(node.output, "BROADCAST_TO", [wide, size], node.shape, order=x.order, dtype=x.dtype)


def _tile(writer: Writer, node: Node) -> None:
    x = writer.value(node.inputs[0])
    times = node.fixed(1).tolist()
    counts = writer.integers(f"{node.output}/times", [times[a] for a in x.order])
    writer.emit(node.output, "TILE", [x, counts], node.shape, "TileOptions", order=x.order, dtype=x.dtype)


def _depth_to_space(writer: Writer, node: Node) -> None:
    block, name = node.get("blocksize"), node.output
    if node.get("mode", "DCR") == "DCR":
        writer.emit(
            name, "DEPTH_TO_SPACE", [x := writer.picture(node.inputs[0])], node.shape, "DepthToSpaceOptions",
            order=x.order, blockSize=block,
        )  # fmt: skip
        return
    x = writer.value(node.inputs[0])
    batch, channels, height, width = x.shape
    apart = writer.reshape(f"{name}/apart", x, (batch, channels // block**2, block, block, height, width))
    moved = writer.transpose(f"{name}/turned", apart, (0, 1, 4, 2, 5, 3))
    writer.reshape(name, moved, node.shape)


def _space_to_depth(writer: Writer, node: Node) -> None:
    x = writer.picture(node.inputs[0])
    block = node.get("blocksize")
    if x.shape[2] % block or x.shape[3] % block:
        raise node.refused(f"of {x.shape[2]} x {x.shape[3]} in blocks of {block}")
    writer.emit(node.output, "SPACE_TO_DEPTH", [x], node.shape, "SpaceToDepthOptions", order=x.order, blockSize=block)


_ALL = (*NUMBER, BOOL)

TABLE = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), Operator(_reshape, (), EVERY, "a computed shape")),
    "Transpose": Operator(_transpose, (), EVERY),
    "Identity": Operator(_same, (), EVERY),
    "Dropout": Operator(_same, (), limits="training; its mask"),
    "Concat": Operator(_concat, ("CONCATENATION",), NUMBER),
    "Split": Operator(_split, ("SPLIT", "SLICE"), NUMBER, "computed sizes"),
    "Slice": Operator(_slice, ("SLICE", "STRIDED_SLICE"), _ALL, f"computed bounds; more than {MAX_RANK} dimensions"),
    "Gather": Operator(_gather, ("GATHER",), NUMBER),
    "GatherElements": Operator(_gather_elements, ("GATHER_ND", "CONCATENATION"), NUMBER),
    "GatherND": Operator(_gather_nd, ("GATHER_ND", "CONCATENATION"), NUMBER),
    "Pad": Operator(
        _pad, ("PAD", "PADV2", "MIRROR_PAD", "SLICE"), NUMBER,
        f"mode wrap; mode edge by more than {MAX_EDGE}; more than {MAX_RANK} dimensions; computed pads",
    ),
    "Expand": Operator(_expand, ("BROADCAST_TO",), NUMBER, "a computed shape"),
    "Tile": Operator(_tile, ("TILE",), NUMBER, "computed numbers"),
    "DepthToSpace": Operator(_depth_to_space, ("DEPTH_TO_SPACE",)),
    "SpaceToDepth": Operator(_space_to_depth, ("SPACE_TO_DEPTH",)),
}  # fmt: skip
