"""Stage 2, compile: run compiled models over samples and time them. Receives files, hands on outputs files and figures.

The engine is given as a function ``load(path) -> run``; everything else is the same for all engines, so that their figures
can be compared. Samples are read one by one, so that the peak of memory is the engine's and the model's.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from .job import Progress, Refused, Request
from .timing import interleaved

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Array]], dict[str, Array]]
Load = Callable[[str], Run]

TIMED_SAMPLES = 4
PLACE = re.compile(r"Exception from \S+:\d+:")  # before what OpenVINO has to say
# How engines say that they got no memory, or no thread for want of it.
USED_UP = ("bad_alloc", "bad allocation", "failed to allocate", "cannot allocate", "resource temporarily unavailable")


class SampleFile:
    """Samples in a safetensors file, one tensor per input, first axis N; handed out one by one with a batch axis of 1; the first ``count``."""

    def __init__(self, path: str, count: int | None = None) -> None:
        file: Any = safe_open(path, "np")
        self.names = list(file.keys())
        self._slices = {name: file.get_slice(name) for name in self.names}
        available = int(self._slices[self.names[0]].get_shape()[0])
        self._count = available if count is None else min(count, available)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Array]:
        return {name: np.ascontiguousarray(part[index : index + 1]) for name, part in self._slices.items()}


def run_all(run: Run, samples: SampleFile, progress: Progress, what: str) -> dict[str, Array]:
    """Every sample through the model; outputs by name, float32, first axis N.

    An output whose own first axis is no batch of 1 (a recurrent network's steps) gets that axis before it.
    """
    rows: dict[str, list[Array]] = {}
    for index in range(len(samples)):
        progress(what, index, len(samples))
        for name, value in run(samples[index]).items():
            rows.setdefault(name, []).append(np.asarray(value, np.float32))
    progress(what, len(samples), len(samples))
    for name, values in rows.items():
        shapes = {value.shape for value in values}
        if len(shapes) > 1:
            told = " and ".join(str(shape) for shape in sorted(shapes)[:2])
            raise Refused(
                "bad_model",
                f"output {name!r} has another size for each sample, such as {told}: boards and budgets want one that is fixed",
                "leave out what makes lists, such as non-maximum suppression, and let the application do it",
            )
    return {
        name: np.concatenate(values) if values[0].shape[:1] == (1,) else np.stack(values)
        for name, values in rows.items()
    }


@contextmanager
def _engine() -> Iterator[None]:
    """What an engine raises is told as its word on the model; what is missing or used up on this machine is not."""
    try:
        yield
    except (Refused, MemoryError, OSError, ImportError):
        raise
    except Exception as exc:  # engines have classes of their own, which share no base but this
        traceback.print_exc()
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        told = next((line for line in lines if not PLACE.fullmatch(line)), "no reason given")
        if any(words in told.lower() for words in USED_UP):
            raise MemoryError(told[:300]) from exc
        raise Refused("compiled_model_failed", f"{type(exc).__name__}: {told[:300]}") from exc


def _peak_bytes() -> int:
    """Highest resident memory of this process. Not ``ru_maxrss``, which keeps the parent's peak across fork and exec."""
    with open("/proc/self/status", encoding="ascii") as stream:
        fields = dict(line.split(":", 1) for line in stream if line.startswith("VmHWM"))
    return int(fields["VmHWM"].split()[0]) * 1024


def measure(load: Load, request: Request, progress: Progress) -> dict[str, Any]:
    """Outputs of compiled models over the samples, then their times and the float model's, interleaved, one thread.

    Request: ``models`` (each ``model`` and ``outputs``, the file to write), ``float_model`` (or null: nothing is timed), ``samples``,
    ``count`` (how many of them).
    Result: ``times`` (p50 and p95 in ms of runs that had a processor to themselves, in order of ``models``), ``float``, and ``peak_memory_bytes`` of this process after the
    outputs, before the float model is loaded: one model's own where there is one.
    Refused as ``compiled_model_failed``: what the engine raises, over a model or a sample.
    """
    samples = SampleFile(request["samples"], request["count"])
    runs = []
    for number, one in enumerate(request["models"]):
        with _engine():
            run = load(one["model"])
            run(samples[0])
        what = (
            "running held-out pictures" if len(request["models"]) == 1 else f"held-out pictures, candidate {number + 1}"
        )
        with _engine():
            answers = run_all(run, samples, progress, what)
        save_file(answers, one["outputs"])
        runs.append(run)
    figures: dict[str, Any] = {"peak_memory_bytes": _peak_bytes()}
    if not request["float_model"]:
        return figures
    with _engine():
        times = _times([*runs, load(request["float_model"])], samples, progress)
    *figures["times"], figures["float"] = [
        {"p50_ms": float(np.percentile(values, 50)), "p95_ms": float(np.percentile(values, 95))} for values in times
    ]
    return figures


def _times(runs: list[Run], samples: SampleFile, progress: Progress) -> list[list[float]]:
    """Times in ms by run, over a few samples."""
    feeds = [samples[i] for i in range(min(len(samples), TIMED_SAMPLES))]

    def over(run: Run) -> Callable[[int], object]:
        return lambda number: run(feeds[number % len(feeds)])

    return interleaved([over(run) for run in runs], progress)
