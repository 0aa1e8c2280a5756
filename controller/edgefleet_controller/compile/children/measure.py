"""Stage 2, compile: run a compiled model over samples and time it. Receives files, hands on an outputs file and figures.

The engine is given as a function ``load(path) -> run``; everything else is the same for all engines, so that their figures
can be compared. Samples are read one by one, so that the peak of memory is the engine's and the model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from .job import Progress, Request

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Array]], dict[str, Array]]
Load = Callable[[str], Run]

WARMUP_RUNS = 5
TIMED_RUNS = 40


class SampleFile:
    """Samples in a safetensors file, one tensor per input, first axis N; handed out one by one with a batch axis of 1."""

    def __init__(self, path: str) -> None:
        file: Any = safe_open(path, "np")
        self.names = list(file.keys())
        self._slices = {name: file.get_slice(name) for name in self.names}

    def __len__(self) -> int:
        return int(self._slices[self.names[0]].get_shape()[0])

    def __getitem__(self, index: int) -> dict[str, Array]:
        return {name: np.ascontiguousarray(part[index : index + 1]) for name, part in self._slices.items()}


def run_all(run: Run, samples: SampleFile, progress: Progress, what: str) -> dict[str, Array]:
    """Every sample through the model; outputs by name, float32, first axis N."""
    rows: dict[str, list[Array]] = {}
    for index in range(len(samples)):
        progress(what, index, len(samples))
        for name, value in run(samples[index]).items():
            rows.setdefault(name, []).append(np.asarray(value, np.float32))
    progress(what, len(samples), len(samples))
    return {name: np.concatenate(values) for name, values in rows.items()}


def _peak_bytes() -> int:
    """Highest resident memory of this process. Not ``ru_maxrss``, which keeps the parent's peak across fork and exec."""
    with open("/proc/self/status", encoding="ascii") as stream:
        fields = dict(line.split(":", 1) for line in stream if line.startswith("VmHWM"))
    return int(fields["VmHWM"].split()[0]) * 1024


def measure(load: Load, request: Request, progress: Progress) -> dict[str, Any]:
    """Outputs of the compiled model over the samples, then its time against the float model's, interleaved, one thread.

    Request: ``model``, ``float_model`` (or null), ``samples``, ``outputs`` (the file to write).
    Result: times in ms, ``peak_memory_bytes`` of this process before the float model is loaded.
    """
    samples = SampleFile(request["samples"])
    began = time.perf_counter()
    run = load(request["model"])
    load_ms = (time.perf_counter() - began) * 1e3
    run(samples[0])
    outputs = run_all(run, samples, progress, "running held-out pictures")
    peak = _peak_bytes()
    save_file(outputs, request["outputs"])
    figures: dict[str, Any] = {"load_ms": load_ms, "peak_memory_bytes": peak}
    candidates = {"compiled": run}
    if request["float_model"]:
        candidates["float"] = load(request["float_model"])
    feeds = [samples[i % len(samples)] for i in range(min(len(samples), 4))]
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(WARMUP_RUNS + TIMED_RUNS):
        progress("timing", index, WARMUP_RUNS + TIMED_RUNS)
        for name, candidate in candidates.items():
            began = time.perf_counter()
            candidate(feeds[index % len(feeds)])
            if index >= WARMUP_RUNS:
                times[name].append((time.perf_counter() - began) * 1e3)
    for name, values in times.items():
        figures[f"{name}_p50_ms"] = float(np.percentile(values, 50))
        figures[f"{name}_p95_ms"] = float(np.percentile(values, 95))
    return figures
