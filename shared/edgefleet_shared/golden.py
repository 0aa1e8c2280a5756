"""Golden pictures and their float reference, as one safetensors blob, and how answers compare with it. Read by the accepting child, written by the
compiler, which asks beforehand what boards would say.

Tensors: ``input.<name>`` (uint8 N x H x W x C pictures when the model has a :class:`PictureEncoding`, else the input tensor
itself, first axis N) and ``reference.<name>`` (the float model's output, float32, first axis N). numpy is imported here,
so the resident agent never imports this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgefleet_shared import answers
from edgefleet_shared.answers import Reading
from edgefleet_shared.contract import AcceptanceContract, PictureEncoding
from edgefleet_shared.drift import MIN_GOLDEN_PER_CLASS, ChannelStatistics, Statistics, TensorStatistics
from edgefleet_shared.errors import ArtifactError

MIN_BINS, MAX_BINS = 2, 10  # of a histogram, between its outermost edges
# At least: with fewer, chance alone moves a histogram by as much as a drift does. Fewer than that in all make no histogram.
VALUES_PER_BIN = 30
OUTSIDE_PERCENT = 0.5  # of the golden values lie beyond either of them
# Values so close that one is as good as the other: what a compiled model answers has eight bits, what it is asked a float's exactness.
ANSWER_LEVELS, QUESTION_LEVELS = 256, 1 << 20
MAX_VALUES = (
    16384  # of one sample's tensor, by chance and always the same ones: enough for a histogram, and no gigabytes
)
CHANNELS = range(2, 5)  # of a picture
MAX_TENSORS = 8  # of each kind, in name order: a status line is no place for hundreds

Array = npt.NDArray[Any]


def encode_pictures(pictures: Array, encoding: PictureEncoding) -> Array:
    """Pictures (uint8, N x H x W x C, RGB) as the network's input (float32, N x C x H x W or N x H x W x C)."""
    x = pictures[..., ::-1] if encoding.colour == "BGR" else pictures
    mean, std = np.asarray(encoding.mean, np.float32), np.asarray(encoding.std, np.float32)
    x = (x.astype(np.float32) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if encoding.layout == "NCHW" else x)


def pack(inputs: dict[str, Array], references: dict[str, Array]) -> bytes:
    """The golden blob."""
    tensors = {f"input.{name}": np.ascontiguousarray(a) for name, a in inputs.items()}
    tensors |= {f"reference.{name}": np.ascontiguousarray(a, dtype=np.float32) for name, a in references.items()}
    return bytes(save(tensors))


def unpack(content: bytes, encoding: PictureEncoding | None) -> tuple[dict[str, Array], dict[str, Array]]:
    """(inputs ready for the network, references), each by tensor name, first axis N.

    Raises:
        ArtifactError: not safetensors, nothing in it, or counts that differ.
    """
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as exc:
        raise ArtifactError(f"golden pictures are not safetensors: {exc}") from exc
    inputs = {k[len("input.") :]: v for k, v in tensors.items() if k.startswith("input.")}
    references = {k[len("reference.") :]: v for k, v in tensors.items() if k.startswith("reference.")}
    counts = {len(a) if a.ndim else 0 for a in (*inputs.values(), *references.values())}
    if not inputs or not references or len(counts) != 1 or counts == {0}:
        raise ArtifactError("golden pictures need inputs and references of one and the same count above 0")
    if encoding is not None:
        inputs = {
            k: encode_pictures(v, encoding) if v.dtype == np.uint8 and v.ndim == 4 else v for k, v in inputs.items()
        }
    return inputs, references


def compare(
    contract: AcceptanceContract, reading: Reading, given: list[dict[str, Array]], references: dict[str, Array]
) -> tuple[float, float]:
    """(agreement, mean cosine) of a model's answers with the float model's references, as the contract counts them.

    Args:
        reading: how outputs become answers.
        given: one per golden sample; each output has first axis 1.
        references: float32, first axis the golden samples.

    Raises:
        ArtifactError: an output is missing, is empty, or differs in size from its reference; or there is no box to be found.
    """
    same, cosines = [], []
    within: dict[str, list[float]] = {name: [] for name in references}
    boxes: list[answers.Boxes] = []
    for number, sample in enumerate(given):
        wanted_outputs = {name: reference[number : number + 1] for name, reference in references.items()}
        outputs = {name: _as_reference(name, sample, wanted) for name, wanted in wanted_outputs.items()}
        finite = True
        for name, output in outputs.items():
            got, wanted = (values.astype(np.float64).ravel() for values in (output, wanted_outputs[name]))
            # NaN and infinity agree with nothing.
            numbers = bool(np.isfinite(got).all())
            finite = finite and numbers
            most, relative = contract.tolerance(name)
            within[name].append(float((np.abs(got - wanted) <= most + relative * np.abs(wanted)).mean()))
            length = float(np.linalg.norm(got) * np.linalg.norm(wanted))
            alike = float(np.array_equal(got, wanted)) if length == 0.0 else float(got @ wanted / length)
            cosines.append(alike if numbers else float("nan"))
        if contract.kind == "detection":
            boxes += answers.found_boxes(outputs, wanted_outputs, reading)
        elif contract.kind != "raw":
            same.append(finite and bool(answers.alike(outputs, wanted_outputs, reading).all()))
    match contract.kind:
        case "raw":  # each output counts by itself: a score is one value beside thousands of a map
            agreement = min(float(np.mean(shares)) for shares in within.values())
        case "detection":
            if not any(one.want for one in boxes):
                raise ArtifactError("the float model finds no box in any golden picture: nothing could be compared")
            agreement = answers.share_of_boxes(boxes)
        case _:
            agreement = float(np.mean(same))
    return agreement, float(np.mean(cosines))


