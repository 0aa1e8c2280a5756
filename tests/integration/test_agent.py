"""The real agent and the real runtime as processes, against a real broker and real signatures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgefleet_agent import slots
from edgefleet_agent.slots import SlotStatus
from edgefleet_shared.artifact import MODEL_LAYER, Descriptor
from edgefleet_shared.lifecycle import State
from edgefleet_shared.outcomes import Outcome
from support import artifacts
from support.broker import until
from support.controller import Board, Controller
from support.runtimes import Load


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    running = Controller(tmp_path / "controller")
    yield running
    running.stop()


@pytest.fixture
def board(controller: Controller, tmp_path: Path) -> Iterator[Board]:
    running = Board(controller, "b1", tmp_path / "b1").start()
    yield running
    running.stop()


def release(controller: Controller, version: str, **options: object) -> Descriptor:
    made = artifacts.make_artifact(
        controller.layout, version=version, seed=int(version), device_class=controller.device_class, **options
    )
    controller.release(made, "toy", version)
    return made


def served(board: Board) -> str:
    status = board.runtime.client.status()
    return next((v.version for v in status.versions if v.serving), "")


def test_a_board_takes_two_versions_under_load_without_losing_a_request(controller: Controller, board: Board) -> None:
    first, second = release(controller, "1"), release(controller, "2")
    assert controller.outcome("b1", controller.assign("b1", first, "1")) is Outcome.SUCCEEDED, board.log()
    with Load(board.runtime) as load:
        load.seen("1")
        assert controller.outcome("b1", controller.assign("b1", second, "2")) is Outcome.SUCCEEDED
        load.seen("2")
    assert load.failed == []
    assert served(board) == "2"
    on_disk = slots.read(board.state)
    assert on_disk.active is not None
    assert on_disk.previous is not None
    assert (on_disk.active.version, on_disk.active.status) == ("2", SlotStatus.GOOD)
    assert (on_disk.previous.version, on_disk.previous.status) == ("1", SlotStatus.GOOD)
    assert on_disk.candidate is None
    until(lambda: controller.outcomes_told("b1") == [Outcome.SUCCEEDED] * 2, "both outcomes are told once")


def test_a_model_that_answers_wrongly_changes_nothing_and_says_why(controller: Controller, board: Board) -> None:
    first, wrong = release(controller, "1"), release(controller, "2", behaviour="wrong")
    controller.outcome("b1", controller.assign("b1", first, "1"))
    assert controller.outcome("b1", controller.assign("b1", wrong, "2")) is Outcome.FAILED_NO_CHANGE
    assert "agreement" in controller.reason("b1")
    assert served(board) == "1"
    assert slots.read(board.state).candidate is None
    assert not board.runtime.layout.has(wrong.digest), "what no slot names is collected"


def test_a_release_for_another_engine_is_refused_before_download(controller: Controller, board: Board) -> None:
    from edgefleet_shared.fingerprint import Requirement

    alien = release(controller, "1", requires=Requirement(arch="riscv64", engine="onnxruntime"))
    assert controller.outcome("b1", controller.assign("b1", alien, "1")) is Outcome.REJECTED
    assert "riscv64" in controller.reason("b1")
    assert controller.sender.sent_chunks == 0


def test_an_assignment_by_a_stranger_is_refused_and_moves_nothing(controller: Controller, board: Board) -> None:
    first = release(controller, "1")
    controller.outcome("b1", controller.assign("b1", first, "1"))
    controller.gateway.publish_desired("b1", b'{"signed": {}, "signatures": []}')
    until(lambda: bool(controller.reports["b1"].refusal), "the refusal is told")
    assert controller.reports["b1"].state is State.IDLE
    assert served(board) == "1"


def test_one_byte_changed_on_the_senders_disk_never_becomes_a_candidate(controller: Controller, board: Board) -> None:
    made = release(controller, "1")
    path = controller.layout.path(controller.layout.manifest(made.digest).layer(MODEL_LAYER).digest)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assignment = controller.assign("b1", made, "1")
    until(lambda: controller.sender.sent_chunks >= 4, "the changed chunk went out more than once")
    assert controller.reports["b1"].state is State.FETCHING
    path.write_bytes(good)
    assert controller.outcome("b1", assignment) is Outcome.SUCCEEDED


def test_a_deployment_that_never_gets_its_bytes_times_out(controller: Controller, board: Board) -> None:
    made = release(controller, "1")
    controller.layout.remove(controller.layout.manifest(made.digest).layer(MODEL_LAYER).digest)
    assert controller.outcome("b1", controller.assign("b1", made, "1", timeout_s=2)) is Outcome.TIMED_OUT


def test_a_board_that_was_off_goes_where_it_should_be_when_it_is_back(controller: Controller, board: Board) -> None:
    first, second, third = (release(controller, v) for v in "123")
    controller.outcome("b1", controller.assign("b1", first, "1"))
    board.kill_agent(signal.SIGTERM)
    until(lambda: controller.presences["b1"] is False, "it says goodbye")
    controller.assign("b1", second, "2")
    wanted = controller.assign("b1", third, "3")
    board.start_agent()
    assert controller.outcome("b1", wanted) is Outcome.SUCCEEDED
    assert served(board) == "3"
    assert not board.runtime.layout.has(second.digest), "it reads where it should be, not what it missed"


def test_a_newer_assignment_supersedes_a_soak_and_the_board_ends_at_the_newer_one(
    controller: Controller, board: Board
) -> None:
    first, second = release(controller, "1"), release(controller, "2")
    controller.outcome("b1", controller.assign("b1", first, "1"))
    controller.assign("b1", second, "2", soak_s=600)
    until(lambda: controller.reports["b1"].state is State.SOAKING, "version 2 soaks")
    back = controller.assign("b1", first, "1")
    assert controller.outcome("b1", back) is Outcome.SUCCEEDED
    assert served(board) == "1"
    until(lambda: Outcome.SUPERSEDED in controller.outcomes_told("b1"), "the interrupted one is told too")


def test_an_engine_that_is_killed_while_soaking_brings_the_old_version_back(
    controller: Controller, board: Board
) -> None:
    first, second = release(controller, "1"), release(controller, "2")
    controller.outcome("b1", controller.assign("b1", first, "1"))
    with Load(board.runtime) as load:
        load.seen("1")
        assignment = controller.assign("b1", second, "2", soak_s=600)
        until(lambda: controller.reports["b1"].state is State.SOAKING, "version 2 soaks")
        load.seen("2")
        victim = next(v for v in board.runtime.client.status().versions if v.version == "2")
        os.kill(victim.pid, signal.SIGKILL)
        assert controller.outcome("b1", assignment) is Outcome.FAILED_ROLLED_BACK
    assert load.failed == []
    assert "SIGKILL" in controller.reason("b1")
    assert served(board) == "1"


@pytest.mark.parametrize("state", [State.FETCHING, State.VERIFYING, State.ACCEPTING, State.SWAPPING, State.SOAKING])
def test_an_agent_that_is_killed_in_any_state_ends_where_it_should(
    controller: Controller, board: Board, state: State
) -> None:
    first, second = release(controller, "1"), release(controller, "2")
    controller.outcome("b1", controller.assign("b1", first, "1"))
    if state is State.FETCHING:
        controller.sender.stop()
    assignment = controller.assign("b1", second, "2", soak_s=2)
    journal = board.state / "journal.json"
    until(lambda: f'"state":"{state.value}"' in journal.read_text(), f"it is {state.value}")
    board.kill_agent()
    assert served(board) in ("1", "2")
    if state is State.FETCHING:
        from edgefleet_controller.transport.sender import BlobSender

        old = controller.sender
        controller.sender = BlobSender(
            controller.layout, controller.gateway.publish_chunk, lambda: 0, lambda d, b: True, controller.clock,
            bytes_per_s=100_000_000,
        )  # fmt: skip
        assert old.sent_chunks >= 0
        controller.sender.start()
    board.start_agent()
    assert controller.outcome("b1", assignment) is Outcome.SUCCEEDED
    assert served(board) == "2"


def test_a_second_agent_on_one_state_folder_is_refused(controller: Controller, board: Board, tmp_path: Path) -> None:
    import subprocess
    import sys

    until(lambda: "b1" in controller.reports, "the first one runs")
    second = subprocess.run(
        [sys.executable, "-m", "edgefleet_agent.cli", "run", "--state", str(board.state)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert second.returncode == 1
    assert "in use by fleet-agent, pid" in second.stderr
    assert board.agent is not None
    assert board.agent.poll() is None
