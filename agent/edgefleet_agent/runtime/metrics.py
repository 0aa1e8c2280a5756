"""Stage 9, health, the runtime's part: receives each request's times, hands on counters, percentiles and Prometheus text.

Source: Prometheus text exposition format 0.0.4. Latency is what the front sees: from the parsed request to the answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from edgefleet_shared.drift import Statistics

from edgefleet_agent.runtime.drift import DriftMeter

RECENT = 1024  # requests that the percentiles look back on
BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Figures:
    """Counters of one model version since the runtime started.

    Args:
        normal: what its artifact says is normal.
    """

    def __init__(self, normal: Statistics | None = None) -> None:
        self.drift = DriftMeter(normal)
        self.requests = 0
        self.failed = 0
        self.pictures = 0  # answered; a request may be a batch of them
        self.crashes = 0
        self.starved = 0
        self.relieved = 0
        self.retried = 0
        self.compute_ns = 0
        self.queue_ns = 0
        self.latency_ns = 0
        self.failed_ns = 0
        self.last_ns = (
            0  # when the request came that was answered last (:func:`time.perf_counter_ns`); 0 before the first
        )
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._recent: deque[int] = deque(maxlen=RECENT)

    def answered(self, latency_ns: int, queue_ns: int, compute_ns: int, pictures: int = 1, arrived_ns: int = 0) -> None:
        self.requests += 1
        self.pictures += pictures
        self.last_ns = arrived_ns
        self.latency_ns += latency_ns
        self.queue_ns += queue_ns
        self.compute_ns += compute_ns
        self._buckets[bisect_left(BUCKETS_S, latency_ns / 1e9)] += 1
        self._recent.append(latency_ns)

    def refused(self, latency_ns: int = 0) -> None:
        self.requests += 1
        self.failed += 1
        self.failed_ns += latency_ns

    def percentiles_ms(self) -> tuple[float, float] | None:
        """(p50, p95) of the last :data:`RECENT` answers in ms; None before the first."""
        if not self._recent:
            return None
        ordered = sorted(self._recent)
        return ordered[len(ordered) // 2] / 1e6, ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))] / 1e6

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Cumulative histogram: (upper bound in seconds, answers up to it)."""
        total = 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self._buckets, strict=True):
            total += count
            yield bound, total


def exposition(versions: Iterable[tuple[str, str, bool, Figures]], gauges: dict[str, float]) -> bytes:
    """Prometheus text.

    Args:
        versions: (model, version, whether it serves, its figures).
        gauges: values of the whole runtime, by name without prefix.
    """
    rows = list(versions)
    lines = []
    counters: tuple[tuple[str, str, Callable[[Figures], float]], ...] = (
        ("requests_total", "Requests that ended, answered or failed", lambda f: f.requests),
        ("failed_total", "Requests that ended without an answer", lambda f: f.failed),
        ("crashes_total", "Worker processes that ended by themselves", lambda f: f.crashes),
        (
            "starved_total",
            "Worker processes that the kernel ended for want of memory, within their own limit",
            lambda f: f.starved,
        ),
        ("relieved_total", "Worker processes replaced before they outgrew their memory", lambda f: f.relieved),
        ("retried_total", "Requests computed again after their worker died", lambda f: f.retried),
        ("compute_seconds_total", "Time inside the engine", lambda f: f.compute_ns / 1e9),
        ("queue_seconds_total", "Time waiting for the worker", lambda f: f.queue_ns / 1e9),
    )
    for name, text, value in counters:
        lines += [f"# HELP edgefleet_runtime_{name} {text}", f"# TYPE edgefleet_runtime_{name} counter"]
        lines += [f"edgefleet_runtime_{name}{{{_labels(m, v)}}} {value(f)}" for m, v, _, f in rows]
    name = "edgefleet_runtime_request_seconds"
    lines += [f"# HELP {name} From the parsed request to the answer", f"# TYPE {name} histogram"]
    for model, version, _, figures in rows:
        labels = _labels(model, version)
        lines += [f'{name}_bucket{{{labels},le="{bound}"}} {count}' for bound, count in figures.buckets()]
        lines += [f"{name}_sum{{{labels}}} {figures.latency_ns / 1e9}"]
        lines += [f"{name}_count{{{labels}}} {figures.requests - figures.failed}"]
    lines += [
        "# HELP edgefleet_runtime_serving 1 for the version that serves",
        "# TYPE edgefleet_runtime_serving gauge",
    ]
    lines += [f"edgefleet_runtime_serving{{{_labels(m, v)}}} {int(serving)}" for m, v, serving, _ in rows]
    lines += _drift(rows)
    for gauge, number in gauges.items():
        lines += [f"# TYPE edgefleet_runtime_{gauge} gauge", f"edgefleet_runtime_{gauge} {number}"]
    return ("\n".join(lines) + "\n").encode()


def _drift(rows: list[tuple[str, str, bool, Figures]]) -> list[str]:
    """Nothing for a version of which nothing can be said yet."""
    name = "edgefleet_runtime_drift"
    lines = [f"# HELP {name}_psi Population stability index against the golden set", f"# TYPE {name}_psi gauge"]
    samples = [f"# HELP {name}_samples Requests that the drift is about", f"# TYPE {name}_samples gauge"]
    for model, version, _, figures in rows:
        found, labels = figures.drift.figures(), _labels(model, version)
        samples.append(f"{name}_samples{{{labels}}} {found.samples}")
        lines += [
            f'{name}_psi{{{labels},kind="{tensor.kind}",tensor="{_escape(tensor.name)}"}} {tensor.psi:g}'
            for tensor in found.tensors
        ]
    return lines + samples


def _labels(model: str, version: str) -> str:
    return f'model="{_escape(model)}",version="{_escape(version)}"'


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
