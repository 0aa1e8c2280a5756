"""Times of models on a machine that has other things to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from edgefleet_controller.compile.children.timing import (
    IN_A_ROW,
    MOST_ROUNDS,
    TIMED_RUNS,
    WARMUP_RUNS,
    Clocks,
    interleaved,
)

ROUND = TIMED_RUNS // IN_A_ROW * (1 + IN_A_ROW)  # runs of one model, one of each row untimed


class Machine:
    """A clock that only models and other work move. ``disturbed(run)``: seconds that the run of that number waits for a processor."""

    def __init__(self, disturbed: Callable[[int], float]) -> None:
        self.now = self.waited = 0.0
        self.runs, self._disturbed = 0, disturbed

    def model(self, seconds: float) -> Callable[[int], object]:
        def run(_: int) -> None:
            waits = self._disturbed(self.runs)
            self.runs += 1
            self.now += seconds + waits
            self.waited += waits

        return run

    @property
    def clocks(self) -> Clocks:
        return Clocks(lambda: self.now, lambda: self.waited)


def timed(machine: Machine, *seconds: float) -> list[float]:
    """The median of each model in ms."""
    times = interleaved([machine.model(s) for s in seconds], lambda *_: None, machine.clocks)
    assert {len(one) for one in times} == {TIMED_RUNS}
    return [float(np.median(one)) for one in times]


def test_a_quiet_machine_is_asked_for_no_round_more() -> None:
    machine = Machine(lambda _: 0.0)
    assert timed(machine, 0.001, 0.002) == pytest.approx([1.0, 2.0])
    assert machine.runs == 2 * (WARMUP_RUNS + ROUND)


def test_other_work_that_hits_one_model_more_often_makes_it_no_slower() -> None:
    """The faster one waits in two of its three runs, which is what its median would be."""
    machine = Machine(lambda run: 0.004 if run % 2 == 0 and run % 3 else 0.0)
    assert timed(machine, 0.001, 0.002) == pytest.approx([1.0, 2.0])


def test_on_a_machine_that_is_never_quiet_the_least_disturbed_runs_are_told_and_it_ends() -> None:
    machine = Machine(lambda run: 0.01 if run // 8 % 2 else 0.001)
    assert timed(machine, 0.001, 0.002) == pytest.approx([2.0, 3.0])
    assert machine.runs == 2 * (WARMUP_RUNS + MOST_ROUNDS * ROUND)


def test_slow_models_are_not_timed_much_longer_for_it() -> None:
    machine = Machine(lambda _: 0.5)
    timed(machine, 0.5, 0.5)
    assert machine.runs < 2 * (WARMUP_RUNS + 1.5 * ROUND)


def test_what_another_model_leaves_in_the_caches_is_not_timed() -> None:
    """On a board no other model runs in between."""
    machine = Machine(lambda _: 0.0)
    ran: list[float] = []

    def model(seconds: float) -> Callable[[int], object]:
        def run(_: int) -> None:
            cold = not ran or ran[-1] != seconds
            ran.append(seconds)
            machine.now += 3 * seconds if cold else seconds

        return run

    times = interleaved([model(0.001), model(0.002), model(0.003)], lambda *_: None, machine.clocks)
    assert [set(np.round(one, 6)) for one in times] == [{1.0}, {2.0}, {3.0}]
