"""Stage 2, compile: how what weighted operators read varies together. Receives activations sample by sample, hands on second moments per operator.

A product's output is off by what its rounded weights are off, times what it reads; how much that is on average, the second moments of the reads tell
(one row and column per weight of an output channel). Neighbouring pixels are alike, so that nine errors that cancel out cost next to nothing, and nine
of one sign all that they can (:mod:`.fitting`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx

from .measure import Array
from .weights import WEIGHTED, axis_of, groups_of

MOST_TAPS = 1152  # weights of an output channel; more of them cost minutes, and hundreds of megabytes
MOST_BYTES = 256 << 20  # of all moments together; operators with few taps, which need it most, come first
PLACES = 96  # of one sample that are looked at: many more lie beside each other and say the same


class Moments(NamedTuple):
    """Of the reads of one operator, per group of channels: ``mean``, groups x taps, and ``covariance``, groups x taps x taps. Taps lie as in the
    operator's weight."""

    mean: Array
    covariance: Array


class Gathering:
    """Adds up samples for all operators of a network that are worth it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
        self._reads: dict[str, _Read] = {}
        self.of: dict[str, str] = {}
        sizes = []
        for node in model.graph.node:
            read = _read(node, shapes)
            if read is not None and read.taps <= MOST_TAPS:
                sizes.append((read.groups * read.taps**2 * 4, node.name, read))
        total, self._rng = 0, np.random.default_rng(0)
        for size, name, read in sorted(sizes, key=lambda one: (one[0], one[1])):
            if read.key not in self._reads:
                total += size
                if total > MOST_BYTES:
                    break
                self._reads[read.key] = read
            self.of[name] = read.key
        self._sums: dict[str, _Sums] = {}

    def add(self, tensors: dict[str, Array]) -> None:
        """One sample's activations, by name; what it lacks adds nothing."""
        for key, read in self._reads.items():
            value = tensors.get(read.name)
            if value is None or not value.size:
                continue
            found = read.rows(value, self._rng).astype(np.float64)  # groups x places x taps
            known = self._sums.setdefault(key, _Sums(found.mean(axis=1, keepdims=True)))
            known.add(found)

    def moments(self) -> dict[str, Moments]:
        """By the values of :attr:`of`, which has them by the operators' names; float32. Those that are too large for it are left out. Ends the gathering: sums, twice
        as large, make room as they are taken."""
        found = {}
        for key in list(self._sums):
            mean, covariance = self._sums.pop(key).moments()
            if max(np.abs(mean).max(), np.abs(covariance).max()) < np.finfo(np.float32).max:
                found[key] = Moments(mean.astype(np.float32), covariance.astype(np.float32))
        return found


class _Sums:
    """Over the reads of one operator, float64, from ``origin`` on, groups x 1 x taps: squares of what lies far from zero and hardly varies would
    leave only their rounding."""

    def __init__(self, origin: Array) -> None:
        groups, _, taps = origin.shape
        self._origin, self._count = origin, 0
        self._total, self._products = np.zeros((groups, taps)), np.zeros((groups, taps, taps))

    def add(self, reads: Array) -> None:
        """Args: groups x places x taps; they are changed."""
        reads -= self._origin
        self._count += reads.shape[1]
        self._total += reads.sum(axis=1)
        self._products += reads.transpose(0, 2, 1) @ reads

    def moments(self) -> tuple[Array, Array]:
        """Mean and covariance."""
        mean = self._total / self._count
        return self._origin[:, 0] + mean, self._products / self._count - mean[:, :, None] * mean[:, None, :]


