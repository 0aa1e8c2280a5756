"""How a board's package changes what runs (``agent/debian/switch``), cut off before and after each of its steps."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SWITCH = Path(__file__).resolve().parents[2] / "agent/debian/switch"
STEPS = ("cp", "rm", "sync", "ln", "mv")
# Does what the program of its name does, and counts; at the step that was chosen the script is killed, before it or after it.
STEP = """#!/bin/sh
count=$(($(cat "$COUNTED") + 1))
echo $count > "$COUNTED"
if [ "$CUT_BEFORE" = $count ]; then kill -9 $PPID; exit 1; fi
/bin/{name} "$@"
answer=$?
if [ "$CUT_AFTER" = $count ]; then kill -9 $PPID; fi
exit $answer
"""


class Board:
    """Where the packages lie on it."""

    def __init__(self, folder: Path) -> None:
        self.home, self._steps, self._counted = folder / "edgefleet", folder / "steps", folder / "counted"
        (self.home / "in-use").mkdir(parents=True)
        shutil.copy(SWITCH, self.home)
        self._steps.mkdir()
        for name in STEPS:
            (self._steps / name).write_text(STEP.format(name=name))
            (self._steps / name).chmod(0o755)

    def unpack(self, version: str) -> None:
        """As dpkg does: each file is another one, then has the name of the one before."""
        site = self.home / "unpacked/agent/lib"
        site.mkdir(parents=True, exist_ok=True)
        for module in ("one.py", "two.py"):
            (site / "new").write_text(f"version = {version!r}\n")
            os.replace(site / "new", site / module)
        (self.home / "unpacked/agent/bin").mkdir(exist_ok=True)
        python = self.home / "unpacked/agent/bin/python"
        python.unlink(missing_ok=True)
        python.symlink_to(sys.executable)

    def switch(self, *arguments: str, before: int = 0, after: int = 0) -> tuple[int, int]:
        """Returns how it ended, and how many steps it took."""
        self._counted.write_text("0")
        environment = os.environ | {
            "PATH": f"{self._steps}:{os.environ['PATH']}", "COUNTED": str(self._counted),
            "CUT_BEFORE": str(before), "CUT_AFTER": str(after),
        }  # fmt: skip
        done = subprocess.run([self.home / "switch", *arguments], env=environment, timeout=60)
        return done.returncode, int(self._counted.read_text())

    def running(self) -> set[str]:
        """The versions that a program which starts now would be made of."""
        script = "import sys; sys.path.insert(0, 'lib'); import one, two; print(one.version, two.version)"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=self.home / "agent", capture_output=True, text=True, check=True
        )
        return set(done.stdout.split())

    def copies(self) -> list[str]:
        return sorted(path.name for path in (self.home / "in-use").iterdir())


@pytest.fixture
def board(tmp_path: Path) -> Board:
    made = Board(tmp_path)
    made.unpack("1")
    assert made.switch("agent")[0] == 0
    return made


def test_what_is_unpacked_changes_nothing_until_it_is_whole(board: Board) -> None:
    board.unpack("2")
    assert board.running() == {"1"}
    board.switch("agent")
    board.switch("--tidy")
    assert board.running() == {"2"}
    assert board.copies() == ["agent.2"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_cut_off_at_any_step_one_version_or_the_other_runs_and_a_second_try_comes_through(
    board: Board, when: str
) -> None:
    for version in itertools.count(2):
        board.unpack(str(version))
        ended, steps = board.switch("agent", **{when: version - 1})
        if ended == 0:
            assert steps < version - 1
            break
        assert len(board.running()) == 1
        assert board.running() <= {str(version - 1), str(version)}
        assert board.switch("agent")[0] == 0
        assert board.running() == {str(version)}
        board.switch("--tidy")
        assert len(board.copies()) == 1
    assert version > 5


def test_a_copy_that_runs_is_not_removed_under_it(board: Board) -> None:
    shutil.copy(shutil.which("sleep") or "", board.home / "unpacked/agent/bin/sleep")
    board.switch("agent")
    board.switch("--tidy")
    (first,) = board.copies()
    sleeper = subprocess.Popen([board.home / "agent/bin/sleep", "60"])
    try:
        board.switch("agent")
        board.switch("--tidy")
        assert len(board.copies()) == 2
    finally:
        sleeper.kill()
        sleeper.wait()
    board.switch("--tidy")
    assert first not in board.copies()


def test_a_copy_of_that_name_that_runs_elsewhere_keeps_nothing(board: Board, tmp_path: Path) -> None:
    """A container, or a second board in a folder of its own, whose copies have the same numbers."""
    elsewhere = tmp_path / "elsewhere/in-use/agent.1/sleep"
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(shutil.which("sleep") or "", elsewhere)
    sleeper = subprocess.Popen([elsewhere, "60"])
    try:
        board.switch("agent")
        board.switch("--tidy")
        assert board.copies() == ["agent.2"]
    finally:
        sleeper.kill()
        sleeper.wait()


def test_nothing_is_left_of_what_is_dropped(board: Board) -> None:
    board.switch("--drop", "agent")
    assert board.copies() == []
    assert not (board.home / "agent").is_symlink()
