"""A runtime that has run out of descriptors: what it can't do then it does later, and it is no worse off for having tried."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.runtimes import Runtime, running, until

X = np.random.default_rng(7).random((1, 8, 8, 3), np.float32)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        made.install(made.add("1"))
        yield made.start()


def limit(front: int, soft: int) -> None:
    resource.prlimit(front, resource.RLIMIT_NOFILE, (soft, 4096))


def naps(pid: int) -> int:
    """How often a process has gone to sleep by itself."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["voluntary_ctxt_switches"])


def test_a_worker_that_dies_while_no_descriptor_is_left_comes_back_when_there_are_some(runtime: Runtime) -> None:
    front, worker = runtime.client.ping().pid, runtime.version("1").pid
    limit(front, 4)  # every number below is taken
    os.kill(worker, signal.SIGKILL)
    log = runtime.state / "runtime.log"
    until(lambda: "worker_restart_failed" in log.read_text(), what="a start that fails")
    limit(front, 4096)
    until(lambda: runtime.version("1").state == "ready", what="the worker coming back")
    assert runtime.infer(X)[0] == 200


def test_its_clock_goes_on_when_descriptors_run_out(tmp_path: Path) -> None:
    """It ends requests that never come, workers that hang, and is what the service manager knows that it lives by."""
    name = f"\0edgefleet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, running(tmp_path) as runtime:
        manager.bind(name)
        manager.settimeout(10)
        runtime.install(runtime.add("1"))
        runtime.start(env={"NOTIFY_SOCKET": "@" + name[1:], "WATCHDOG_USEC": "1000000"})
        front = runtime.client.ping().pid
        limit(front, 4)
        manager.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                manager.recv(1024)  # what it said before
        before = naps(front)
        until(lambda: naps(front) > before + 8, what="it having looked at its worker meanwhile")
        limit(front, 4096)
        manager.settimeout(10)
        assert manager.recv(1024) == b"WATCHDOG=1"
        assert runtime.infer(X)[0] == 200


def test_it_takes_as_many_descriptors_as_it_may_have(tmp_path: Path) -> None:
    """Shells and containers begin with 1,024, which its clients alone may need."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with running(tmp_path) as runtime:
            runtime.start(ready=False)
            soft, hard = resource.prlimit(runtime.client.ping().pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert soft == hard == before[1]
