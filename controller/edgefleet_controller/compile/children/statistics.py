"""Stage 2, compile: what activations look like. Receives a float network and calibration samples, hands on ranges and means.

One pass finds the extremes of every float tensor, and means and second moments of what weighted operators read, a second the histograms, from which
every calibration method takes its range: no method needs a pass of its own. Sources: minimum mean squared error as in Banner
et al. 2019 (ACIQ), entropy as in TensorRT's calibration (Migacz 2017), over ranges that may be asymmetric. Where an activation reads a value alone, the error is that of
what it makes (:mod:`.readings`), whatever the method, but for the extremes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnxruntime

from . import job
from .gathered import Statistics
from .measure import Array, SampleFile
from .moments import Gathering
from .readings import Function, readings, weighed, within_reach
from .weights import AXIS, LEVELS, WEIGHTED

BINS = 2048
MOST_VALUES = 20_000  # of one tensor and sample that go into its histogram
OUTSIDE = 1e-4  # share of values that the percentile method leaves outside, at each end
SHRINK = np.linspace(0.25, 1.0, 31)  # shares of the extremes that are tried as a range

Range = tuple[float, float]


def collect(model: onnx.ModelProto, samples: SampleFile, progress: job.Progress, *, histograms: bool) -> Statistics:
    """What int8 needs to know of a network's activations.

    Args:
        model: float, shapes fixed and inferred.
        histograms: whether to take the second pass; without it there is only the method minmax.
    """
    names, watch = _watched(model)
    extremes: dict[str, list[float]] = {}
    means: dict[str, Array] = {}
    gathering, softened = Gathering(model), weighed(model)
    # Channels are axis 1 of what a convolution reads, over lines and volumes too; the last of what a matrix product does.
    read = {n.input[0]: 1 if n.op_type in AXIS else -1 for n in model.graph.node if n.op_type in WEIGHTED}
    for tensors in _runs(watch, names, samples, progress, "ranges of activations"):
        gathering.add(tensors)
        for name, value in tensors.items():
            if not value.size:
                continue
            value = _counted(value, softened.get(name))
            low, high = float(value.min()), float(value.max())
            known = extremes.setdefault(name, [low, high])
            extremes[name] = [min(known[0], low), max(known[1], high)]
            if name in read and value.ndim >= 2:
                means[name] = means.get(name, 0.0) + _channel_means(value, read[name]) / len(samples)
    ranges = {name: {"minmax": (min(low, 0.0), max(high, 0.0))} for name, (low, high) in extremes.items()}
    if histograms:
        ranges = _by_histograms(model, watch, names, samples, progress, extremes)
    told = {name: value.tolist() for name, value in means.items()}
    return Statistics(ranges=ranges, means=told, reads=gathering.of, moments=gathering.moments())


def _by_histograms(
    model: onnx.ModelProto,
    watch: bytes,
    names: list[str],
    samples: SampleFile,
    progress: job.Progress,
    extremes: dict[str, list[float]],
) -> dict[str, dict[str, Range]]:
    """Ranges by all methods, in a pass of its own."""
    counts, softened = {name: np.zeros(BINS) for name in extremes}, weighed(model)
    for tensors in _runs(watch, names, samples, progress, "histograms of activations"):
        for name, value in tensors.items():
            if name in counts and value.size:
                counts[name] += _histogram(_counted(value, softened.get(name)), extremes[name])
    ranges = {name: _ranges((low, high), counts[name]) for name, (low, high) in extremes.items()}
    for name, reading in readings(model).items():
        if name in ranges and reading.tensor in counts and counts[reading.tensor].any():
            low, high = extremes[reading.tensor]
            judged = _least_behind((low, high), counts[reading.tensor], reading.function)
            ranges[name] |= dict.fromkeys(("percentile", "mse", "entropy"), judged)
    return ranges


def _watched(model: onnx.ModelProto) -> tuple[list[str], bytes]:
    """(names of float tensors, the network with all of them as outputs)."""
    known = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    outputs = {v.name for v in model.graph.output}
    names = [
        name for node in model.graph.node for name in node.output
        if name in known and known[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]  # fmt: skip
    watch = onnx.ModelProto()
    watch.CopyFrom(model)
    watch.graph.output.extend(known[name] for name in names if name not in outputs)
    return names, watch.SerializeToString()


def _runs(
    watch: bytes, names: list[str], samples: SampleFile, progress: job.Progress, what: str
) -> Iterator[dict[str, Array]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watch, options, providers=["CPUExecutionProvider"])
    for index in range(len(samples)):
        progress(what, index, len(samples))
        feeds = samples[index]
        floats = {name: value for name, value in feeds.items() if value.dtype == np.float32}
        yield floats | dict(zip(names, session.run(names, feeds), strict=True))
    progress(what, len(samples), len(samples))


def _finite(value: Array) -> Array:
    """A mask's minus infinity, or a division by zero, is no value that a range could hold: it counts as 0, which every range holds."""
    return value if np.isfinite(value).all() else np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


