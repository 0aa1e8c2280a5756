"""Which processors are kept for what loads, on real processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from edgefleet_agent.runtime import priority
from edgefleet_agent.runtime.priority import Precedence

ALL = os.sched_getaffinity(0)
several = pytest.mark.skipif(len(ALL) < 2, reason="this machine has one processor: none can be kept")


@pytest.fixture
def pids() -> Iterator[list[int]]:
    """Three processes."""
    made = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    yield [process.pid for process in made]
    for process in made:
        process.kill()
        process.wait()


@several
def test_what_loads_has_a_processor_that_what_serves_leaves_alone(pids: list[int]) -> None:
    one, other, loading = pids
    precedence = Precedence(apart=True)
    precedence.join(one, aside=False)
    precedence.join(loading, aside=True)
    precedence.join(other, aside=False)
    kept = os.sched_getaffinity(loading)
    assert len(kept) == 1
    assert os.sched_getaffinity(one) == os.sched_getaffinity(other) == ALL - kept
    assert os.sched_getscheduler(loading) != os.SCHED_OTHER
    precedence.come_forward(loading)
    assert [os.sched_getaffinity(pid) for pid in pids] == [ALL] * 3
    assert os.sched_getscheduler(loading) == os.SCHED_OTHER


@several
def test_the_processors_are_everybodys_when_the_last_that_stands_aside_has_ended(pids: list[int]) -> None:
    serving, ends, leaves = pids
    precedence = Precedence(apart=True)
    precedence.join(serving, aside=False)
    precedence.join(ends, aside=True)
    precedence.join(leaves, aside=False)
    precedence.step_back(leaves)
    assert os.sched_getaffinity(leaves) == os.sched_getaffinity(ends)
    precedence.leave(ends)
    assert os.sched_getaffinity(serving) == ALL - os.sched_getaffinity(leaves)
    precedence.leave(leaves)
    assert os.sched_getaffinity(serving) == ALL


def test_where_requests_use_several_threads_nothing_is_kept_from_them(pids: list[int]) -> None:
    serving, loading, _ = pids
    precedence = Precedence(apart=False)
    precedence.join(serving, aside=False)
    precedence.join(loading, aside=True)
    assert os.sched_getaffinity(serving) == os.sched_getaffinity(loading) == ALL
    assert os.sched_getscheduler(loading) != os.SCHED_OTHER


def test_one_processor_is_shared(pids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    serving, loading, _ = pids
    only = min(ALL)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {only})
    placed: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, processors: placed.append(processors))
    precedence = Precedence(apart=True)
    precedence.join(serving, aside=False)
    precedence.join(loading, aside=True)
    assert placed
    assert all(processors == {only} for processors in placed)


@several
def test_of_slow_and_fast_processors_a_slow_one_is_kept(pids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = min(ALL)
    monkeypatch.setattr(priority, "_capacity", lambda processor: 400 if processor == slow else 1024)
    Precedence(apart=True).join(pids[0], aside=True)
    assert os.sched_getaffinity(pids[0]) == {slow}


@several
def test_who_starts_another_stands_aside_with_it_and_is_back_at_once(pids: list[int]) -> None:
    serving, starts, started = pids
    precedence = Precedence(apart=True)
    precedence.join(serving, aside=False)
    precedence.join(starts, aside=False)
    with precedence.standing_aside(starts):
        assert len(os.sched_getaffinity(starts)) == 1
        assert os.sched_getaffinity(serving) == ALL - os.sched_getaffinity(starts)
        assert os.sched_getscheduler(starts) != os.SCHED_OTHER
        precedence.join(started, aside=True)
    assert os.sched_getscheduler(starts) == os.SCHED_OTHER
    assert os.sched_getaffinity(starts) == os.sched_getaffinity(serving) == ALL - os.sched_getaffinity(started)
    precedence.leave(started)
    assert os.sched_getaffinity(starts) == ALL


@several
def test_who_died_while_it_stood_aside_keeps_no_processor(pids: list[int]) -> None:
    serving, starts, _ = pids
    precedence = Precedence(apart=True)
    precedence.join(serving, aside=False)
    with precedence.standing_aside(starts):
        precedence.leave(starts)
    assert os.sched_getaffinity(serving) == ALL


def test_a_process_that_has_ended_is_nothing_to_place() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    precedence = Precedence(apart=True)
    precedence.join(ended.pid, aside=True)
    precedence.come_forward(ended.pid)
    precedence.leave(ended.pid)
