"""The process that a compile job runs in: killed, or left by whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from edgefleet_controller.compile.attempt import Attempt
from edgefleet_controller.compile.worker import JobRequest
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.work import Answer, Progress
from support.broker import until
from support.fleet import workers_of


@pytest.fixture
def request_of_nothing(tmp_path: Path) -> JobRequest:
    return JobRequest(
        layout=str(tmp_path), cache=str(tmp_path), cache_limit_bytes=1, version="sha256:" + "0" * 64, device_class="{}"
    )


def test_one_that_nobody_listens_to_any_more_ends_without_a_crash(request_of_nothing: JobRequest) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "edgefleet_controller.compile.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdout is not None
    worker.stdout.close()  # as when its job was cancelled
    worker.stdout = None
    _, said = worker.communicate(msgspec.json.encode(request_of_nothing) + b"\n", timeout=60)
    assert (worker.returncode, said) == (0, b"")


def test_one_whose_asker_died_before_it_asked_ends_without_a_crash() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "edgefleet_controller.compile.worker"],
        input=b'{"layout"',
        capture_output=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def test_one_that_the_kernel_killed_is_told_with_what_to_do(request_of_nothing: JobRequest) -> None:
    class Killer:
        """Kills the worker that it listens to."""

        def progress(self, step: Progress) -> None: ...

        def log(self, text: str) -> None:
            raise AssertionError("it was killed before")

        def measure(self, manifest: str) -> Answer:
            raise AssertionError("nobody measures here")

    with Attempt(request_of_nothing) as attempt:
        until(lambda: bool(workers_of(os.getpid())), "it has started")
        os.kill(*workers_of(os.getpid()), signal.SIGKILL)
        with pytest.raises(EnvironmentProblem, match="SIGKILL, as when this machine runs out of memory") as told:
            attempt.run(Killer())
    assert "compile_workers" in told.value.hint


def test_when_memory_ends_one_goes_before_who_asked_it(request_of_nothing: JobRequest) -> None:
    def adjustment(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    with Attempt(request_of_nothing):
        until(lambda: bool(workers_of(os.getpid())), "it has started")
        (worker,) = workers_of(os.getpid())
        until(lambda: adjustment(worker) > adjustment("self"), "the kernel being told to end it first")
