"""How long a process waited for a core: a sleeper hardly, one of several on a single core for much of the time, and no figure from nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from edgefleet_agent import run_queue

LOOK_S = 1.0
BUSY = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
ASLEEP = "import time\nprint(flush=True)\ntime.sleep(3600)"


@contextmanager
def running(program: str, count: int = 1) -> Iterator[str]:
    """So many processes of a program on one core; the pid of the first."""
    core = str(min(os.sched_getaffinity(0)))
    started = [subprocess.Popen([sys.executable, "-c", program, core], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield str(started[0].pid)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def share(process: str) -> float | None:
    before, began = run_queue.waits_s(process), time.monotonic()
    time.sleep(LOOK_S)  # what is measured is time
    return run_queue.longest_share(before, run_queue.waits_s(process), time.monotonic() - began)


def test_one_of_three_on_a_core_waits_for_most_of_the_time() -> None:
    with running(BUSY, 3) as process:
        found = share(process)
    assert found is not None
    assert 0.4 < found <= 1.0


def test_what_sleeps_waits_for_no_core() -> None:
    with running(ASLEEP) as process:
        found = share(process)
    assert found is not None
    assert found < 0.25


@pytest.mark.parametrize("content", [None, "", "0 0 0\n", "7 x 3\n"])
def test_a_kernel_that_does_not_tell_gives_no_figure(tmp_path: Path, content: str | None) -> None:
    task = tmp_path / "1/task/1"
    task.mkdir(parents=True)
    if content is not None:
        (task / "schedstat").write_text(content)
    assert run_queue.waits_s("1", tmp_path) == {}
    assert run_queue.longest_share({}, {}, 1.0) is None
    assert run_queue.waits_s("2", tmp_path) == {}


def test_the_thread_that_waited_most_counts_and_one_that_is_new_from_its_start() -> None:
    assert run_queue.longest_share({"1": 5.0, "2": 1.0}, {"1": 5.1, "2": 1.5, "3": 0.2}, 2.0) == 0.25
