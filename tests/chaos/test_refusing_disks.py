"""Disks that refuse and disks that are full, on the agent in memory, in their bounded part. `make chaos` has every operation."""

from __future__ import annotations

import pytest
from chaos import faults
from chaos.board import Story
from chaos.faults import FaultRunner
from chaos.stories import depot, stories
from edgefleet_shared import atomic
from support.disk import NAME_BYTES


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_a_disk_that_refuses_costs_at_most_the_candidate(story: Story) -> None:
    runner = FaultRunner(depot())
    runner.every_operation(story, every=37)
    assert runner.failures == []
    assert runner.faults > 20


def test_a_disk_that_is_full_at_any_step_costs_at_most_the_candidate() -> None:
    runner = FaultRunner(depot())
    runner.every_capacity(next(s for s in stories() if s.name == "install"), step_bytes=8 * NAME_BYTES)
    assert runner.failures == []
    assert runner.faults > 20


def test_a_refusal_that_is_not_heeded_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_hope(fd: int, content: bytes, offset: int, files: object) -> None:
        files.pwrite(fd, memoryview(content), offset)  # type: ignore[attr-defined] - however many bytes that wrote

    monkeypatch.setattr(atomic, "_write_all", write_and_hope)
    runner = FaultRunner(depot(), limit=1)
    runner.every_capacity(next(s for s in stories() if s.name == "install"), step_bytes=NAME_BYTES)
    assert runner.failures != []


def test_a_fetch_that_keeps_what_it_brought_onto_a_full_disk_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgefleet_agent.swap.make_room", lambda state, ports: None)
    monkeypatch.setattr(faults, "PATIENCE_TURNS", 30)
    runner = FaultRunner(depot(), limit=1)
    runner.every_capacity(next(s for s in stories() if s.name == "install"), step_bytes=NAME_BYTES)
    assert runner.failures != []
