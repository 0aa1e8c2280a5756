"""Stage 2, compile: what was gathered of a network's activations, and its file. Read by children in toolchains that can't gather it themselves."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from safetensors.numpy import load_file, save_file

from .measure import Array
from .moments import Moments


class Statistics(NamedTuple):
    """
    Attributes:
        ranges: tensor -> method -> (low, high), which holds zero.
        means: tensor -> mean per channel, of what weighted operators read.
        reads: weighted operator -> key of its moments; those of very many weights per channel are left out.
        moments: by those keys.
    """

    ranges: dict[str, dict[str, Any]]
    means: dict[str, list[float]]
    reads: dict[str, str]
    moments: dict[str, Moments]


def save(statistics: Statistics, path: str) -> None:
    """As JSON, the moments in a safetensors file beside it."""
    keys = list(statistics.moments)
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(
            {"ranges": statistics.ranges, "means": statistics.means, "reads": statistics.reads, "moments": keys}, stream
        )
    tensors: dict[str, Array] = {}
    for number, key in enumerate(keys):
        tensors |= {f"{number}/{part}": value for part, value in statistics.moments[key]._asdict().items()}
    save_file(tensors, _beside(path))


def load(path: str) -> Statistics:
    with open(path, encoding="utf-8") as stream:
        told = json.load(stream)
    tensors = load_file(_beside(path))
    moments = {
        key: Moments(**{part: tensors[f"{number}/{part}"] for part in Moments._fields})
        for number, key in enumerate(told.pop("moments"))
    }
    return Statistics(**told, moments=moments)


def _beside(path: str) -> str:
    return f"{path}.moments"
