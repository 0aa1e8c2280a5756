"""Disks that refuse and disks that are full, on the agent in memory, in their bounded part. `make chaos` has every operation."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from chaos.board import Agent, Examiner, SimulatedRuntime, Story, check_end
from chaos.faults import FaultRunner
from chaos.stories import came_to, depot, enrolment, play, stories
from edgefleet_agent.enroll import ROOM_BYTES
from edgefleet_shared import atomic
from edgefleet_shared.errors import ConflictError, EnvironmentProblem
from edgefleet_shared.outcomes import Outcome
from support.disk import NAME_BYTES, MemoryDisk


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_a_disk_that_refuses_costs_at_most_the_candidate(story: Story) -> None:
    runner = FaultRunner(depot())
    runner.every_operation(story, every=61)
    assert runner.failures == []
    assert runner.faults > 10


def test_a_disk_that_is_full_at_any_step_costs_at_most_the_candidate() -> None:
    runner = FaultRunner(depot())
    runner.every_capacity(next(s for s in stories() if s.name == "install"), step_bytes=NAME_BYTES)
    assert runner.failures == []
    assert runner.faults > 10


def test_a_refusal_that_is_not_heeded_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_hope(fd: int, content: bytes, offset: int, files: object) -> None:
        files.pwrite(fd, memoryview(content), offset)  # type: ignore[attr-defined] - however many bytes that wrote

    monkeypatch.setattr(atomic, "_write_all", write_and_hope)
    runner = FaultRunner(depot(), limit=1)
    runner.every_capacity(next(s for s in stories() if s.name == "install"), step_bytes=NAME_BYTES)
    assert runner.failures != []


def test_a_fetch_that_fills_the_disk_gives_it_back_so_that_its_end_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "edgefleet_agent.fetch.SPARE_BYTES", -(1 << 30)
    )  # somebody else took the space after it was measured
    story = next(s for s in stories() if s.name == "install")
    for room in range(3000, 8000, 250):
        disk = MemoryDisk(story.tree)
        agent = Agent(depot(), story, disk, SimulatedRuntime(depot(), disk, frozenset()))
        disk.capacity_bytes = disk.used_bytes() + room
        for _ in range(100):
            agent.turn()
        told = agent.wire.reported
        assert told is not None
        assert told.ended is not None
        assert told.ended.outcome is Outcome.FAILED_NO_CHANGE, f"{room} bytes free: {told.state}, {told.problem}"


def test_a_disk_that_can_not_hold_an_enrolment_says_so_before_the_token_is_spent() -> None:
    enrolled = 0
    for room in (*range(0, 8192, NAME_BYTES), ROOM_BYTES, 2 * ROOM_BYTES):
        disk = MemoryDisk()
        disk.capacity_bytes = room
        spent = False

        def spend() -> None:
            nonlocal spent
            spent = True

        try:
            enrolment(depot(), disk, spend)
        except EnvironmentProblem:
            assert not spent, f"{room} bytes free"
        else:
            enrolled += 1
    assert enrolled > 0


@pytest.mark.parametrize("was_there", [True, False])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_became_read_only_or_full_does_not_keep_its_owner_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, was_there: bool
) -> None:
    if was_there:
        with atomic.lock(tmp_path, "an earlier start"):
            pass
    real = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with atomic.lock(tmp_path, "one"), pytest.raises(ConflictError), atomic.lock(tmp_path, "two"):
        pass


def test_every_kind_of_change_occurs_in_the_stories() -> None:
    changes = {line.split()[0] for story in stories() for line in play(story).disk.log}
    assert changes == {"create", "write", "fsync", "rename", "unlink", "mkdir"}
    disk = MemoryDisk()
    enrolment(depot(), disk)
    assert {line.split()[0] for line in disk.log} == {"create", "write", "fsync", "rename", "mkdir"}


@pytest.mark.parametrize("turns", range(24))
def test_a_deadline_may_pass_at_any_moment_also_with_the_last_chunk(turns: int) -> None:
    desired = (depot().assign("3", timeout_s=50),)
    story = Story("deadline", came_to("1"), desired, {"3": (Outcome.SUCCEEDED,), "1": (Outcome.TIMED_OUT,)})
    disk = MemoryDisk(story.tree)
    agent = Agent(depot(), story, disk, SimulatedRuntime(depot(), disk, frozenset()))
    for _ in range(turns):
        agent.turn()
    agent.clock.elapsed += 100.0
    agent.run()
    check_end(agent)


@pytest.mark.parametrize(
    ("question", "before", "version"), [("check", "1", "3"), ("build", "5", "7"), ("accept", "1", "3")]
)
@pytest.mark.parametrize("times", [2, 3])
def test_a_board_that_can_start_no_child_tries_again_and_at_last_says_that_nothing_changed(
    monkeypatch: pytest.MonkeyPatch, question: str, before: str, version: str, times: int
) -> None:
    answer, asked, tree = getattr(Examiner, question), [], came_to(before)

    def refuse(self: Examiner, *arguments: object) -> object:
        asked.append(arguments)
        if len(asked) <= times:
            raise EnvironmentProblem("can't run a child: Resource temporarily unavailable")
        return answer(self, *arguments)

    monkeypatch.setattr(Examiner, question, refuse)
    ends = {version: (Outcome.SUCCEEDED,)} if times == 2 else {before: (Outcome.FAILED_NO_CHANGE,)}
    story = Story("no child", tree, (depot().assign(version),), ends, "7")
    agent = play(story)
    check_end(agent)
    assert any("Resource temporarily unavailable" in problem for problem in agent.wire.problems)


def test_a_bug_in_a_job_ends_the_loop_and_so_counts_against_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Examiner, "check", lambda *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        play(Story("bug", came_to("1"), (depot().assign("3"),), {}))
