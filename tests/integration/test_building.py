"""Engines that build on the board: the real agent and runtime, and an engine whose building behaves as badly as it is told."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edgefleet_agent import accept, build, doctor, plans, slots
from edgefleet_agent.builder import Builder
from edgefleet_agent.examiner import SandboxedExaminer
from edgefleet_agent.slots import Slot, Slots, SlotStatus
from edgefleet_shared.artifact import Descriptor, Layout
from edgefleet_shared.contract import AcceptanceReport, BuildBudget, Verdict
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.files import DISK
from edgefleet_shared.fingerprint import Requirement
from edgefleet_shared.lifecycle import Event, State
from edgefleet_shared.messages import Progress
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.work import MeasureTask
from edgefleet_shared.work_loop import Held
from support import artifacts, building
from support.broker import until
from support.building import Installed
from support.controller import Board, Controller
from support.runtimes import Load

MB = 1 << 20


def artifact(
    layout: Layout,
    version: str = "1",
    budget: dict[str, Any] | None = None,
    requires: Requirement | None = None,
    **does: Any,
) -> Descriptor:
    return artifacts.make_artifact(
        layout, version=version, engine="building", seed=int(version), content=building.model(int(version), **does),
        contract=artifacts.make_contract("building", build=BuildBudget(**(budget or {}))),
        device_class="test-class", requires=requires or Requirement(arch=platform.machine(), engine="building"),
    )  # fmt: skip


# --- one build, in its sandboxed child


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    made = Installed(tmp_path / "engine")
    made.import_here(monkeypatch)
    return made


class Bench:
    """A state folder, and what building told."""

    def __init__(self, state: Path) -> None:
        self.state, self.layout = state, slots.artifacts(state)
        self.steps: list[tuple[str, int, int]] = []
        self.stop = threading.Event()

    def ensure(self, made: Descriptor) -> tuple[Event, str]:
        return build.ensure(
            self.state, DISK, SandboxedExaminer(), made.digest, lambda *step: self.steps.append(step), self.stop
        )

    def plan(self, made: Descriptor) -> plans.Plan | None:
        return plans.read(self.layout).get(made.digest)

    def nothing_is_left(self) -> None:
        assert list(self.layout.unfinished()) == []
        assert plans.read(self.layout) == {}


@pytest.fixture
def bench(tmp_path: Path, installed: Installed) -> Bench:
    return Bench(tmp_path / "state")


def test_a_plan_is_built_told_of_and_good_to_the_byte(bench: Bench) -> None:
    made = artifact(bench.layout, linger_s=1.5, plan_bytes=3 * MB)
    event, detail = bench.ensure(made)
    assert event is Event.BUILT
    plan = bench.plan(made)
    assert plan is not None
    assert (plan.key, plan.size) == ("building 1.0", 3 * MB)
    assert "building 1.0" in detail
    assert plans.find(bench.layout, made.digest, "building 1.0").stat().st_size == 3 * MB
    assert any(doing == "trying tactics" and 0 < done < total for doing, done, total in bench.steps)


def test_what_was_built_passes_acceptance_and_is_not_built_again(bench: Bench) -> None:
    made = artifact(bench.layout)
    bench.ensure(made)
    report = accept.accept(bench.state, made.digest)
    assert report.verdict is Verdict.PASSED, report.reason
    event, detail = bench.ensure(made)
    assert event is Event.BUILT
    assert detail == "the plan at hand is of building 1.0"


def test_without_a_plan_acceptance_is_an_error_and_no_fault_of_the_model(bench: Bench) -> None:
    report = accept.accept(bench.state, artifact(bench.layout).digest)
    assert report.verdict is Verdict.ERROR
    assert "none was made on this board" in report.reason


def test_another_version_of_the_engine_builds_anew(bench: Bench, installed: Installed) -> None:
    made = artifact(bench.layout)
    bench.ensure(made)
    installed.upgrade("2.0")
    event, _ = bench.ensure(made)
    plan = bench.plan(made)
    assert event is Event.BUILT
    assert plan is not None
    assert plan.key == "building 2.0"
    assert accept.accept(bench.state, made.digest).verdict is Verdict.PASSED


@pytest.mark.parametrize("damage", [lambda c: c[:-1] + b"x", lambda c: c[: len(c) // 2], lambda c: b""])
def test_a_plan_that_was_changed_on_the_disk_is_not_used_but_built_again(
    bench: Bench, damage: Callable[[bytes], bytes]
) -> None:
    made = artifact(bench.layout)
    bench.ensure(made)
    plan = bench.plan(made)
    assert plan is not None
    path = bench.layout.path(plan.digest)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    report = accept.accept(bench.state, made.digest)
    assert report.verdict is Verdict.ERROR
    assert "on disk" in report.reason
    assert bench.ensure(made)[0] is Event.BUILT
    assert path.read_bytes() == good


def test_damaged_records_cost_a_build_and_nothing_else(bench: Bench) -> None:
    made = artifact(bench.layout)
    bench.ensure(made)
    (bench.layout.root / "plans.json").write_bytes(b"[torn")
    assert bench.ensure(made)[0] is Event.BUILT
    assert bench.plan(made) is not None


HOSTILE = [
    ("hang", {"time_limit_s": 10.0}, Event.TIMED_OUT, "over its time limit of 10 s while building"),
    ("eat", {"memory_bytes": 400 * MB}, Event.NOT_BUILT, "over its memory limit"),
    ("crash", {}, Event.NOT_BUILT, "killed by SIGSEGV while building"),
    ("flood", {"disk_bytes": 8 * MB}, Event.NOT_BUILT, "over its limit of 8388608 bytes sent"),
    ("refuse", {}, Event.NOT_BUILT, "an operator of this network is not supported"),
    ("fork", {}, Event.NOT_BUILT, "no other process"),
    ("empty", {}, Event.NOT_BUILT, "building 1.0 made an empty plan"),
]


@pytest.mark.parametrize(("deed", "budget", "event", "reason"), HOSTILE, ids=[h[0] for h in HOSTILE])
def test_a_build_that_misbehaves_costs_itself_alone(
    bench: Bench, deed: str, budget: dict[str, Any], event: Event, reason: str
) -> None:
    made = artifact(bench.layout, budget=budget, building=deed)
    found, told = bench.ensure(made)
    assert found is event
    assert reason in told
    bench.nothing_is_left()


def test_a_build_that_is_not_wanted_any_more_ends_at_once(bench: Bench) -> None:
    made = artifact(bench.layout, building="hang", budget={"time_limit_s": 600.0})
    threading.Timer(2.0, bench.stop.set).start()
    event, _ = bench.ensure(made)
    assert event is Event.NOT_BUILT
    bench.nothing_is_left()


def test_a_disk_that_fills_while_a_plan_comes_gives_the_space_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(bench.layout, plan_bytes=20 * MB)
    monkeypatch.setattr(plans, "SPARE_BYTES", DISK.free_bytes(bench.state) - 5 * MB)
    with pytest.raises(EnvironmentProblem, match="free on the disk"):
        bench.ensure(made)
    bench.nothing_is_left()


def test_an_engine_that_this_board_lacks_is_the_boards_fault(bench: Bench, installed: Installed) -> None:
    made = artifact(bench.layout)
    shutil.rmtree(installed.folder)
    with pytest.raises(EnvironmentProblem, match="no engine is called 'building'"):
        bench.ensure(made)
    bench.nothing_is_left()


def test_plans_go_with_the_artifacts_that_no_slot_names(bench: Bench) -> None:
    first, second, third = (artifact(bench.layout, version) for version in "123")
    for made in (first, second, third):
        bench.ensure(made)
    digests = {
        version: plans.read(bench.layout)[made.digest].digest
        for version, made in zip("123", (first, second, third), strict=True)
    }
    slot = {v: Slot(m.digest, "toy", v, SlotStatus.GOOD) for v, m in zip("123", (first, second, third), strict=True)}
    slots.collect_garbage(bench.state, Slots(active=slot["3"], previous=slot["2"]))
    assert set(plans.read(bench.layout)) == {second.digest, third.digest}
    assert not bench.layout.has(digests["1"])
    assert bench.layout.has(digests["2"]), "what one can return to keeps its plan"
    assert accept.accept(bench.state, second.digest).verdict is Verdict.PASSED


class Office:
    """A controller's end of a measuring task: it has the blobs, and keeps what is told."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.told: AcceptanceReport | None = None

    def fetch(self, lease: str, digest: str, into: Layout) -> None:
        into.put_file(self.layout.path(digest))

    def finish(self, lease: str, report: AcceptanceReport) -> None:
        self.told = report

    def task(self, made: Descriptor) -> MeasureTask:
        blobs = (made.digest, *(blob.digest for blob in self.layout.manifest(made.digest).blobs()))
        return MeasureTask(lease="l", lease_s=60.0, job="j", manifest=made.digest, blobs=blobs)


