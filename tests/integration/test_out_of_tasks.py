"""A board on which no further process or thread may be started, by a control group with a limit of tasks: that is its want, and no model's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from edgefleet_agent import slots
from edgefleet_agent.accept import accept
from edgefleet_shared.contract import Verdict
from edgefleet_shared.lifecycle import State
from edgefleet_shared.outcomes import Outcome
from support import artifacts, control_group
from support.broker import until
from support.control_group import Tasks
from support.controller import Board, Controller
from support.runtimes import Load, gateway, running


@pytest.fixture
def group() -> Iterator[Tasks]:
    with control_group.made_for_tasks() as made:
        yield made


def test_the_grpc_gateway_answers_on_where_no_thread_can_be_started(group: Tasks, tmp_path: Path) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        with gateway(runtime) as (address, process):
            group.take_in(process.pid)
            group.leave(0)
            with grpc.insecure_channel(address) as channel:
                live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                answers = [live.future(b"", timeout=20) for _ in range(8)]
                assert {answer.result() for answer in answers} == {b"\x08\x01"}


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    made = Controller(tmp_path_factory.mktemp("controller"), bytes_per_s=1_000_000)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def board(controller: Controller, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """Serves version 1."""
    made = Board(controller, "b1", tmp_path_factory.mktemp("board")).start()
    until(lambda: made.name in controller.reports, "the board reports")
    assert assign(controller, made, "1") == "a1"
    assert controller.outcome(made.name, "a1") is Outcome.SUCCEEDED, made.log()
    yield made
    made.stop()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def served(board: Board) -> str:
    return next(v.version for v in board.runtime.status().versions if v.serving)


def assign(controller: Controller, board: Board, version: str, padding_bytes: int = 0, **more: object) -> str:
    content = artifacts.onnx_model(int(version), padding_bytes=padding_bytes)
    made = artifacts.make_artifact(
        controller.layout, version=version, device_class=controller.device_class, seed=int(version), content=content
    )
    controller.release(made, "toy", version)
    return controller.assign(board.name, made, version, **more)


def test_an_agent_that_may_start_no_thread_goes_on_once_it_may(
    controller: Controller, board: Board, group: Tasks
) -> None:
    assert board.agent is not None
    with Load(board.runtime) as load, group.around(board.agent.pid, spare=0):
        assignment = assign(controller, board, "2")
        until(lambda: "no room for another thread" in controller.reports["b1"].problem, "the board tells it")
        assert board.agent.poll() is None
        group.open()
        assert controller.outcome(board.name, assignment) is Outcome.SUCCEEDED
    assert (load.failed, load.wrong) == ([], 0)


def test_what_a_board_without_room_for_a_child_could_not_verify_is_not_held_against_the_model(
    controller: Controller, board: Board, group: Tasks
) -> None:
    assert board.agent is not None
    with Load(board.runtime) as load:
        assignment = assign(controller, board, "3", padding_bytes=3_000_000)
        until(lambda: controller.reports["b1"].state is State.FETCHING, "the board fetches")
        with group.around(board.agent.pid, spare=1):
            outcome = controller.outcome(board.name, assignment)
    ended = controller.reports["b1"].ended
    assert ended is not None
    assert outcome is Outcome.FAILED_NO_CHANGE
    assert "can't run edgefleet_agent.verify_child as a child" in ended.reason
    assert ended.acceptance is not None
    assert ended.acceptance.verdict is Verdict.INCONCLUSIVE
    assert (load.failed, load.wrong) == ([], 0)


def test_an_acceptance_without_room_for_the_threads_of_an_inference_is_inconclusive(
    group: Tasks, tmp_path: Path
) -> None:
    candidate = artifacts.make_artifact(slots.artifacts(tmp_path)).digest
    with group.around(os.getpid(), spare=2):  # the child, and all but one of its threads
        report = accept(tmp_path, candidate, threads=2)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.reason == "the board has no room for the threads of an inference, 2 (while starting)"
    assert accept(tmp_path, candidate, threads=2).verdict is Verdict.PASSED


@pytest.mark.parametrize("mode", ["blue-green", "in-place"])
def test_a_candidate_that_the_runtime_has_no_room_to_start_is_not_held_against_the_model(
    controller: Controller, board: Board, group: Tasks, mode: str
) -> None:
    runtime = board.runtime.process
    assert runtime is not None
    version = {"blue-green": "4", "in-place": "5"}[mode]
    with Load(board.runtime) as load, group.around(runtime.pid, *children(runtime.pid), spare=0):
        before = served(board)
        outcome = controller.outcome(board.name, assign(controller, board, version, swap=mode))
        ended = controller.reports["b1"].ended
        load.seen(before)
    assert ended is not None
    assert ended.acceptance is not None
    assert (outcome, ended.acceptance.verdict) == (Outcome.FAILED_NO_CHANGE, Verdict.INCONCLUSIVE), ended.reason
    assert served(board) == before
    assert (load.failed, load.wrong) == ([], 0)


def test_a_worker_that_there_is_no_room_to_bring_back_has_crashed_once_and_comes_back(
    group: Tasks, tmp_path: Path
) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        assert runtime.process is not None
        (nursery,) = children(runtime.process.pid)
        with group.around(nursery, spare=0):
            os.kill(runtime.version("1").pid, 9)
            until(lambda: "could not be started" in runtime.version("1").last_problem, "it being tried again")
        until(lambda: runtime.version("1").state == "ready", "the worker being back")
        assert (runtime.version("1").crashes, runtime.version("1").starved) == (1, 0)


@pytest.mark.parametrize("spare", [0, 1], ids=["for its child", "for the child's"])
def test_an_agent_that_finds_no_room_at_its_start_says_so_and_counts_none(
    board: Board, group: Tasks, spare: int
) -> None:
    def join() -> None:
        group.join()
        group.leave(spare)

    board.kill_agent()
    command = [sys.executable, "-m", "edgefleet_agent.cli", "run", "--state", str(board.state)]
    started = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, preexec_fn=join, check=False
    )
    assert started.returncode == 1
    assert started.stdout.startswith("error: ")
    assert "TasksMax" in started.stdout
