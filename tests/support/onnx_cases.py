"""Small random ONNX graphs, one operator each, over its attributes. Nothing is drawn that the TFLite converter says it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from support.onnx_draw import Case, Draw

# --- convolutions and pools -------------------------------------------------------------------------------------------


def _window(d: Draw, rank: int, sizes: list[int], *, dilated: bool = True) -> dict[str, Any]:
    kernel = [d.int(1, 3) for _ in range(rank)]
    window: dict[str, Any] = {"kernel_shape": kernel}
    if d.flag():
        window["strides"] = [d.int(1, 3) for _ in range(rank)]
    if dilated and d.int(0, 2) == 0:
        window["dilations"] = [d.int(1, 2) for _ in range(rank)]
    auto = d.pick(["NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if auto != "NOTSET":
        window["auto_pad"] = auto
        # onnxruntime pads by itself neither where there are dilations nor where a pool jumps over pixels
        window.pop("dilations", None)
        if not dilated:
            window["strides"] = [min(s, k) for s, k in zip(window.get("strides", kernel), kernel, strict=True)]
    elif d.flag():
        window["pads"] = [d.int(0, k - 1) for k in kernel * 2]
    return window


def conv(d: Draw) -> Case:
    rank = d.pick([1, 2, 2, 2])
    groups, each, multiple = d.pick([1, 1, 2, 3]), d.int(1, 3), d.int(1, 3)
    size = [d.int(5, 9) for _ in range(rank)]
    window = _window(d, rank, size)
    weight = d.floats([groups * multiple, each, *window["kernel_shape"]])
    bias = [d.floats([groups * multiple])] if d.flag() else []
    return Case(
        "Conv",
        d.opset(),
        [d.floats([d.int(1, 2), groups * each, *size]), weight, *bias],
        window | {"group": groups},
        {1, 2},
    )


def conv_transpose(d: Draw) -> Case:
    rank = d.pick([1, 2, 2, 2])
    groups, each, multiple = d.pick([1, 1, 2, 3]), d.int(1, 2), d.int(1, 2)
    size = [d.int(2, 5) for _ in range(rank)]
    kernel, strides = [d.int(1, 4) for _ in range(rank)], [d.int(1, 3) for _ in range(rank)]
    given: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "group": groups}
    if d.int(0, 2) == 0:
        given["dilations"] = [d.int(1, 2) for _ in range(rank)]
    spans = [(k - 1) * n + 1 for k, n in zip(kernel, given.get("dilations", [1] * rank), strict=True)]
    way = d.pick(["pads", "pads", "auto", "shape", "none"])
    if way == "pads":
        given["pads"] = [d.int(0, (s - 1) // 2) for s in spans * 2]
        given["output_padding"] = [d.int(0, s - 1) for s in strides]
    elif way == "shape":
        given["output_shape"] = [
            (n - 1) * s + span - d.int(0, span - 1) for n, s, span in zip(size, strides, spans, strict=True)
        ]
        given["output_shape"] = [max(n, 1) for n in given["output_shape"]]
    elif way == "auto":
        given["auto_pad"] = d.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
    weight = d.floats([groups * each, multiple, *kernel])
    bias = [d.floats([groups * multiple])] if d.flag() else []
    return Case(
        "ConvTranspose", d.opset(), [d.floats([d.int(1, 2), groups * each, *size]), weight, *bias], given, {1, 2}
    )


def pool(op: str) -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        rank = d.pick([1, 2, 2, 2])
        size = [d.int(4, 9) for _ in range(rank)]
        window = _window(d, rank, size, dilated=False)
        if "auto_pad" not in window and d.flag():
            window["ceil_mode"] = 1
        if op == "AveragePool" and d.flag():
            window["count_include_pad"] = 1
        return Case(op, d.opset(), [d.floats([d.int(1, 2), d.int(1, 3), *size])], window)

    return case


def over_all(op: str) -> Callable[[Draw], Case]:
    return lambda d: Case(op, d.opset(), [d.floats([d.int(1, 2), d.int(1, 4), *d.shape(1, 3)])])


# --- matrices ---------------------------------------------------------------------------------------------------------


def gemm(d: Draw) -> Case:
    m, k, n = d.int(1, 4), d.int(1, 5), d.int(1, 4)
    given: dict[str, Any] = {}
    a, b = [m, k], [k, n]
    if d.flag():
        given["transA"], a = 1, [k, m]
    if d.flag():
        given["transB"], b = 1, [n, k]
    if d.flag():
        given |= {"alpha": 0.5, "beta": 2.0}
    inputs = [d.floats(a), d.floats(b)]
    if d.flag():
        inputs.append(d.floats(d.pick([[n], [1, n], [m, n], [m, 1], [1]])))
    return Case("Gemm", d.opset(), inputs, given, d.pick([{1, 2}, {1, 2}, {1}, {2}, set()]))


def matmul(d: Draw) -> Case:
    m, k, n = d.int(1, 4), d.int(1, 5), d.int(1, 4)
    stack = d.shape(0, 2) if d.flag() else []
    one, other = d.pick(
        [
            ([*stack, m, k], [k, n]),
            ([*stack, m, k], [*stack, k, n]),
            ([m, k], [*stack, k, n]),
            ([k], [k, n]),
            ([*stack, m, k], [k]),
        ]
    )
    return Case("MatMul", d.opset(), [d.floats(one), d.floats(other)], {}, d.pick([{1}, {1}, {0}, set()]))


# --- element by element -----------------------------------------------------------------------------------------------


def unary(op: str, *, low: int = 11, make: str = "floats", **choices: Any) -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        given = {name: d.pick(values) for name, values in choices.items() if d.flag()}
        array = getattr(d, make)(d.shape(0, 5))
        return Case(op, d.opset(low), [array * 3 if make == "floats" else array], given)

    return case


def binary(op: str, make: str = "numbers") -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        one, other = d.broadcast()
        a = getattr(d, make)(one)
        b = d.bools(other) if a.dtype == bool else d.ints(other, 1, 5) if a.dtype == np.int32 else d.floats(other)
        if op == "Div" and b.dtype == np.float32:
            b = np.where(b < 0, b - 1, b + 1).astype(np.float32)
        fixed = d.pick([set(), set(), {0}, {1}])
        return Case(op, d.opset(12 if op.endswith("OrEqual") else 11), [a, b], {}, fixed)

    return case


def several(op: str) -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        one, other = d.broadcast()
        whole = op in {"Max", "Min"} and d.flag()
        arrays = [d.ints(s) if whole else d.floats(s) for s in (one, other, one)[: d.int(1, 3)]]
        return Case(op, d.opset(12), arrays, {}, d.pick([set(), {1}]))

    return case


def power(d: Draw) -> Case:
    one, other = d.broadcast()
    if d.flag():
        return Case("Pow", d.opset(12), [d.positive(one), d.floats(other)], {}, d.pick([set(), {1}]))
    exponent = d.pick([np.float32(2), np.float32(0.5), np.float32(3), np.int64(2)])
    return Case("Pow", d.opset(12), [d.positive(one), np.array(exponent)], {}, {1})


def remainder(d: Draw) -> Case:
    one, other = d.broadcast()
    divisor = d.ints(other, 1, 5) * (-1 if d.flag() else 1)
    return Case("Mod", d.opset(13), [d.ints(one), divisor.astype(np.int32)])


def where(d: Draw) -> Case:
    one, other = d.broadcast()
    a, b = (d.ints(one), d.ints(other)) if d.flag() else (d.floats(one), d.floats(other))
    return Case("Where", d.opset(), [d.bools(d.pick([one, other])), a, b], {}, d.pick([set(), {1}, {2}]))


def cast(d: Draw) -> Case:
    array = d.pick([d.floats, d.ints, d.bools])(d.shape(0, 4))
    array = array.astype(d.pick([np.uint8, np.int8])) if array.dtype == np.int32 and d.flag() else array
    array = np.abs(array) if array.dtype in (np.uint8, np.int32) else array
    return Case("Cast", d.opset(), [array * 3 if array.dtype == np.float32 else array], {"to": d.pick([1, 6, 7, 9])})


def clip(d: Draw) -> Case:
    whole = d.int(0, 3) == 0
    x = d.ints(d.shape(0, 4)) if whole else d.floats(d.shape(0, 4), 4.0)
    low, high = d.pick([(0, 6), (-1, 1), (0, None), (None, 2), (-2, 3), (None, None), (0.5, 1.5)])
    bounds = [None if b is None else np.array(b, x.dtype) for b in (low, high)]
    while bounds and bounds[-1] is None:
        bounds.pop()
    if not whole and d.flag():  # as it was before bounds were inputs
        given = {name: float(b) for name, b in zip(("min", "max"), bounds, strict=False) if b is not None}
        return Case("Clip", d.pick([7, 9, 10]), [x], given)
    return Case("Clip", d.opset(12), [x, *bounds], {}, {1, 2})


def prelu(d: Draw) -> Case:
    shape = d.shape(1, 4)
    slope = [n if d.flag() else 1 for n in shape[d.int(0, len(shape) - 1) :]]
    return Case("PRelu", d.opset(), [d.floats(shape), d.floats(slope)], {}, {1})


def softmax(op: str) -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        shape = d.shape(1, 4)
        given = {"axis": d.axis(len(shape))} if d.flag() or len(shape) == 1 else {}
        return Case(op, d.opset(), [d.floats(shape, 3.0)], given)

    return case


# --- reductions -------------------------------------------------------------------------------------------------------


def reduction(op: str, since: int = 18) -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        shape = d.shape(1, 5)
        whole = op in {"ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"} and d.flag()
        x = d.ints(shape, -1, 1) if whole else d.positive(shape)
        opset, given, inputs = d.opset(12), {}, [x]
        if d.flag():
            given["keepdims"] = d.int(0, 1)
        if d.flag():
            axes = d.axes(len(shape))
            if opset >= since:
                inputs.append(np.array(axes, np.int64))
            else:
                given["axes"] = axes
        elif opset >= since and d.flag():
            given["noop_with_empty_axes"] = 1
        return Case(op, opset, inputs, given, {1})

    return case


def arg(op: str) -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        shape = d.shape(1, 4)
        given = {"axis": d.axis(len(shape))} if d.flag() else {}
        return Case(op, d.opset(13), [d.floats(shape)], given | ({"keepdims": d.int(0, 1)} if d.flag() else {}))

    return case


def top(d: Draw) -> Case:
    shape = d.shape(1, 4)
    axis = d.axis(len(shape))
    count = np.array([d.int(1, shape[axis])], np.int64)
    return Case("TopK", d.opset(), [d.floats(shape), count], {"axis": axis}, {1}, 2)


def cumulated(d: Draw) -> Case:
    shape = d.shape(1, 4)
    given = {"exclusive": d.int(0, 1), "reverse": d.int(0, 1)}
    return Case("CumSum", d.opset(), [d.floats(shape), np.array(d.axis(len(shape)), np.int64)], given, {1})


def channels(op: str, *, low: int = 11, params: int = 2, rank: tuple[int, int] = (1, 3)) -> Callable[[Draw], Case]:
    def case(d: Draw) -> Case:
        count = d.int(1, 4)
        x = d.floats([d.int(1, 2), count, *(d.int(2, 5) for _ in range(d.int(*rank)))])
        given = {"epsilon": d.pick([1e-3, 1e-5])} if d.flag() else {}
        return Case(
            op, d.opset(low), [x, *(d.positive([count]) for _ in range(params))], given, set(range(1, params + 1))
        )

    return case


def layer_norm(d: Draw) -> Case:
    shape = d.shape(2, 4)
    axis = d.axis(len(shape))
    rest = shape[axis % len(shape) :]
    bias = [d.floats(rest)] if d.flag() else []
    return Case(
        "LayerNormalization",
        d.opset(17),
        [d.floats(shape), d.floats(rest), *bias],
        {"axis": axis, "epsilon": 1e-3},
        {1, 2},
    )


def group_norm(d: Draw) -> Case:
    groups, each, opset = d.int(1, 3), d.int(1, 3), d.opset(21)
    x = d.floats([d.int(1, 2), groups * each, *(d.int(2, 4) for _ in range(d.int(1, 2)))])
    count = groups * each if opset >= 21 else groups
    return Case("GroupNormalization", opset, [x, d.floats([count]), d.floats([count])], {"num_groups": groups}, {1, 2})


def lp_norm(d: Draw) -> Case:
    shape = d.shape(1, 4)
    return Case("LpNormalization", d.opset(), [d.positive(shape)], {"axis": d.axis(len(shape)), "p": d.int(1, 2)})


def lrn(d: Draw) -> Case:
    x = d.floats([d.int(1, 2), d.int(1, 7), d.int(1, 4), d.int(1, 4)])
    return Case("LRN", d.opset(), [x], {"size": d.pick([1, 3, 5]), "alpha": 0.1, "beta": 0.6, "bias": 1.5})


# --- resizing ---------------------------------------------------------------------------------------------------------

_COORDINATES = ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")


def resize(d: Draw) -> Case:
    mode = d.pick(["nearest", "nearest", "linear", "linear", "cubic"])
    opset = d.opset()
    x = d.floats([d.int(1, 2), d.int(1, 3), d.int(2, 6), d.int(2, 6)])
    given: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": d.pick(_COORDINATES)}
    if opset >= 19 and d.flag():
        given["coordinate_transformation_mode"] = "half_pixel_symmetric"
    if mode == "nearest":
        # Halves that are none in float32 (7 to 2: 3.4999998) are rounded up by onnxruntime 1.32 in this one combination.
        more_up = [] if given["coordinate_transformation_mode"] == "asymmetric" else ["round_prefer_ceil"]
        given["nearest_mode"] = d.pick(["round_prefer_floor", "floor", "ceil", *more_up])
    if mode == "cubic" and d.flag():
        given |= {"cubic_coeff_a": -0.5, "exclude_outside": 1}
    if d.flag():
        scales = [1.0, 1.0, d.pick([0.5, 1.0, 1.5, 2.0, 3.0]), d.pick([0.6, 1.0, 2.0, 2.5])]
        more = [None, np.array(scales, np.float32)]
    else:
        more = [None, None, np.array([*x.shape[:2], d.int(1, 12), d.int(1, 12)], np.int64)]
    if opset < 13:  # what is left out was an empty tensor
        more = [np.zeros(0, np.float32) if m is None else m for m in more]
    return Case("Resize", opset, [x, *more], given, {1, 2, 3})


def upsample(d: Draw) -> Case:
    scales = np.array([1, 1, d.pick([1, 2, 3]), d.pick([1, 2, 1.5])], np.float32)
    return Case(
        "Upsample",
        9,
        [d.floats([1, 2, d.int(2, 5), d.int(2, 5)]), scales],
        {"mode": d.pick(["nearest", "linear"])},
        {1},
    )


# --- shapes -----------------------------------------------------------------------------------------------------------


def reshape(d: Draw) -> Case:
    shape = d.shape(1, 5)
    total, target = math.prod(shape), []
    while len(target) < d.int(0, 4):
        factor = d.pick(n for n in range(1, total + 1) if total % n == 0)
        target.append(factor)
        total //= factor
    target.append(-1 if d.flag() else total)
    if len(target) > 1 and len(shape) > 1 and d.flag() and target[0] == shape[0]:
        target[0] = 0
    return Case("Reshape", d.opset(), [d.numbers(shape), np.array(target, np.int64)], {}, {1})


def flatten(d: Draw) -> Case:
    shape = d.shape(1, 5)
    return Case("Flatten", d.opset(), [d.floats(shape)], {"axis": d.int(-len(shape), len(shape))})


def squeeze(d: Draw) -> Case:
    shape = [d.pick([1, 1, 3]) for _ in range(d.int(1, 5))]
    ones = [a - len(shape) * d.int(0, 1) for a, n in enumerate(shape) if n == 1 and d.flag()]
    opset = d.opset()
    if not ones:
        return Case("Squeeze", opset, [d.floats(shape)])
    return (
        Case("Squeeze", opset, [d.floats(shape), np.array(ones, np.int64)], {}, {1})
        if opset >= 13
        else Case("Squeeze", opset, [d.floats(shape)], {"axes": ones})
    )


def unsqueeze(d: Draw) -> Case:
    shape, opset = d.shape(0, 3), d.opset()
    rank = len(shape) + d.int(1, 2)
    axes = d.perm(rank)[: rank - len(shape)]
    axes = [a - rank if d.flag() else a for a in axes]
    return (
        Case("Unsqueeze", opset, [d.floats(shape), np.array(axes, np.int64)], {}, {1})
        if opset >= 13
        else Case("Unsqueeze", opset, [d.floats(shape)], {"axes": axes})
    )


def transpose(d: Draw) -> Case:
    shape = d.shape(1, 5)
    return Case("Transpose", d.opset(), [d.numbers(shape)], {"perm": d.perm(len(shape))} if d.flag() else {})


def concat(d: Draw) -> Case:
    shape = d.shape(1, 4)
    axis = d.axis(len(shape))
    shapes = [[d.int(1, 3) if a == axis % len(shape) else n for a, n in enumerate(shape)] for _ in range(d.int(1, 3))]
    make = d.pick([d.floats, d.ints])
    return Case(
        "Concat",
        d.opset(),
        [make(s) for s in shapes],
        {"axis": axis},
        d.pick([set(), {0}]) if len(shapes) > 1 else set(),
    )


def split(d: Draw) -> Case:
    opset, shape = d.opset(), d.shape(1, 4)
    axis, count = d.axis(len(shape)), d.int(1, 3)
    sizes = [d.int(1, 3) for _ in range(count)] if d.flag() else [d.int(1, 3)] * count
    shape[axis] = sum(sizes)
    inputs, given = [d.numbers(shape)], {"axis": axis}
    if len(set(sizes)) == 1 and d.flag():
        given |= {"num_outputs": count} if opset >= 18 else {}
    elif opset >= 13:
        inputs.append(np.array(sizes, np.int64))
    else:
        given["split"] = sizes
    return Case("Split", opset, inputs, given, {1}, count)


def slices(d: Draw) -> Case:
    shape = d.shape(1, 5)
    axes = [a - len(shape) * d.int(0, 1) for a in range(len(shape)) if d.flag()] or [0]
    starts, ends, steps = [], [], []
    for axis in axes:
        n = shape[axis]
        step = d.pick([1, 1, 2, -1, -2])
        first, last = d.int(0, n - 1), d.int(0, n - 1)
        low, high = min(first, last), max(first, last)
        starts.append(low if step > 0 else high)
        ends.append(d.pick([high + 1, 2**62]) if step > 0 else d.pick([low - 1 - n, -(2**62)]) if low == 0 else low - 1)
        steps.append(step)
    if all(step == 1 for step in steps) and d.flag():  # as it was before bounds were inputs
        return Case(
            "Slice", 9, [d.floats(shape)], {"starts": starts, "ends": ends, "axes": [a % len(shape) for a in axes]}
        )
    given = [np.array(v, np.int64) for v in (starts, ends, axes, steps)]
    return Case("Slice", d.opset(), [d.numbers(shape), *given], {}, {1, 2, 3, 4})


def gather(d: Draw) -> Case:
    shape = d.shape(1, 4)
    axis = d.axis(len(shape))
    n = shape[axis]
    fixed = d.flag()
    places = d.ints(d.shape(0, 2, 3), -n if fixed else 0, n - 1).astype(np.int64 if d.flag() else np.int32)
    return Case("Gather", d.opset(), [d.numbers(shape), places], {"axis": axis}, {1} if fixed else set())


def gather_elements(d: Draw) -> Case:
    shape = d.shape(1, 4)
    axis = d.axis(len(shape))
    fixed, n = d.flag(), shape[axis]
    wanted = [d.int(1, 5) if a == axis % len(shape) else d.int(1, size) for a, size in enumerate(shape)]
    places = d.ints(wanted, -n if fixed else 0, n - 1).astype(np.int64)
    return Case("GatherElements", d.opset(), [d.numbers(shape), places], {"axis": axis}, {1} if fixed else set())


def gather_nd(d: Draw) -> Case:
    shape = d.shape(2, 4)
    batch = d.int(0, min(2, len(shape) - 1))
    told = shape[batch : d.int(batch + 1, len(shape))]
    fixed, before = d.flag(), [*shape[:batch], *d.shape(0 if batch else 1, 2, 3)]
    places = [d.ints(before, -n if fixed else 0, n - 1).astype(np.int64) for n in told]
    return Case(
        "GatherND",
        d.opset(12),
        [d.numbers(shape), np.stack(places, axis=-1)],
        {"batch_dims": batch},
        {1} if fixed else set(),
    )


def pad(d: Draw) -> Case:
    shape, opset = d.shape(1, 4), d.opset()
    mode = d.pick(["constant", "constant", "reflect", "edge"])
    rank = len(shape)
    pads = [d.int(0, min(2, n - 1) if mode == "reflect" else 3) for n in shape * 2]
    if mode == "constant" and d.flag():
        a = d.int(0, rank - 1)
        pads[a] = -d.int(0, shape[a] - 1)
    if mode == "constant" and d.flag():  # as it was before pads were an input
        return Case("Pad", d.pick([7, 10]), [d.floats(shape)], {"pads": pads, "value": d.pick([0.0, 1.5])})
    more: list[Any] = [np.array(pads, np.int64)]
    if mode == "constant" and d.flag():
        more.append(np.float32(1.5))
    if opset >= 18 and d.flag():
        axis = d.int(0, rank - 1)
        more = [
            np.array([pads[axis], pads[axis + rank]], np.int64),
            *(more[1:] or [None]),
            np.array([axis - rank], np.int64),
        ]
    return Case("Pad", opset, [d.floats(shape), *more], {"mode": mode}, {1, 2, 3})


def expand(d: Draw) -> Case:
    one, other = d.broadcast()
    return Case("Expand", d.opset(), [d.numbers(one), np.array(other, np.int64)], {}, {1})


def tile(d: Draw) -> Case:
    shape = d.shape(1, 4)
    return Case("Tile", d.opset(), [d.numbers(shape), np.array([d.int(1, 3) for _ in shape], np.int64)], {}, {1})


def depth_to_space(d: Draw) -> Case:
    block = d.int(1, 3)
    x = d.floats([d.int(1, 2), block * block * d.int(1, 3), d.int(1, 4), d.int(1, 4)])
    return Case("DepthToSpace", d.opset(), [x], {"blocksize": block, "mode": d.pick(["DCR", "CRD"])})


def space_to_depth(d: Draw) -> Case:
    block = d.int(1, 3)
    return Case(
        "SpaceToDepth",
        d.opset(13),
        [d.floats([d.int(1, 2), d.int(1, 3), block * d.int(1, 3), block * d.int(1, 3)])],
        {"blocksize": block},
    )


CASES: dict[str, Callable[[Draw], Case]] = {
    "Conv": conv, "ConvTranspose": conv_transpose, "MaxPool": pool("MaxPool"), "AveragePool": pool("AveragePool"),
    "GlobalAveragePool": over_all("GlobalAveragePool"), "GlobalMaxPool": over_all("GlobalMaxPool"),
    "Gemm": gemm, "MatMul": matmul,
    **{op: binary(op) for op in ("Add", "Sub", "Mul", "Div", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")},
    **{op: binary(op, "bools") for op in ("And", "Or", "Xor")},
    **{op: several(op) for op in ("Max", "Min", "Sum", "Mean")},
    **{op: unary(op) for op in ("Exp", "Floor", "Ceil", "Round", "Sin", "Cos", "Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Erf", "Identity")},
    **{op: unary(op, make="numbers") for op in ("Neg",)},
    **{op: unary(op, low=13, make="numbers") for op in ("Abs", "Sign")},
    **{op: unary(op, make="positive") for op in ("Log", "Sqrt", "Reciprocal")},
    "Not": unary("Not", make="bools"), "Dropout": unary("Dropout", low=12),
    "HardSwish": unary("HardSwish", low=14), "Mish": unary("Mish", low=18),
    "HardSigmoid": unary("HardSigmoid", alpha=[0.1, 1 / 6], beta=[0.3, 0.5]),
    "LeakyRelu": unary("LeakyRelu", alpha=[0.1, 0.3]), "Elu": unary("Elu", alpha=[0.5, 1.0, 2.0]),
    "Selu": unary("Selu", alpha=[1.5], gamma=[1.1]), "Celu": unary("Celu", low=12, alpha=[0.5, 2.0]),
    "ThresholdedRelu": unary("ThresholdedRelu", alpha=[0.5]), "Gelu": unary("Gelu", low=20, approximate=["none", "tanh"]),
    "Pow": power, "Mod": remainder, "Where": where, "Cast": cast, "Clip": clip, "PRelu": prelu,
    "Softmax": softmax("Softmax"), "LogSoftmax": softmax("LogSoftmax"),
    "ReduceSum": reduction("ReduceSum", 13),
    **{op: reduction(op) for op in (
        "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
    )},
    "ArgMax": arg("ArgMax"), "ArgMin": arg("ArgMin"), "TopK": top, "CumSum": cumulated,
    "BatchNormalization": channels("BatchNormalization", params=4), "InstanceNormalization": channels("InstanceNormalization"),
    "LayerNormalization": layer_norm, "GroupNormalization": group_norm, "LpNormalization": lp_norm, "LRN": lrn,
    "Resize": resize, "Upsample": upsample,
    "Reshape": reshape, "Flatten": flatten, "Squeeze": squeeze, "Unsqueeze": unsqueeze, "Transpose": transpose, "Concat": concat,
    "Split": split, "Slice": slices, "Gather": gather, "GatherElements": gather_elements, "GatherND": gather_nd, "Pad": pad, "Expand": expand, "Tile": tile,
    "DepthToSpace": depth_to_space, "SpaceToDepth": space_to_depth,
}  # fmt: skip