def _channel_means(value: Array, axis: int) -> Array:
    """Per channel, which ``axis`` counts."""
    found: Array = value.mean(axis=tuple(set(range(value.ndim)) - {axis % value.ndim}), dtype=np.float64)
    return found


def _counted(value: Array, axis: int | None) -> Array:
    """Of a tensor's values what counts for its range. Args: axis: along which a Softmax reads it; None: nothing of the kind does."""
    value = _finite(value)
    return value if axis is None else within_reach(value, axis)


def _histogram(value: Array, extremes: list[float]) -> Array:
    flat: Array = value.ravel()
    flat = flat[:: max(1, flat.size // MOST_VALUES)]
    low, high = extremes
    if high <= low:
        return np.zeros(BINS)
    if high - low > float(np.finfo(np.float32).max):
        flat = flat.astype(np.float64)
    places = np.minimum(((flat - low) * (BINS / (high - low))).astype(np.int64), BINS - 1)
    found: Array = np.bincount(places, minlength=BINS).astype(np.float64)
    return found


def _least_behind(extremes: Range, histogram: Array, function: Function) -> Range:
    """The range of least squared error in what ``function`` makes of the values."""
    edges = np.linspace(*extremes, BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    exact = function(centres)
    low, high = min(extremes[0], 0.0), max(extremes[1], 0.0)
    return _least((low, high), lambda r: float(histogram @ (function(_rounded(centres, r)) - exact) ** 2))


def _ranges(extremes: Range, histogram: Array) -> dict[str, Range]:
    low, high = min(extremes[0], 0.0), max(extremes[1], 0.0)
    found = {"minmax": (low, high)}
    if histogram.sum() == 0:
        return found | dict.fromkeys(("percentile", "mse", "entropy"), (low, high))
    edges = np.linspace(*extremes, BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    share = np.cumsum(histogram) / histogram.sum()
    found["percentile"] = (
        min(float(edges[np.searchsorted(share, OUTSIDE)]), 0.0),
        max(float(edges[min(int(np.searchsorted(share, 1 - OUTSIDE)) + 1, BINS)]), 0.0),
    )
    found["mse"] = _least((low, high), lambda r: float(histogram @ (_rounded(centres, r) - centres) ** 2))
    # Zero is exact in 8 bits, and after a ReLU most values are zero: they would drown what is to be weighed.
    others = np.where(np.abs(centres) <= (edges[1] - edges[0]) / 2, 0.0, histogram)
    found["entropy"] = _least((low, high), lambda r: _divergence(centres, others, r)) if others.any() else (low, high)
    return found


def _rounded(values: Array, within: Range) -> Array:
    """Values as 8 bits over ``within`` hold them."""
    scale = max((within[1] - within[0]) / LEVELS, 1e-30)
    zero = np.round(-within[0] / scale)
    found: Array = (np.clip(np.round(values / scale) + zero, 0, LEVELS) - zero) * scale
    return found


def _divergence(centres: Array, histogram: Array, within: Range) -> float:
    """Kullback-Leibler divergence of the histogram from what 256 levels over ``within`` keep of it."""
    levels = _rounded(centres, within)
    _, places = np.unique(levels, return_inverse=True)
    filled = histogram > 0
    mass, width = np.bincount(places, histogram), np.bincount(places, filled)
    kept = np.where(filled, mass[places] / np.maximum(width[places], 1), 0.0)
    # What is clipped keeps its mass at the range's end; it is charged as if it had moved into the last level's own bins.
    inside = (centres >= within[0]) & (centres <= within[1])
    kept = np.where(inside, kept, 1e-9 * histogram.sum())
    p, q = histogram[filled] / histogram.sum(), kept[filled] / max(float(kept[filled].sum()), 1e-30)
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-30))))


def _least(extremes: Range, cost: Callable[[Range], float]) -> Range:
    """The range of least cost: first both ends shrink together, then each alone around that."""
    low, high = extremes
    best = min(((low * f, high * f) for f in SHRINK), key=cost)
    if low < 0.0:
        best = min(((low * f, best[1]) for f in SHRINK), key=cost)
    if high > 0.0:
        best = min(((best[0], high * f) for f in SHRINK), key=cost)
    return best
