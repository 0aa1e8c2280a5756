"""What no agent leaves in its state folder, found there at a start: pipes, folders in place of files, links to themselves. The next model comes all the same."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgefleet_agent import slots
from edgefleet_shared.outcomes import Outcome
from support import artifacts
from support.broker import until
from support.controller import Board, Controller

NAME = "b1"
NAMES = (
    "journal.json",
    "slots.json",
    ".journal.json.tmp",
    "trust/floors-a.json",
    "metadata/timestamp.json",
    "spool/dropped.json",
    "spool/00900000-other.seg",
    "artifacts/plans.json",
    ".lock",
)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    made = Controller(tmp_path_factory.mktemp("controller"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def versions() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture
def take(controller: Controller, versions: Iterator[int]) -> Callable[[], Outcome]:
    """Have the board take another version."""

    def taken() -> Outcome:
        number = next(versions)
        made = artifacts.make_artifact(
            controller.layout, version=str(number), seed=number, device_class=controller.device_class
        )
        controller.release(made, "toy", str(number))
        return controller.outcome(NAME, controller.assign(NAME, made, str(number)))

    return taken


@pytest.fixture(scope="module")
def board(controller: Controller, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    made = Board(controller, NAME, tmp_path_factory.mktemp(NAME)).start()
    until(lambda: NAME in controller.reports, "the board reports", 60)
    yield made
    made.stop()


def clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def pipe(path: Path) -> None:
    clear(path)
    os.mkfifo(path)


def folder(path: Path) -> None:
    clear(path)
    path.mkdir()
    (path / "something").write_bytes(b"of somebody's")


def loop(path: Path) -> None:
    clear(path)
    path.symlink_to(path.name)


def start_anew(controller: Controller, board: Board, plant: Callable[[], None]) -> None:
    """Kill the agent, leave something where it lives, and start it again."""
    boot = controller.reports[NAME].boot
    board.kill_agent()
    plant()
    board.start_agent()
    until(lambda: controller.reports[NAME].boot != boot, "the agent is back", 40)


@pytest.mark.parametrize("kind", [pipe, folder, loop], ids=lambda kind: kind.__name__)
def test_what_is_no_file_where_one_belongs_keeps_nothing_from_the_board(controller, board, take, kind) -> None:
    assert take() is Outcome.SUCCEEDED, board.log()[-3000:]

    def plant() -> None:
        for name in NAMES:
            kind(board.state / name)

    start_anew(controller, board, plant)
    until(lambda: (board.state / "slots.json.damaged").exists(), "the slots are mended")
    assert take() is Outcome.SUCCEEDED, board.log()[-3000:]
    until(lambda: controller.reports[NAME].problem == "", "nothing is in the way")


def test_slots_that_are_no_file_are_named_again_from_what_the_journal_knows(controller, board, take) -> None:
    assert take() is Outcome.SUCCEEDED, board.log()[-3000:]
    served = slots.read(board.state).active
    start_anew(controller, board, lambda: folder(board.state / "slots.json"))
    until(lambda: slots.read(board.state).active == served, "the slots name what served")
