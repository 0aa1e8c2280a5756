"""``make bench-swap``: the runtime under steady load through many hot swaps, good candidates and bad ones.

Every tenth candidate is bad: rubbish for a model, one that kills its process, one that outgrows its memory, one whose bytes changed on
disk. A stall is the longest request in a swap, held against the steady p99 of the same run; beside it stands the longest
request of short windows without a swap, because on a machine that does other things too those have stalls as well.
``--swaps N`` chooses how many (default 60); ``make bench-runtime`` has 1,000.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import networks
import numpy as np
from board import PICTURE, Load, Model, Promise, Runtime, Sample, build, raw_session, wrong_answers
from edgefleet_agent import slots
from edgefleet_shared.errors import EdgefleetError
from frame import Row, finish, quantile

MODEL = "conv"
QUIET_S = 0.3  # steady load before each swap
WINDOW_S = 0.25  # a swap takes longer on a busy machine, so more of what that machine does falls into it
BAD_EVERY = 10
SIZES_MB = (4, 100)


@dataclass
class Swap:
    """When it began and ended (:func:`time.perf_counter`)."""

    began: float
    ended: float


def bad_candidates(state: Path) -> dict[str, Model]:
    """What each is, and its artifact on the board's disk."""
    answer = np.zeros((1, 10), np.float32)
    found = {
        "corrupt": build(state, MODEL, "91", b"no model at all" * 1000, answer=answer),
        "crashing": build(state, MODEL, "92", networks.conv(92, crashes=True), answer=answer),
        "oversized": build(state, MODEL, "93", networks.conv(93, 300 << 20), answer=answer, peak_memory_bytes=16 << 20),
        "altered": build(state, MODEL, "94", networks.conv(94), answer=answer),
    }
    layout = slots.artifacts(state)
    path = layout.path(layout.manifest(found["altered"].digest).layers[0].digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return found


def two(ballast_bytes: int = 0) -> tuple[bytes, bytes]:
    """Two versions of the small network."""
    return networks.conv(1, ballast_bytes), networks.conv(2, ballast_bytes)


class Story:
    """Swaps under load, and what was seen of them.

    Args:
        contents: two versions of a network with different answers, which take turns.
        bad: whether bad candidates of the small network come in between.
    """

    def __init__(self, state: Path, contents: tuple[bytes, bytes], *, bad: bool) -> None:
        self._good = {str(n): build(state, MODEL, str(n), content) for n, content in enumerate(contents, 1)}
        self._bad = bad_candidates(state) if bad else {}
        self._runtime = Runtime(state, self._good["1"])
        self.swaps: list[Swap] = []
        self.refused = dict.fromkeys(self._bad, 0)
        self.accepted_bad = 0
        self.samples: list[Sample] = []
        self.promises = [Promise(0.0, frozenset({"1"}))]
        self.memory_bytes: list[int] = []  # of the front, after each swap
        self.failed_count = 0

    def run(self, count: int) -> None:
        load = Load(self._runtime.infer_socket, MODEL, {v: m.answer for v, m in self._good.items()})
        current, kinds = "1", cycle(self._bad)
        try:
            for number in range(1, count + 1):
                time.sleep(QUIET_S)
                if self._bad and number % BAD_EVERY == 0:
                    self._try_bad(next(kinds))
                else:
                    current = self._swap(current, "2" if current == "1" else "1")
            time.sleep(QUIET_S)
            self.failed_count = self._runtime.control.status().failed
        finally:
            self.samples = load.stop()
            self._runtime.stop()

    def _swap(self, current: str, new: str) -> str:
        control = self._runtime.control
        began = time.perf_counter()
        control.load(self._good[new].digest, "blue-green")
        self._promise(current, new)
        control.switch(self._good[new].digest)
        self._promise(new)
        control.retire(self._good[current].digest)
        self.swaps.append(Swap(began, time.perf_counter()))
        self.memory_bytes.append(control.status().memory_bytes)
        return new

    def _try_bad(self, kind: str) -> None:
        began = time.perf_counter()
        try:
            self._runtime.control.load(self._bad[kind].digest, "blue-green")
            self.accepted_bad += 1
        except EdgefleetError:
            self.refused[kind] += 1
        self._runtime.control.retire(self._bad[kind].digest)
        self.swaps.append(Swap(began, time.perf_counter()))

    def _promise(self, *versions: str) -> None:
        self.promises.append(Promise(time.perf_counter(), frozenset(versions)))

    def stalls(self) -> tuple[list[float], list[float], list[float]]:
        """(steady requests, longest request of each swap, longest request of each quiet window of WINDOW_S), seconds."""
        longest = [0.0] * len(self.swaps)
        steady: list[float] = []
        windows: list[float] = []
        in_window: list[Sample] = []
        at = 0
        for sample in self.samples:
            while at < len(self.swaps) and self.swaps[at].ended < sample.sent:
                at += 1
            if at < len(self.swaps) and sample.sent + sample.seconds >= self.swaps[at].began:
                longest[at] = max(longest[at], sample.seconds)
                in_window = []
                continue
            steady.append(sample.seconds)
            in_window.append(sample)
            if sample.sent - in_window[0].sent >= WINDOW_S:
                windows.append(max(s.seconds for s in in_window))
                in_window = []
        return steady, longest, windows


def story_rows(count: int) -> list[Row]:
    """Good and bad candidates, small models."""
    with tempfile.TemporaryDirectory() as folder:
        story = Story(Path(folder), two(), bad=True)
        story.run(count)
    steady, longest, windows = story.stalls()
    p99 = quantile(steady, 0.99)
    failed = sum(sample.version is None for sample in story.samples)
    rows = [
        Row("requests sent over all swaps", len(story.samples), "count"),
        Row("swaps, good and bad", len(story.swaps), "count"),
        Row("failed requests", failed, "count", 0),
        Row("failed requests by the runtime's own counter", story.failed_count, "count", 0),
        Row("wrong-version or wrong answers", wrong_answers(story.samples, story.promises), "count", 0),
        Row("bad candidates that were taken", story.accepted_bad, "count", 0),
    ]
    rows += [Row(f"{kind} candidates refused", number, "count") for kind, number in story.refused.items()]
    return [
        *rows,
        Row("the front's memory, last tenth of the swaps over the first", _growth(story.memory_bytes), "x"),
        Row("steady p50 under load", quantile(steady, 0.5) * 1e3, "ms"),
        Row("steady p99 under load", p99 * 1e3, "ms"),
        Row("longest request of a swap over steady p99, median of swaps", quantile(longest, 0.5) / p99, "x", 1.5,
            f"longest request of {WINDOW_S:g} s without a swap, median", quantile(windows, 0.5) / p99),
        Row("longest request of all swaps over steady p99", max(longest) / p99, "x", 1.5,
            "longest request without a swap", max(steady) / p99),
        Row("a whole swap: load, switch, retire, p50", quantile([s.ended - s.began for s in story.swaps], 0.5) * 1e3, "ms"),
    ]  # fmt: skip


def _growth(values: list[int]) -> float:
    tenth = max(1, len(values) // 10)
    return sum(values[-tenth:]) / sum(values[:tenth])


def size_rows(count: int) -> list[Row]:
    """The same stall for a small model and a large one, swap stories alternating; and a program that loads where it serves."""
    found: dict[int, list[float]] = {size: [] for size in SIZES_MB}
    others: list[float] = []
    reloads: dict[int, float] = {}
    for _ in range(2):
        for size in SIZES_MB:
            with tempfile.TemporaryDirectory() as folder:
                story = Story(Path(folder), two(size << 20), bad=False)
                story.run(max(3, count // 2))
            steady, longest, _ = story.stalls()
            found[size] += longest
            others += steady
    for size in SIZES_MB:
        content = networks.conv(1, size << 20)
        began = time.perf_counter()
        raw_session(content).run(None, {"x": PICTURE})
        reloads[size] = time.perf_counter() - began
    small, large = (quantile(found[size], 0.5) for size in SIZES_MB)
    p99 = quantile(others, 0.99)
    return [
        Row(f"longest request of a swap, {size} MB model, median of swaps", quantile(found[size], 0.5) * 1e3, "ms", None,
            "loading where it serves", reloads[size] * 1e3) for size in SIZES_MB
    ] + [
        Row(f"longest request of a swap over steady p99, {SIZES_MB[1]} MB model, median", large / p99, "x", 1.5),
        Row(f"stall of a {SIZES_MB[1]} MB model over that of a {SIZES_MB[0]} MB model, median", large / small, "x", 1.5),
    ]  # fmt: skip


def real_rows(count: int) -> list[Row]:
    """The stall of a network as people have them, whose requests take milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        story = Story(Path(folder), (networks.lite0(1), networks.lite0(2)), bad=False)
        story.run(count)
    steady, longest, windows = story.stalls()
    p99 = quantile(steady, 0.99)
    what = "EfficientNet-Lite0 int8"
    return [
        Row(f"{what}: failed requests", sum(sample.version is None for sample in story.samples), "count", 0),
        Row(f"{what}: wrong-version or wrong answers", wrong_answers(story.samples, story.promises), "count", 0),
        Row(f"{what}: steady p99 under load", p99 * 1e3, "ms"),
        Row(f"{what}: longest request of a swap over steady p99, median of swaps", quantile(longest, 0.5) / p99, "x", 1.5,
            f"longest request of {WINDOW_S:g} s without a swap, median", quantile(windows, 0.5) / p99),
        Row(f"{what}: longest request of all swaps over steady p99", max(longest) / p99, "x", 1.5,
            "longest request without a swap", max(steady) / p99),
    ]  # fmt: skip


def rows(count: int) -> list[Row]:
    few = min(count, 20)
    return [*story_rows(count), *real_rows(few), *size_rows(few)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=60)
    finish("swap", rows(parser.parse_args().swaps))
