"""``make chaos``: everything, as long as it takes. Its last line is ``states N, faults N, failures N``; it ends with 1 when anything failed.

``python -m chaos cuts 'full disks'`` runs single parts by their names; without names, all.

A state is a disk as a cut or a kill can leave it, told apart by content, from which the agent recovered and was judged. A fault is
an operation that was made to fail, a disk that was full, or a real process that was killed.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from chaos import processes
from chaos.enrolment import EnrolmentExplorer
from chaos.explorer import Explorer
from chaos.faults import FaultRunner
from chaos.mistakes import ENROLMENT_MISTAKES, MISTAKES, SPOOL_MISTAKES
from chaos.spooling import SpoolExplorer
from chaos.stories import depot, every_story, stories

KILLS, SEED = 30, 1
PLANTED = (*MISTAKES, *ENROLMENT_MISTAKES, *SPOOL_MISTAKES)
WHENS = ("2", "5+")
FREE_BYTES = (0, 4096, 16384, 65536, 262144, 1 << 20, 4 << 20, 16 << 20, 18 << 20)


class Count(NamedTuple):
    states: int = 0
    met: int = 0
    faults: int = 0
    failures: tuple[str, ...] = ()


def cuts(number: int) -> Count:
    """One story, cut at every instant."""
    explorer = Explorer(depot())
    explorer.explore(_every()[number])
    return Count(explorer.recovered, explorer.met, 0, tuple(explorer.failures))


def second_cuts(number: int) -> Count:
    """One story of each kind, cut at every instant, and cut again at every instant of the recovery."""
    explorer = Explorer(depot())
    explorer.explore(stories()[number], depth=2)
    return Count(explorer.recovered, explorer.met, 0, tuple(explorer.failures))


def kills(number: int) -> Count:
    """The agent alone dies at every instant, and at every instant of its recovery the power is cut."""
    explorer = Explorer(depot())
    explorer.explore_kills(stories()[number], depth=2)
    return Count(explorer.recovered, explorer.met, 0, tuple(explorer.failures))


def enrolments(depth: int) -> Count:
    """An enrolment, with so many cuts one after the other."""
    explorer = EnrolmentExplorer(depot())
    explorer.explore(depth)
    return Count(explorer.recovered, explorer.met, 0, tuple(explorer.failures))


def spools(depth: int) -> Count:
    """Events that wait for their controller, with so many cuts one after the other."""
    explorer = SpoolExplorer()
    explorer.explore(depth)
    return Count(explorer.recovered, explorer.met, 0, tuple(explorer.failures))


def refusals(number: int) -> Count:
    """Every operation of a story, made to fail in every way."""
    runner = FaultRunner(depot())
    runner.every_operation(stories()[number])
    return Count(0, 0, runner.faults, tuple(runner.failures))


def capacities(number: int) -> Count:
    """A disk that is full at every step of a story."""
    runner = FaultRunner(depot())
    runner.every_capacity(stories()[number])
    return Count(0, 0, runner.faults, tuple(runner.failures))


def mistakes(number: int) -> Count:
    """One planted mistake, which must be caught."""
    mistake = PLANTED[number]
    with mistake.plant() if mistake.plant else nullcontext():
        explorer: Explorer | EnrolmentExplorer | SpoolExplorer
        if mistake in ENROLMENT_MISTAKES:
            explorer = EnrolmentExplorer(depot(), mistake.make_disk, limit=1)
            explorer.explore(1)
        elif mistake in SPOOL_MISTAKES:
            explorer = SpoolExplorer(mistake.make_disk, limit=1)
            explorer.explore(1)
        else:
            explorer = Explorer(depot(), mistake.make_disk, limit=1)
            story = next(s for s in stories() if s.name == mistake.story)
            explorer.explore_kills(story, 2) if mistake.kills else explorer.explore(story)
    return Count(failures=() if explorer.failures else (f"planted, not caught: {mistake.name}",))


def _every() -> Sequence:
    if not _stories:
        _stories.extend(every_story())
    return _stories


_stories: list = []

PARTS: tuple[tuple[str, Callable[[int], Count], Callable[[], Sequence[int]]], ...] = (
    ("planted mistakes", mistakes, lambda: range(len(PLANTED))),
    ("second cuts", second_cuts, lambda: range(len(stories()))),
    ("kills then cuts", kills, lambda: range(len(stories()))),
    ("enrolment", enrolments, lambda: (3,)),
    ("spool", spools, lambda: (3,)),
    ("cuts", cuts, lambda: range(len(_every()))),
    ("disks that refuse", refusals, lambda: range(len(stories()))),
    ("full disks", capacities, lambda: range(len(stories()))),
)


REAL = ("real kills", "real disks that refuse", "real full disks")


def real_processes(wanted: Sequence[str]) -> Iterator[tuple[str, Count]]:
    """The parts with the real agent, one after the other on one board."""
    with tempfile.TemporaryDirectory(prefix="edgefleet-chaos-") as folder:
        trial = processes.Trial(Path(folder))
        try:
            with trial.board() as board:
                kills, refusals, full = REAL
                if kills in wanted:
                    yield kills, _counted(trial, lambda: processes.kill_at_random(trial, board, KILLS, SEED))
                if refusals in wanted and processes.has_strace():
                    cases = processes.refusals(WHENS)
                    yield refusals, _counted(trial, lambda: processes.disks_that_refuse(trial, board, cases))
                if full in wanted and processes.may_mount():
                    yield full, _counted(trial, lambda: processes.full_disks(trial, board, list(FREE_BYTES)))
        finally:
            trial.close()


def _counted(trial: processes.Trial, part: Callable[[], None]) -> Count:
    faults, failures = trial.faults, len(trial.failures)
    part()
    return Count(0, 0, trial.faults - faults, tuple(trial.failures[failures:]))


def main(wanted: Sequence[str]) -> int:
    names = [name for name, _, _ in PARTS] + list(REAL)
    if unknown := set(wanted) - set(names):
        print(f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    wanted = wanted or names
    logging.disable(logging.CRITICAL)
    results: list[Count] = []

    def tell(name: str, count: Count, began: float) -> None:
        results.append(count)
        told = f"{count.states} states of {count.met} met" if count.met else f"{count.faults} faults"
        print(f"{name:24} {told:36} {len(count.failures)} failures  {time.monotonic() - began:6.0f} s", flush=True)
        for failure in count.failures[:10]:
            print(f"    {failure}", flush=True)

    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for name, part, numbers in (row for row in PARTS if row[0] in wanted):
            began = time.monotonic()
            counts = list(pool.map(part, numbers()))
            tell(name, Count(*(sum(column) for column in list(zip(*counts, strict=True))[:3]),
                             tuple(f for count in counts for f in count.failures)), began)  # fmt: skip
    began = time.monotonic()
    for name, count in real_processes(wanted) if set(wanted) & set(REAL) else ():
        tell(name, count, began)
        began = time.monotonic()
    if REAL[1] in wanted and not processes.has_strace():
        print("strace is not installed: the real agent was not tried on disks that refuse")
    failures = sum(len(count.failures) for count in results)
    print(f"states {sum(c.states for c in results)}, faults {sum(c.faults for c in results)}, failures {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
