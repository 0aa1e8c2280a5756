"""Stage 2, compile: times of models, interleaved in one process. Receives what runs them, hands on the times of runs that had a processor to themselves.

Other work on this machine does not hit all alike: of two models the one with more threads, or with shorter runs, was told as twice as slow on a busy machine
and half as slow on a quiet one. A thread that is ready and waits for a processor is counted by the kernel; runs in which none did are what is asked for.
Source: kernel ``Documentation/scheduler/sched-stats.rst`` (``/proc/<pid>/task/<tid>/schedstat``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

WARMUP_RUNS = 5
TIMED_RUNS = 40
TIMED_RUNS_OF_SEVERAL = 16  # to rank candidates; the one that is chosen is timed again, alone with float
IN_A_ROW = 4  # timed runs of one model before the next has its turn; one more goes before them
UNDISTURBED = 0.02  # share of a run's time that threads may have waited for a processor in it
MOST_ROUNDS = 5  # times as many rounds as are asked for, in search of such runs
MOST_EXTRA_S = 10.0  # for those beyond what was asked for


class Clocks(NamedTuple):
    """Both in seconds: the time, and how long threads of this process have waited for a processor so far."""

    now: Callable[[], float]
    waited: Callable[[], float]


def waited_s() -> float:
    """How long the threads of this process were ready to run, and waited for a processor, since each began."""
    waited = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/schedstat", "rb") as stream:
                waited += int(stream.read().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended, or the kernel keeps no such figures
            continue
    return waited / 1e9


REAL = Clocks(time.perf_counter, waited_s)


def interleaved(
    calls: Sequence[Callable[[int], object]], progress: Callable[[str, int, int], None], clocks: Clocks = REAL
) -> list[list[float]]:
    """Times in ms of each call: of as many runs as are asked for, those in which threads waited least for a processor.

    A board runs one model over and over. So each has some runs in a row behind one that is not timed, which brings its weights into the processor's caches: with another model's
    run before each, what has fewer bytes lost more of what it gained by them. Each second round goes backwards, so that none is always the one behind another. A machine on which nothing waits sees no round more than are
    asked for; where it is never quiet, the least disturbed runs are told.

    Args:
        calls: run one model each, over the sample of that number.
    """
    wanted = TIMED_RUNS if len(calls) <= 2 else TIMED_RUNS_OF_SEVERAL
    taken: list[list[tuple[float, float]]] = [[] for _ in calls]  # (share of it waited, seconds), by call
    for number in range(WARMUP_RUNS):
        progress("timing", number, WARMUP_RUNS + wanted)
        for call in calls:
            call(number)
    until = float("inf")
    rounds = wanted // IN_A_ROW
    for number in range(MOST_ROUNDS * rounds):
        progress("timing", WARMUP_RUNS + min(number * IN_A_ROW, wanted), WARMUP_RUNS + wanted)
        order = list(zip(calls, taken, strict=True))
        for call, kept in order if number % 2 else reversed(order):
            call(number * IN_A_ROW)
            for sample in range(number * IN_A_ROW, (number + 1) * IN_A_ROW):
                waited, began = clocks.waited(), clocks.now()
                call(sample)
                took = clocks.now() - began
                kept.append(((clocks.waited() - waited) / max(took, 1e-9), took))
        if number + 1 == rounds:
            until = clocks.now() + MOST_EXTRA_S
        quiet = min(sum(share <= UNDISTURBED for share, _ in kept) for kept in taken)
        if number + 1 >= rounds and (quiet >= wanted or clocks.now() > until):
            break
    return [[took * 1e3 for _, took in _least_disturbed(kept, wanted)] for kept in taken]


def _least_disturbed(kept: list[tuple[float, float]], wanted: int) -> list[tuple[float, float]]:
    """So many of the runs; those that were not disturbed are alike, in the order in which they were taken."""
    return sorted(kept, key=lambda run: max(run[0], UNDISTURBED))[:wanted]