@pytest.mark.parametrize(
    ("does", "verdict", "words"),
    [({}, Verdict.PASSED, ""), ({"building": "refuse"}, Verdict.FAILED, "it has no plan: an operator of this network")],
    ids=["it builds", "it does not"],
)
def test_a_builder_board_builds_what_it_is_to_measure_and_keeps_nothing(bench, tmp_path, does, verdict, words) -> None:
    office = Office(Layout(tmp_path / "controller"))
    task = office.task(artifact(office.layout, **does))
    builder = Builder(office, bench.state, 1, {"building": "building 1.0"})
    builder.carry_out(task, Held(office, "l", 60.0))
    assert office.told is not None
    assert office.told.verdict is verdict, office.told.reason
    assert words in office.told.reason
    bench.nothing_is_left()
    assert list(bench.layout.digests()) == []


def test_a_builder_board_that_was_killed_over_a_task_begins_with_an_empty_disk(bench: Bench) -> None:
    bench.ensure(artifact(bench.layout))
    (bench.layout.path("sha256:" + "0" * 64).with_name(".fetch-1")).write_bytes(b"half of a blob")
    Builder(Office(bench.layout), bench.state, 1, {})
    bench.nothing_is_left()
    assert list(bench.layout.digests()) == []


# --- the real agent and runtime


