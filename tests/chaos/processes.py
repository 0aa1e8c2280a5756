"""The real agent and the real runtime as processes, under a real broker: killed at random, on disks that refuse and that fill up.

The disk's errors come from strace's fault injection (every n-th call of one kind, in the agent alone), the full disk is a tmpfs.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgefleet_agent import slots, verify
from edgefleet_agent.slots import SlotStatus
from edgefleet_shared.artifact import Descriptor
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.outcomes import Outcome
from support import artifacts
from support.broker import until
from support.controller import Board, Controller

UPDATE_S = 3.0  # an update with a soak of a second takes about this long: the span in which a random kill falls
OUTCOME_S = 90.0
MODEL_BYTES = 2_000_000
# What the agent's own code asks of the kernel to change a file. Loading Python uses none of them.
CALLS = ("pwrite64", "fsync", "rename", "fchmod")
ERRORS = ("EIO", "ENOSPC", "EROFS")
TMPFS_BYTES = 40 << 20


def has_strace() -> bool:
    return shutil.which("strace") is not None


def may_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@dataclass
class Trial:
    """One board under a controller of its own, and what went wrong with it."""

    folder: Path
    faults: int = 0
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.controller = Controller(self.folder / "controller")
        self.releases = {version: self._release(version) for version in "123"}
        self._count = 0

    def close(self) -> None:
        self.controller.stop()

    def _release(self, version: str) -> Descriptor:
        content = artifacts.onnx_model(int(version), padding_bytes=MODEL_BYTES)
        made = artifacts.make_artifact(
            self.controller.layout, version=version, seed=int(version), content=content,
            device_class=self.controller.device_class,
        )  # fmt: skip
        self.controller.release(made, "toy", version)
        return made

    @contextlib.contextmanager
    def board(self) -> Iterator[Board]:
        """A fresh board that has taken version 1, on a small disk of its own where the machine lets one mount it."""
        self._count += 1
        name = f"b{self._count}"
        state = self.folder / name
        state.mkdir()
        with small_disk(state) if may_mount() else contextlib.nullcontext():
            board = Board(self.controller, name, state).start()
            try:
                assert self.controller.outcome(name, self.assign(board, "1")) is Outcome.SUCCEEDED, board.log()
                yield board
            finally:
                board.stop()

    def assign(self, board: Board, version: str) -> str:
        return self.controller.assign(board.name, self.releases[version], version)

    @contextlib.contextmanager
    def judged(self, what: str, board: Board) -> Iterator[None]:
        self.faults += 1
        try:
            yield
        except (AssertionError, EdgefleetError, OSError) as exc:
            self.failures.append(f"{what}: {type(exc).__name__}: {exc}; {board.log()[-600:]}")

    def await_word(self, board: Board, assignment: str) -> None:
        """Wait until the board tells how the assignment ended, or what is in the way."""

        def told() -> bool:
            report = self.controller.reports[board.name]
            return bool(report.problem) or (report.ended is not None and report.ended.assignment == assignment)

        until(told, "an outcome, or what is in the way, is told", OUTCOME_S)

    def settle(self, board: Board, assignment: str, version: str, before: str) -> None:
        """Wait for the outcome, hold it against what serves, and have the next assignment work.

        Raises:
            AssertionError: what is told and what is so differ.
        """
        told = self.controller.outcome(board.name, assignment, OUTCOME_S)
        serving = served(board)
        if told is Outcome.SUCCEEDED:
            assert serving == version, f"{told.value} was told and {serving} serves"
        else:
            assert told in (Outcome.FAILED_NO_CHANGE, Outcome.FAILED_ROLLED_BACK), told
            assert serving == before, f"{told.value} was told and {serving} serves"
            again = self.assign(board, version)
            assert self.controller.outcome(board.name, again, OUTCOME_S) is Outcome.SUCCEEDED
        check_disk(board)


def served(board: Board) -> str:
    status = board.runtime.client.status()
    return next((v.version for v in status.versions if v.serving), "")


def check_disk(board: Board) -> None:
    """What must hold at every instant: the slots name a model that is whole, by digest.

    Raises:
        AssertionError, EdgefleetError: it does not.
    """
    found = slots.read(board.state)
    assert found.serving is not None, "no slot names a model that may serve"
    layout = slots.artifacts(board.state)
    for slot in (found.active, found.previous):
        if slot is not None and slot.status is not SlotStatus.BAD:
            for blob in layout.manifest(slot.manifest).blobs():
                layout.check(blob)


def kill_at_random(trial: Trial, board: Board, times: int, seed: int) -> None:
    """kill -9 at a random moment of an update, twice in every third one; the agent that starts next must end it."""
    chance = random.Random(seed)
    for number in range(times):
        serving = served(board)
        version = chance.choice([v for v in trial.releases if v != serving])
        delays = [chance.uniform(0, UPDATE_S) for _ in range(2 if number % 3 == 2 else 1)]
        with trial.judged(f"kill {number} (seed {seed}) after {delays} s on the way to {version}", board):
            assignment = trial.assign(board, version)
            floor = 0
            for delay in delays:
                time.sleep(delay)
                board.kill_agent()
                assert served(board) in (serving, version)
                check_disk(board)
                reached = verify.read_floors(board.state).assignment_version
                assert reached >= floor, "the floor fell"
                floor = reached
                board.start_agent()
            trial.settle(board, assignment, version, serving)


def disks_that_refuse(trial: Trial, board: Board, cases: list[tuple[str, str, str]]) -> None:
    """Each case (system call, error, which of its calls, as strace's ``when`` has it) on the agent while it takes an update."""
    for call, error, when in cases:
        serving = served(board)
        version = "2" if serving != "2" else "3"
        with trial.judged(f"{call} ends with {error}, calls {when}", board):
            board.kill_agent(signal.SIGTERM)
            try:
                with traced(board, call, error, when) as pid:
                    assignment = trial.assign(board, version)
                    trial.await_word(board, assignment)
                    assert _agent_pid(board) == pid, "the agent was started again"
                    assert Path(f"/proc/{pid}").exists(), "the agent ended"
                    assert served(board) in (serving, version)
                    check_disk(board)
            finally:
                board.start_agent()  # the disk is mended
            trial.settle(board, assignment, version, serving)


def full_disks(trial: Trial, board: Board, free_bytes: list[int]) -> None:
    """On the board's small disk only so much is free when an update comes; then there is room again."""
    for free in free_bytes:
        serving = served(board)
        version = "2" if serving != "2" else "3"
        with trial.judged(f"{free} bytes are free", board):
            with filled(board.state, free):
                assignment = trial.assign(board, version)
                trial.await_word(board, assignment)
                assert board.agent is not None
                assert board.agent.poll() is None, "the agent ended"
                assert served(board) in (serving, version)
                check_disk(board)
            trial.settle(board, assignment, version, serving)


@contextlib.contextmanager
def traced(board: Board, call: str, error: str, when: str) -> Iterator[int]:
    """An agent whose system calls of one kind fail; its pid."""
    (board.state / ".lock").unlink()
    with (board.state / "agent.log").open("ab") as log:
        tracer = subprocess.Popen(
            ["strace", "-f", "-qqq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}",
             sys.executable, "-m", "edgefleet_agent.cli", "run", "--state", str(board.state)],
            stdout=log, stderr=log,
        )  # fmt: skip
    until(lambda: bool(_agent_pid(board)), "the traced agent runs", OUTCOME_S)
    pid = _agent_pid(board)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        tracer.wait(20)


def _agent_pid(board: Board) -> int:
    """The pid that the running agent wrote into its lock; 0 when there is none."""
    try:
        words = (board.state / ".lock").read_text().split()
    except FileNotFoundError:
        return 0
    return int(words[-1]) if words else 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs at ``folder``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filled(folder: Path, free_bytes: int) -> Iterator[None]:
    """A file that leaves only so much of the folder's file system free."""
    ballast = folder / "ballast"
    with ballast.open("wb") as stream:
        room = os.statvfs(folder)
        os.posix_fallocate(stream.fileno(), 0, max(1, room.f_bavail * room.f_frsize - free_bytes))
    try:
        yield
    finally:
        ballast.unlink()


def refusals(whens: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Every kind of call x every error x the calls that fail."""
    return [(call, error, when) for call in CALLS for error in ERRORS for when in whens]
