"""Requests that wait while versions come and go: each one is answered, and by the model that it asked for, or told why not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgefleet_shared.errors import EdgefleetError
from support import artifacts
from support.runtimes import Runtime, running, until

PICTURE = np.full((1, 8, 8, 3), 0.5, np.float32)
TOY, PINNED = "/v2/models/toy/infer", "/v2/models/toy/versions/{}/infer"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    made = ThreadPoolExecutor(16)
    yield made
    made.shutdown(wait=False, cancel_futures=True)


def asked(pool: ThreadPoolExecutor, runtime: Runtime, path: str, count: int = 1) -> list[Future[Any]]:
    return [pool.submit(runtime.infer, PICTURE, path) for _ in range(count)]


def waiting(runtime: Runtime, count: int) -> None:
    until(lambda: runtime.status().waiting >= count, what=f"{count} requests waiting")


def test_a_swap_to_another_model_gives_it_no_request_that_waited_for_the_one_before(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    runtime.install(runtime.add("1"))
    runtime.start()
    other = runtime.add("2", model="other")
    runtime.client.load(other)
    worker = runtime.version("1").pid
    os.kill(worker, signal.SIGSTOP)
    try:
        answers = asked(pool, runtime, TOY, 9)  # more than its slots
        waiting(runtime, 3)
        runtime.client.switch(other)
    finally:
        os.kill(worker, signal.SIGCONT)
    for answer in answers:
        status, told = answer.result(20)
        assert (status, told.get("model_name"), told.get("model_version")) == (200, "toy", "1")


def test_what_died_with_the_worker_of_the_model_before_is_not_given_to_another_model(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    runtime.install(runtime.add("1"))
    runtime.start()
    other = runtime.add("2", model="other")
    runtime.client.load(other)
    worker = runtime.version("1").pid
    os.kill(worker, signal.SIGSTOP)
    answers = asked(pool, runtime, TOY, 3)
    until(lambda: runtime.version("1").in_flight == 3, what="the requests being with the worker")
    runtime.client.switch(other)
    os.kill(worker, signal.SIGKILL)
    for answer in answers:
        status, told = answer.result(20)
        assert (status, told.get("model_name"), told.get("model_version")) == (200, "toy", "1")


def test_what_a_model_refuses_is_not_answered_by_another_model(runtime: Runtime) -> None:
    small = artifacts.make_contract(peak_memory_bytes=24 << 20)
    runtime.install(runtime.add("1"))
    runtime.start()
    other = runtime.add("2", model="other", behaviour="hungry", contract=small)
    runtime.client.load(other)
    runtime.client.switch(other)
    hungry = np.zeros((1, 8, 8, 3), np.float32)
    hungry[0, 0, 0, 0] = 1.0
    status, told = runtime.infer(hungry, "/v2/models/other/infer")
    assert status == 500, told


def test_an_in_place_swap_tells_whoever_waits_for_the_version_that_went(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    runtime.install(runtime.add("1"))
    runtime.start()
    new = runtime.add("2", content=artifacts.onnx_model(2, padding_bytes=60_000_000))
    runtime.client.load(new, "in-place")
    switching = pool.submit(runtime.client.switch, new)
    until(lambda: runtime.version("2").state == "starting", what="the swap under way")
    (answer,) = asked(pool, runtime, PINNED.format(1))
    waiting(runtime, 1)
    switching.result(30)
    status, told = answer.result(10)
    assert status == 404
    assert "not loaded any more" in told["error"]


def test_an_in_place_swap_that_fails_tells_whoever_waits_for_the_version_that_did_not_come(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    runtime.install(runtime.add("1"))
    runtime.start()
    bad = runtime.add("2", behaviour="crash")
    runtime.client.load(bad, "in-place")
    (answer,) = asked(pool, runtime, PINNED.format(2))
    waiting(runtime, 1)
    with pytest.raises(EdgefleetError, match="SIGFPE"):
        runtime.client.switch(bad)
    status, told = answer.result(10)
    assert status == 404
    assert "not loaded any more" in told["error"]


@pytest.mark.parametrize("mode", ["in-place", "blue-green"])
def test_whoever_waits_for_a_version_is_answered_though_it_is_loaded_once_more(
    runtime: Runtime, pool: ThreadPoolExecutor, mode: Any
) -> None:
    """As by an agent that was started again between loading and switching."""
    runtime.install(runtime.add("1"))
    runtime.start()
    new = runtime.add("2")
    runtime.client.load(new, "in-place")
    (answer,) = asked(pool, runtime, PINNED.format(2))
    waiting(runtime, 1)
    assert runtime.client.load(new, mode).mode == mode
    runtime.client.switch(new)
    status, told = answer.result(20)
    assert (status, told.get("model_version")) == (200, "2")


def test_whoever_waits_at_the_start_for_a_version_that_does_not_load_is_told(
    runtime: Runtime, pool: ThreadPoolExecutor
) -> None:
    good = runtime.add("1")
    content = artifacts.onnx_model(2, "crash", padding_bytes=60_000_000)
    bad = runtime.add("2", model="other", content=content)
    runtime.install(bad, previous=good)
    runtime.start(ready=False)
    answers = asked(pool, runtime, "/v2/models/other/versions/2/infer") + asked(pool, runtime, "/v2/models/other/infer")
    waiting(runtime, 2)
    for answer in answers:
        status, told = answer.result(20)
        assert status == 404, told
    assert runtime.infer(PICTURE)[1]["model_version"] == "1"


def test_a_version_whose_worker_is_coming_back_can_be_returned_to(runtime: Runtime) -> None:
    """As when the kernel, out of memory, killed both: the board must not say that it can't go back."""
    old = runtime.add("1", content=artifacts.onnx_model(1, padding_bytes=60_000_000))
    runtime.install(old)
    runtime.start()
    new = runtime.add("2")
    runtime.client.load(new)
    runtime.client.switch(new)
    os.kill(runtime.version("1").pid, signal.SIGKILL)
    until(lambda: runtime.version("1").state == "restarting", what="its end being noticed")
    runtime.client.load(old)
    runtime.client.switch(old)
    assert runtime.infer(PICTURE)[1]["model_version"] == "1"