class Workshop:
    def __init__(self, folder: Path, engine: Installed) -> None:
        self.engine = engine
        self.controller = Controller(folder / "controller")
        self._versions = itertools.count(1)
        self.board = Board(self.controller, "b1", folder / "b1").start()
        until(lambda: "b1" in self.controller.reports, "the board reports", 60)

    def release(self, **options: Any) -> tuple[str, Descriptor]:
        version = str(next(self._versions))
        made = artifact(self.controller.layout, version, **options)
        self.controller.release(made, "toy", version)
        return version, made

    def deploy(self, **options: Any) -> tuple[str, Outcome]:
        version, made = self.release(**options)
        return version, self.controller.outcome("b1", self.controller.assign("b1", made, version), 90)

    def served(self) -> str:
        return next((v.version for v in self.board.runtime.client.status().versions if v.serving), "")

    def states_told(self) -> list[Progress]:
        return [e.body for e in self.controller.events_seen if isinstance(e.body, Progress)]

    def close(self) -> None:
        self.board.stop()
        self.controller.stop()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    engine = Installed(tmp_path_factory.mktemp("engine"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = engine.environment["PYTHONPATH"]
    made = Workshop(tmp_path_factory.mktemp("workshop"), engine)
    yield made
    made.close()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_the_board_says_that_its_engine_builds_and_what_a_plan_depends_on(workshop: Workshop) -> None:
    fingerprint = workshop.controller.reports["b1"].fingerprint
    assert fingerprint.engines["building"] == "1.0"
    assert fingerprint.build_keys == {"building": "building 1.0"}


def test_an_artifact_for_an_engine_that_the_board_lacks_is_refused_before_download(workshop: Workshop) -> None:
    sent = workshop.controller.sender.sent_chunks
    version, made = workshop.release(requires=Requirement(arch=platform.machine(), engine="tensorrt"))
    assert workshop.controller.outcome("b1", workshop.controller.assign("b1", made, version), 90) is Outcome.REJECTED
    assert "needs engine tensorrt, the board has building" in workshop.controller.reason("b1")
    assert workshop.controller.sender.sent_chunks == sent
    (engines,) = [finding for finding in doctor.examine(workshop.board.state) if finding.what == "engines"]
    assert engines.ok
    assert "building 1.0" in engines.detail
    assert "tensorrt (NVIDIA's Python packages tensorrt and cuda-python are not installed)" in engines.detail
    assert "acl (the Python package acl of Huawei's CANN is not on the Python path)" in engines.detail


def test_a_version_is_built_on_the_board_before_it_is_accepted_and_no_request_is_lost(workshop: Workshop) -> None:
    first, outcome = workshop.deploy()
    assert outcome is Outcome.SUCCEEDED, workshop.board.log()
    with Load(workshop.board.runtime) as load:
        load.seen(first)
        second, outcome = workshop.deploy(linger_s=2.5)
        assert outcome is Outcome.SUCCEEDED, workshop.board.log()
        load.seen(second)
    assert load.failed == []
    assert load.wrong == 0
    told = [p for p in workshop.states_told() if p.state is State.BUILDING]
    assert any(p.detail == "trying tactics" and 0 < p.done < p.total for p in told)


@pytest.mark.parametrize(
    ("deed", "budget", "outcome"),
    [
        ("hang", {"time_limit_s": 10.0}, Outcome.TIMED_OUT),
        ("eat", {"memory_bytes": 400 * MB}, Outcome.FAILED_NO_CHANGE),
        ("crash", {}, Outcome.FAILED_NO_CHANGE),
        ("flood", {"disk_bytes": 8 * MB}, Outcome.FAILED_NO_CHANGE),
    ],
)
def test_a_build_that_misbehaves_costs_the_candidate_and_not_one_request(
    workshop: Workshop, deed: str, budget: dict[str, Any], outcome: Outcome
) -> None:
    serving, _ = workshop.deploy()
    with Load(workshop.board.runtime) as load:
        load.seen(serving)
        _, found = workshop.deploy(building=deed, budget=budget)
        load.seen(serving)
    assert found is outcome
    assert "while building" in workshop.controller.reason("b1")
    assert load.failed == []
    assert workshop.served() == serving
    layout = workshop.board.runtime.layout
    assert list(layout.unfinished()) == []


def test_the_assignments_time_is_also_that_of_its_build(workshop: Workshop) -> None:
    version, made = workshop.release(building="hang", budget={"time_limit_s": 600.0})
    assignment = workshop.controller.assign("b1", made, version, timeout_s=4)
    assert workshop.controller.outcome("b1", assignment) is Outcome.TIMED_OUT
    assert "not built in time" in workshop.controller.reason("b1")


def test_a_newer_assignment_ends_a_build(workshop: Workshop) -> None:
    version, made = workshop.release(building="hang", budget={"time_limit_s": 600.0})
    told = len(workshop.controller.outcomes_told("b1"))
    workshop.controller.assign("b1", made, version)
    until(lambda: workshop.controller.reports["b1"].state is State.BUILDING, "it builds")
    newer, outcome = workshop.deploy()
    assert outcome is Outcome.SUCCEEDED
    assert workshop.served() == newer
    until(
        lambda: Outcome.SUPERSEDED in workshop.controller.outcomes_told("b1")[told:], "the interrupted one is told too"
    )


def test_an_agent_that_is_killed_while_it_builds_begins_the_build_again(workshop: Workshop) -> None:
    version, made = workshop.release(linger_s=4.0)
    assignment = workshop.controller.assign("b1", made, version)
    journal = workshop.board.state / "journal.json"
    until(lambda: '"state":"building"' in journal.read_text(), "it builds")
    workshop.board.kill_agent()
    workshop.board.start_agent()
    assert workshop.controller.outcome("b1", assignment) is Outcome.SUCCEEDED
    assert workshop.served() == version


def test_an_engine_that_was_upgraded_under_what_serves_has_its_plans_built_anew(workshop: Workshop) -> None:
    before, _ = workshop.deploy()
    serving, outcome = workshop.deploy()
    assert outcome is Outcome.SUCCEEDED
    workshop.board.stop()
    workshop.engine.upgrade("2.0")
    board = workshop.board
    board.runtime.start(ready=False)
    board.start_agent()
    until(lambda: workshop.served() == serving and board.runtime.get("/v2/health/ready")[0] == 200, "it serves", 60)
    until(lambda: workshop.controller.reports["b1"].state is State.IDLE, "it is at rest", 60)
    assert any(p.state is State.REBUILDING for p in workshop.states_told())
    made = plans.read(board.runtime.layout)
    assert {plan.key for plan in made.values()} == {"building 2.0"}
    on_disk = slots.read(board.state)
    assert on_disk.active is not None
    assert on_disk.previous is not None
    assert (on_disk.active.version, on_disk.previous.version) == (serving, before)
    assert set(made) == {on_disk.active.manifest, on_disk.previous.manifest}
    with Load(board.runtime) as load:
        load.seen(serving)
    assert load.failed == []


def test_a_rollback_finds_the_plan_of_what_it_returns_to(workshop: Workshop) -> None:
    serving, _ = workshop.deploy()
    version, made = workshop.release()
    with Load(workshop.board.runtime) as load:
        load.seen(serving)
        assignment = workshop.controller.assign("b1", made, version, soak_s=600)
        until(lambda: workshop.controller.reports["b1"].state is State.SOAKING, "the new version soaks", 60)
        victim = next(v for v in workshop.board.runtime.client.status().versions if v.version == version)
        os.kill(victim.pid, 9)
        assert workshop.controller.outcome("b1", assignment) is Outcome.FAILED_ROLLED_BACK
        load.seen(serving)
    assert load.failed == []
    assert workshop.served() == serving
