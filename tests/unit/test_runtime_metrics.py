"""Counters and their Prometheus text."""

from __future__ import annotations

from edgefleet_agent.runtime.metrics import Figures, exposition


def test_the_histogram_is_cumulative_and_ends_with_every_answer() -> None:
    figures = Figures()
    for ms in (0.2, 3, 3, 40, 20_000):
        figures.answered(int(ms * 1e6), 0, 0)
    buckets = dict(figures.buckets())
    assert buckets["0.0005"] == 1
    assert buckets["0.005"] == 3
    assert buckets["0.05"] == 4
    assert buckets["10.0"] == 4
    assert buckets["+Inf"] == 5


def test_percentiles_are_none_before_the_first_answer() -> None:
    assert Figures().percentiles_ms() is None


def test_failed_requests_count_as_requests_but_not_as_answers() -> None:
    figures = Figures()
    figures.answered(1_000_000, 0, 500_000)
    figures.refused()
    text = exposition([("toy", "1", True, figures)], {"waiting_requests": 3}).decode()
    assert 'edgefleet_runtime_requests_total{model="toy",version="1"} 2' in text
    assert 'edgefleet_runtime_failed_total{model="toy",version="1"} 1' in text
    assert 'edgefleet_runtime_request_seconds_count{model="toy",version="1"} 1' in text
    assert "edgefleet_runtime_waiting_requests 3" in text


def test_a_name_can_not_break_out_of_its_label() -> None:
    text = exposition([('a"} 1\nevil', "\\", False, Figures())], {}).decode()
    assert 'model="a\\"} 1\\nevil",version="\\\\"' in text
    assert not any(line.startswith("evil") for line in text.splitlines())


def test_a_large_gauge_is_told_to_the_last_byte() -> None:
    assert "edgefleet_runtime_held_body_bytes 134217729\n" in exposition([], {"held_body_bytes": 134_217_729}).decode()
