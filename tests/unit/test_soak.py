"""After the swap: how a soak ends, and when a committed model counts as one that regressed."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
from edgefleet_agent import swap
from edgefleet_agent.health import REGRESSION_CRASHES, REGRESSION_LOOKS, CrashWatch
from edgefleet_agent.ports import Ports
from edgefleet_agent.runtime.control import StatusReport, VersionStatus
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.files import DISK
from edgefleet_shared.lifecycle import Event

MANIFEST = "sha256:" + "1" * 64
ASSIGNMENT = Assignment(
    id="a1", device="b1", device_class="c", rollout="r", model="m", version="2", manifest=MANIFEST, size=9, issued_at=1,
    soak_s=2,
)  # fmt: skip


def status(
    requests: int = 0, failed: int = 0, crashes: int = 0, serving: bool = True, manifest: str = MANIFEST,
    state: str = "ready", starved: int = 0,
) -> StatusReport:  # fmt: skip
    version = VersionStatus(
        manifest=manifest, model="m", version="2", engine="onnxruntime", state=state, serving=serving, standby=False,
        requests=requests, failed=failed, crashes=crashes, retried=0, p50_ms=None, p95_ms=None, in_flight=0, pid=2,
        memory_bytes=0, providers=(), unconfined=(), last_problem="killed by SIGSEGV", starved=starved,
    )  # fmt: skip
    return StatusReport(
        serving=manifest if serving else None, standby=None, versions=(version,), waiting=0, requests=requests,
        failed=failed, swaps=1, pid=1, memory_bytes=0, uptime_s=1.0,
    )  # fmt: skip


class Runtime:
    """Says one status after the other, the last one for ever."""

    def __init__(self, *says: StatusReport) -> None:
        self._says = list(says)

    def status(self) -> StatusReport:
        return self._says.pop(0) if len(self._says) > 1 else self._says[0]


class Stop(threading.Event):
    """Nobody stops the soak; time passes while it waits."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.advance(timeout or 0.0)
        return False


def soak(*says: StatusReport) -> tuple[Event, str]:
    clock = ManualClock()
    ports = Ports(
        uplink=cast(Any, None), runtime=cast(Any, Runtime(*says)), examiner=cast(Any, None), signer=cast(Any, None),
        clock=clock, files=DISK, spawn=lambda name, work: None,
    )  # fmt: skip
    return swap.soak(ports, ASSIGNMENT, Stop(clock))


@pytest.mark.parametrize(("starved", "ends"), [(1, Event.HEALTHY), (2, Event.HEALTHY), (3, Event.UNHEALTHY)])
def test_what_has_to_go_for_others_now_and_then_is_healthy_and_what_the_board_does_not_hold_is_not(
    starved: int, ends: Event
) -> None:
    event, why = soak(status(), status(requests=50, starved=starved))
    assert event is ends
    assert ("the board had no memory" in why) is (ends is Event.UNHEALTHY)


def test_a_model_that_serves_well_until_the_end_is_healthy() -> None:
    assert soak(status(10), status(20), status(200, 1)) == (Event.HEALTHY, "served 190 requests, 1 failed")


def test_a_model_whose_worker_is_away_at_the_end_is_committed_once_it_is_back() -> None:
    away = [status(state="restarting", starved=1)] * (2 + int(ASSIGNMENT.soak_s / swap.LOOK_S))
    assert soak(*away, status(30, starved=1)) == (Event.HEALTHY, "served 30 requests, 0 failed")


def test_a_model_whose_worker_does_not_come_back_is_unhealthy() -> None:
    assert soak(status(state="restarting", starved=1)) == (
        Event.UNHEALTHY, "it does not come back: killed by SIGSEGV",
    )  # fmt: skip


def test_a_model_without_requests_is_healthy_when_it_serves() -> None:
    assert soak(status()) == (Event.HEALTHY, "served 0 requests, 0 failed")


@pytest.mark.parametrize(
    "then",
    [status(20, 10), status(20, crashes=1), status(20, serving=False)],
    ids=["fails", "crashes", "serves no more"],
)
def test_a_model_that_does_not_serve_well_is_unhealthy(then: StatusReport) -> None:
    assert soak(status(10), then)[0] is Event.UNHEALTHY


def test_a_runtime_that_starts_again_and_counts_from_nothing_is_no_failure_of_the_model() -> None:
    assert soak(status(1000), status(1100), status(0), status(3)) == (Event.HEALTHY, "served 3 requests, 0 failed")


def test_what_fails_after_the_runtime_started_again_counts() -> None:
    assert soak(status(1000, 100), status(0), status(90, 90))[0] is Event.UNHEALTHY


def test_an_engine_that_dies_at_each_request_is_a_regression_however_long_it_takes_to_load() -> None:
    watch = CrashWatch()
    seen = [watch.look(status(crashes=number)) for number in range(REGRESSION_CRASHES + 1)]
    assert seen[:-1] == [None] * REGRESSION_CRASHES
    assert seen[-1] is not None
    assert seen[-1][0] == MANIFEST


def test_an_engine_that_dies_soon_after_each_start_is_a_regression_though_a_start_takes_minutes() -> None:
    """Gigabytes on a slow card: what is between two deaths is mostly the start."""
    watch = CrashWatch()
    seen = [watch.look(status())]
    for crashes in range(1, REGRESSION_CRASHES + 1):
        seen += [watch.look(status(crashes=crashes, state="restarting")) for _ in range(2 * REGRESSION_LOOKS)]
        seen += [watch.look(status(crashes=crashes))]
    assert seen[0] is None
    assert any(seen)


def test_crashes_that_are_far_apart_are_no_regression() -> None:
    watch = CrashWatch()
    assert {watch.look(status(crashes=number // 100)) for number in range(1000)} == {None}


def test_what_another_model_or_an_earlier_runtime_counted_is_no_crash_of_this_one() -> None:
    watch = CrashWatch()
    assert watch.look(status(crashes=50)) is None
    assert watch.look(status(crashes=0)) is None
    assert watch.look(status(crashes=2)) is None
    assert watch.look(status(crashes=40, manifest="sha256:" + "2" * 64)) is None
    assert watch.look(None) is None
    assert watch.look(status(crashes=42, manifest="sha256:" + "2" * 64)) is None


def test_an_engine_that_dies_over_and_over_since_its_runtime_started_again_is_a_regression() -> None:
    watch = CrashWatch()
    assert watch.look(status(crashes=50)) is None
    assert watch.look(status(crashes=REGRESSION_CRASHES)) is not None