def _as_reference(name: str, sample: dict[str, Array], wanted: Array) -> Array:
    """An output in the shape of its reference, both with first axis 1."""
    if name not in sample:
        raise ArtifactError(f"the model gave no output {name}")
    if sample[name].size != wanted.size:
        raise ArtifactError(f"output {name} has {sample[name].size} values, its reference has {wanted.size}")
    if not wanted.size:
        raise ArtifactError(f"output {name} has no values: nothing could be compared")
    return sample[name].reshape(wanted.shape)


def statistics(inputs: dict[str, Array], references: dict[str, Array], *, classification: bool) -> Statistics:
    """What is normal for a model (:mod:`edgefleet_shared.drift`).

    Args:
        inputs: as the network takes them, first axis the samples.
        references: the float model's answers, likewise.
        classification: whether the only answer is a score for each class.
    """
    samples = len(next(iter(inputs.values())))
    classes: tuple[float, ...] = ()
    if classification and len(references) == 1:
        scores = next(iter(references.values())).reshape(samples, -1)
        if samples >= MIN_GOLDEN_PER_CLASS * scores.shape[1]:
            counts = np.bincount(scores.argmax(axis=1), minlength=scores.shape[1])
            classes = tuple(_short(int(count) / samples) for count in counts)
    asked, answered = _normal(inputs, QUESTION_LEVELS), _normal(references, ANSWER_LEVELS)
    return Statistics(samples=samples, inputs=asked, outputs=answered, classes=classes)


def _normal(tensors: dict[str, Array], levels: int) -> tuple[TensorStatistics, ...]:
    return tuple(_tensor(name, tensors[name], levels) for name in sorted(tensors)[:MAX_TENSORS])


def _tensor(name: str, values: Array, levels: int) -> TensorStatistics:
    shape = values.shape[1:]
    rows: Array = values.reshape(len(values), -1)
    places: Array = np.arange(rows.shape[1])
    if len(places) > MAX_VALUES:
        places = np.sort(np.random.default_rng(0).choice(len(places), MAX_VALUES, replace=False))
    rows = rows[:, places].astype(np.float64)
    finite = rows[np.isfinite(rows)]
    non_finite = _short(1 - finite.size / rows.size) if rows.size else 0.0
    if finite.size < VALUES_PER_BIN:
        return TensorStatistics(name=name, edges=(), shares=(1.0,), mean=0.0, spread=0.0, non_finite=non_finite)
    low, high = np.percentile(finite, (OUTSIDE_PERCENT, 100 - OUTSIDE_PERCENT))
    edges = _edges(float(low), float(high), finite.size, levels)
    # Means that differ by less than half a step (a softmax's all are one over its classes) differ by chance, and measure nothing.
    step = _step(float(low), float(high), levels)
    whole = _part(rows, edges, step)
    axis = _channel_axis(shape)
    channels: tuple[ChannelStatistics, ...] = ()
    if axis and finite.size >= VALUES_PER_BIN * (len(edges) + 1) * shape[axis - 1]:
        of = np.unravel_index(places, shape)[axis - 1]
        channels = tuple(_part(rows[:, of == channel], edges, step) for channel in range(shape[axis - 1]))
    return TensorStatistics(
        name=name, edges=edges, shares=whole.shares, mean=whole.mean, spread=whole.spread, non_finite=non_finite,
        axis=axis if channels else 0, channels=channels,
    )  # fmt: skip


def _part(rows: Array, edges: tuple[float, ...], step: float) -> ChannelStatistics:
    """What is normal for a tensor or for one channel of it: a row for each sample."""
    finite = rows[np.isfinite(rows)]
    counts = np.bincount(np.searchsorted(edges, finite, side="right"), minlength=len(edges) + 1)
    means = np.array([row[np.isfinite(row)].mean() for row in rows if np.isfinite(row).any()] or [0.0])
    spread = means.std() if means.std() > step / 2 else 0.0
    return ChannelStatistics(
        shares=tuple(_short(int(count) / max(1, finite.size)) for count in counts),
        mean=_short(means.mean()), spread=_short(spread),
    )  # fmt: skip


def _channel_axis(shape: tuple[int, ...]) -> int:
    """Along which axis of the whole tensor a picture's channels lie, by how many there are; 0 where it is no picture, or could be either."""
    if len(shape) != 3:
        return 0
    first, last = shape[0] in CHANNELS, shape[-1] in CHANNELS
    return 0 if first == last else 1 if first else 3


def _step(low: float, high: float, levels: int) -> float:
    """How far apart the levels of a tensor between ``low`` and ``high`` lie; 0 is one of them, as quantizers have it."""
    return ((max(high, 0.0) - min(low, 0.0)) or 1.0) / levels


def _edges(low: float, high: float, values: int, levels: int) -> tuple[float, ...]:
    """The edges of a histogram of ``values`` values, most of them between ``low`` and ``high``.

    Bins of equal width: a compiled model's coarser steps move few values over an edge, where deciles of what is mostly zero would jump.
    None is finer than two steps, and the outermost edges stand off: what is saturated lies just there, by the thousand, and on either side
    of it once it is rounded.
    """
    step = _step(low, high, levels)
    bins = max(MIN_BINS, min(MAX_BINS, values // VALUES_PER_BIN))
    bins = max(1, min(bins, int((high - low) / (2 * step))))
    apart = max((high - low) / bins / 2, step)
    return tuple(dict.fromkeys(_short(edge) for edge in np.linspace(low - apart, high + apart, bins + 1)))


def _short(value: float) -> float:
    """Six digits: enough, the same on every host, and not a page of JSON."""
    return float(f"{value:.6g}")
