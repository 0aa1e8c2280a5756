"""What a board measures of itself when the kernel does not answer, or answers nonsense: no figure, and never the end of measuring."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from edgefleet_agent import health
from edgefleet_agent.health import CpuMeter, Meters
from edgefleet_agent.runtime.control import RuntimeClient

NONSENSE = ["", "cpu\n", "cpu 1 2 three 4 5 6 7 8\n", "cpu 1 2 3\n"]


@pytest.fixture
def stat(tmp_path: Path) -> Path:
    path = tmp_path / "stat"
    path.write_text("cpu 100 0 100 800 0 0 0 0 0 0\n")
    return path


def test_the_processor_is_busy_by_what_passed_since_the_last_look(stat: Path) -> None:
    meter = CpuMeter(stat)
    stat.write_text("cpu 125 0 100 875 0 0 0 0 0 0\n")
    assert meter.share() == 0.25


@pytest.mark.parametrize("content", NONSENSE)
def test_counters_that_are_none_give_no_figure_and_the_next_look_does(stat: Path, content: str) -> None:
    meter = CpuMeter(stat)
    stat.write_text(content)
    assert meter.share() is None
    stat.write_text("cpu 200 0 100 800 0 0 0 0 0 0\n")
    assert meter.share() is None, "since when is not known"
    stat.write_text("cpu 250 0 100 850 0 0 0 0 0 0\n")
    assert meter.share() == 0.5


def test_counters_that_go_back_are_no_negative_share(stat: Path) -> None:
    meter = CpuMeter(stat)
    stat.write_text("cpu 50 0 50 1000 0 0 0 0 0 0\n")
    assert meter.share() == 0.0


@pytest.mark.parametrize("content", [None, "", "MemAvailable:\n", "MemAvailable: much kB\n", "MemTotal: 5 kB\n"])
def test_memory_that_is_not_told_is_no_figure(tmp_path: Path, content: str | None) -> None:
    source = tmp_path / "meminfo"
    if content is not None:
        source.write_text(content)
    assert health.memory_available_bytes(source) is None


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_board_without_a_free_descriptor_measures_what_it_can(tmp_path: Path) -> None:
    client = RuntimeClient(tmp_path / "control.sock")
    with no_descriptors():
        figures, status = health.measure(tmp_path, client, Meters())
    assert status is None
    assert not figures.runtime_up
    assert (figures.cpu_share, figures.memory_available_bytes, figures.celsius, figures.throttled) == (None,) * 4
    assert figures.disk_free_bytes is not None
