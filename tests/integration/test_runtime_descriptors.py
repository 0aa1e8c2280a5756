"""A runtime that has run out of descriptors: what it can't do then it does later, and it is no worse off for having tried."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
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


def test_a_worker_that_dies_while_no_descriptor_is_left_comes_back_when_there_are_some(runtime: Runtime) -> None:
    front, worker = runtime.client.ping().pid, runtime.version("1").pid
    limit(front, 4)  # every number below is taken
    os.kill(worker, signal.SIGKILL)
    log = runtime.state / "runtime.log"
    until(lambda: "worker_restart_failed" in log.read_text(), what="a start that fails")
    limit(front, 4096)
    until(lambda: runtime.version("1").state == "ready", what="the worker coming back")
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
