"""The kernel's own choice when memory ends, in a control group of its own: what had taken no more than it may is not blamed for the others."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from edgefleet_agent import out_of_memory, sandbox, shadow, slots, swap
from edgefleet_agent.ports import Ports
from edgefleet_agent.runtime.control import SwapMode
from edgefleet_agent.sandbox import Ended, Limits
from edgefleet_agent.slots import Slot, SlotStatus
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.contract import AcceptanceReport, ShadowPlan, Verdict
from edgefleet_shared.files import DISK
from edgefleet_shared.lifecycle import Event
from support import artifacts, control_group
from support.control_group import Group
from support.runtimes import Load, Runtime, running, until


@pytest.fixture
def group() -> Iterator[Group]:
    with control_group.made() as made:
        yield made


def test_a_worker_that_has_to_go_for_others_is_not_counted_as_crashed_and_comes_back(
    group: Group, tmp_path: Path
) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        first = runtime.version("1")
        group.take_in(first.pid)
        with Load(runtime) as load:
            group.fill_until(lambda: runtime.version("1").starved == 1)
            until(lambda: runtime.version("1").state == "ready", what="the worker being back")
            load.seen("1")
        assert load.failed == []
        after = runtime.version("1")
        assert (after.crashes, after.starved) == (0, 1)
        assert "killed by SIGKILL: the board is out of memory; it held" in after.last_problem
        assert b'edgefleet_runtime_starved_total{model="toy",version="1"} 1\n' in runtime.get("/metrics")[1]
        assert runtime.infer(np.full((1, 8, 8, 3), 0.5, np.float32))[0] == 200


def test_a_worker_that_is_killed_while_nobody_lacks_memory_has_crashed(tmp_path: Path) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        os.kill(runtime.version("1").pid, 9)
        until(lambda: runtime.version("1").crashes == 1, what="its crash being counted")
        assert runtime.version("1").starved == 0


class Waiting(threading.Event):
    """Nobody stops the agent; what happens while it waits."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__()
        self._happens = happens
        self.waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        self._happens()
        return False


Step = Callable[[Path, Ports, Assignment, AcceptanceReport, threading.Event], tuple[Event, str, AcceptanceReport]]


def told(
    step: Step, runtime: Runtime, candidate: str, stop: threading.Event, mode: SwapMode = "blue-green"
) -> tuple[Event, str, AcceptanceReport]:
    """What the agent says of a step with a candidate that it has accepted, over the real control socket."""
    ports = Ports(
        uplink=cast(Any, None), runtime=runtime.client, examiner=cast(Any, None), signer=cast(Any, None),
        clock=SystemClock(), files=DISK, spawn=lambda name, work: None,
    )  # fmt: skip
    assignment = Assignment(
        id="a", device="b", device_class="c", rollout="r", model="toy", version="2", manifest=candidate, size=9,
        issued_at=1, swap=mode,
    )  # fmt: skip
    now = slots.read(runtime.state)
    slots.write(runtime.state, msgspec.structs.replace(now, candidate=Slot(candidate, "toy", "2", SlotStatus.BAD)))
    return step(runtime.state, ports, assignment, AcceptanceReport(verdict=Verdict.PASSED), stop)


@pytest.fixture
def loading(group: Group, tmp_path: Path) -> Iterator[Runtime]:
    """A runtime whose next workers start in the group, which others fill; version 1 serves, outside of it."""
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        assert runtime.process is not None
        for nursery in _children(runtime.process.pid):
            group.take_in(nursery)
        yield runtime


@pytest.mark.parametrize("mode", ["blue-green", "in-place"])
def test_a_candidate_that_has_to_go_for_others_while_it_loads_is_loaded_once_they_have_gone(
    group: Group, loading: Runtime, mode: SwapMode
) -> None:
    candidate = loading.add("2")
    others = group.others()
    try:
        stop = Waiting(lambda: others.communicate())
        event, why, report = told(swap.swap, loading, candidate, stop, mode)
    finally:
        others.communicate()
    assert (event, stop.waits, report.verdict) == (Event.SWAPPED, 1, Verdict.PASSED), why
    assert loading.status().serving == candidate


@pytest.mark.parametrize(
    ("step", "ends"), [(swap.swap, Event.LOAD_FAILED), (shadow.shadow, Event.DISAGREED)], ids=["swap", "shadow"]
)
def test_a_candidate_that_has_to_go_for_others_each_time_is_not_held_against_the_model(
    group: Group, loading: Runtime, step: Step, ends: Event
) -> None:
    candidate = loading.add(
        "2", contract=artifacts.make_contract(shadow=ShadowPlan(requests=1, min_agreement=0.9, time_limit_s=1.0))
    )
    others = group.others()
    try:
        stop = Waiting(lambda: None)
        event, why, report = told(step, loading, candidate, stop)
    finally:
        others.communicate()
    assert (event, stop.waits) == (ends, out_of_memory.ATTEMPTS - 1)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "the board is out of memory" in report.reason
    assert report.reason in why
    assert loading.infer(np.full((1, 8, 8, 3), 0.5, np.float32))[0] == 200


def test_a_candidate_that_the_board_refuses_memory_is_loaded_once_it_grants_that(tmp_path: Path) -> None:
    """What a process may write is limited from outside, as a kernel that promises no more than it has limits it."""
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        assert runtime.process is not None
        (nursery,) = _children(runtime.process.pid)
        before = resource.prlimit(nursery, resource.RLIMIT_DATA, (200 << 20, resource.RLIM_INFINITY))
        stop = Waiting(lambda: _grant(nursery, before))
        candidate = runtime.add("2", content=artifacts.onnx_model(2, padding_bytes=100 << 20))
        event, why, report = told(swap.swap, runtime, candidate, stop)
    assert (event, stop.waits, report.verdict) == (Event.SWAPPED, 1, Verdict.PASSED), why


def _grant(pid: int, data_bytes: tuple[int, int]) -> None:
    resource.prlimit(pid, resource.RLIMIT_DATA, data_bytes)


def test_a_candidate_that_dies_while_it_loads_is_loaded_once(tmp_path: Path) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        stop = Waiting(lambda: None)
        event, why, report = told(swap.swap, runtime, runtime.add("2", behaviour="crash"), stop)
    assert (event, stop.waits, report.verdict) == (Event.LOAD_FAILED, 0, Verdict.PASSED), why


def test_a_child_that_has_to_go_for_others_is_told_from_one_that_is_at_fault(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    request = json.dumps({"deed": "hang", "readable": [], "writable": [], "file_bytes": 0}).encode()
    said, ended = threading.Event(), list[Ended]()

    def tried() -> None:
        limits = Limits(memory_bytes=256 << 20, time_s=60.0)
        ended.append(sandbox.run("support.misbehaving", request, limits, lambda line: said.set()))

    trying = threading.Thread(target=tried)
    trying.start()
    assert said.wait(20)
    for child in _tried():
        group.take_in(child)
    group.fill_until(lambda: bool(ended))
    trying.join()
    assert (ended[0].problem, ended[0].starved) == ("killed by SIGKILL", True)


def _tried() -> list[int]:
    children = _children(os.getpid())
    return [p for p in children if b"support.misbehaving" in Path(f"/proc/{p}/cmdline").read_bytes()]


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