class _Read(NamedTuple):
    """What one operator, or several of a kind, reads of a tensor for one number of its output."""

    name: str
    groups: int
    taps: int  # per group
    kernel: tuple[int, ...] = ()  # of a convolution; empty: a matrix product, over the last axis
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    same: str = ""  # auto_pad, where the operator leaves its pads to its sizes

    @property
    def key(self) -> str:
        told = [self.groups, *self.kernel, "s", *self.strides, "d", *self.dilations, "p", *self.pads, self.same]
        return f"{self.name}|{','.join(map(str, told))}"

    def rows(self, value: Array, rng: np.random.Generator) -> Array:
        """What is read at some places, groups x places x taps."""
        value = value if np.isfinite(value).all() else np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
        if not self.kernel:
            rows = value.reshape(-1, value.shape[-1])
            return rows[_some(len(rows), rng)][None]
        value = value[int(rng.integers(len(value)))]  # channels, then space
        sizes, begin, end = value.shape[1:], [], []
        for axis, size in enumerate(sizes):
            before, after = self._pads(axis, size)
            begin.append(before)
            end.append(after)
        value = np.pad(value, [(0, 0), *zip(begin, end, strict=True)])
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        counts = [max((size - r) // s + 1, 0) for size, r, s in zip(value.shape[1:], reach, self.strides, strict=True)]
        chosen = np.unravel_index(_some(int(np.prod(counts)), rng), counts)
        starts = [place * stride for place, stride in zip(chosen, self.strides, strict=True)]
        taps = []
        for tap in np.ndindex(*self.kernel):
            places = tuple(s + t * d for s, t, d in zip(starts, tap, self.dilations, strict=True))
            taps.append(value[(slice(None),) + places])  # noqa: RUF005 - toolchains have Python 3.10
        seen = np.stack(taps, axis=-1)  # channels x places x taps of one channel
        channels, count, _ = seen.shape
        grouped = seen.reshape(self.groups, channels // self.groups, count, -1).transpose(0, 2, 1, 3)
        found: Array = grouped.reshape(self.groups, count, self.taps)
        return found

    def _pads(self, axis: int, size: int) -> tuple[int, int]:
        if self.same not in ("SAME_UPPER", "SAME_LOWER"):
            return (self.pads[axis], self.pads[axis + len(self.kernel)]) if self.pads else (0, 0)
        stride, reach = self.strides[axis], (self.kernel[axis] - 1) * self.dilations[axis] + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        less, more = total // 2, total - total // 2
        return (less, more) if self.same == "SAME_UPPER" else (more, less)


def _some(count: int, rng: np.random.Generator) -> Array:
    """Numbers of places: all, or as many as are looked at."""
    if count <= PLACES:
        return np.arange(count)
    return np.sort(rng.choice(count, PLACES, replace=False))


def _read(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> _Read | None:
    """What an operator reads; None of one whose weight is computed, or lies otherwise (transposed convolutions)."""
    if node.op_type not in WEIGHTED or len(node.input) < 2 or node.input[1] not in shapes:
        return None
    shape, told = shapes[node.input[1]], {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv" and len(shape) >= 3:
        kernel = shape[2:]
        ones = (1,) * len(kernel)
        return _Read(
            node.input[0], groups_of(node), int(np.prod(shape[1:])), kernel, tuple(told.get("strides", ones)), tuple(told.get("dilations", ones)),
            tuple(told.get("pads", ())), told.get("auto_pad", b"").decode(),
        )  # fmt: skip
    if node.op_type in ("Gemm", "MatMul") and len(shape) == 2 and not told.get("transA"):
        return _Read(node.input[0], 1, shape[1 - axis_of(node) % 2])
    return None


def named(of: dict[str, str], moments: dict[str, Moments], nodes: Iterable[str]) -> Moments | None:
    """What several operators that share a weight read, taken together; None where one of them is not known."""
    found = [moments[of[name]] if name in of and of[name] in moments else None for name in nodes]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found) or len({one.mean.shape for one in known}) > 1:
        return None
    if len(known) == 1:
        return known[0]
    mean: Array = np.stack([one.mean for one in known]).mean(axis=0, dtype=np.float64)
    apart = [one.mean - mean for one in known]
    between = [one.covariance + far[:, :, None] * far[:, None, :] for one, far in zip(known, apart, strict=True)]
    covariance: Array = np.stack(between).mean(axis=0)
    return Moments(mean.astype(np.float32), covariance.astype(np.float32))
