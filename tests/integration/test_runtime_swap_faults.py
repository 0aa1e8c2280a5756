"""Swaps to artifacts that nobody thought of, and orders that nobody should give: what serves must not feel them."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgefleet_agent.runtime.control import short_path, socket_path
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EdgefleetError
from support import artifacts
from support.runtimes import Load, Runtime, running, until

X = np.random.default_rng(7).random((2, 8, 8, 3), np.float32)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path / "board") as made:
        made.install(made.add("1"))
        yield made.start()


def unspeakable(runtime: Runtime) -> str:
    """An artifact whose config is longer than what the front can tell a worker in one piece."""
    return runtime.add("2", outputs=(TensorSpec("y" * 300_000, "FP32", (-1, artifacts.CLASSES)),))


def load_and_switch(runtime: Runtime, manifest: str, mode: Any) -> str:
    runtime.client.load(manifest, mode)
    return runtime.client.switch(manifest).mode


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("mode", ["blue-green", "in-place"])
def test_a_worker_that_can_not_be_told_what_to_load_costs_the_candidate_only(runtime: Runtime, mode: Any) -> None:
    bad = unspeakable(runtime)
    with Load(runtime) as load:
        with pytest.raises(EdgefleetError, match="could not be told"):
            load_and_switch(runtime, bad, mode)
        load.seen("1")
    assert (load.failed, load.wrong) == ([], 0)
    (spawner,) = children_of(runtime.client.ping().pid)
    until(lambda: children_of(spawner) == [runtime.version("1").pid], what="the worker that was never told being gone")
    good = runtime.add("3")
    assert load_and_switch(runtime, good, mode) == mode


def test_a_request_that_was_taken_is_answered_by_the_version_that_could_when_the_next_one_takes_other_inputs(
    runtime: Runtime,
) -> None:
    """It waits for a worker while the switch comes; the version before it stands by."""
    single = runtime.add(
        "2", content=artifacts.onnx_model(2, batch=1),
        inputs=(TensorSpec("x", "FP32", (1, 8, 8, 3)),), outputs=(TensorSpec("y", "FP32", (1, artifacts.CLASSES)),),
    )  # fmt: skip
    runtime.client.load(single)
    old = runtime.version("1").pid
    os.kill(old, signal.SIGSTOP)
    answers: list[tuple[int, Any]] = []
    asking = [threading.Thread(target=lambda: answers.append(runtime.infer(X))) for _ in range(12)]
    try:
        for thread in asking:
            thread.start()
        until(lambda: runtime.status().waiting > 0, what="requests waiting for a slot")
        runtime.client.switch(single)
    finally:
        os.kill(old, signal.SIGCONT)
    for thread in asking:
        thread.join(60)
    assert {status for status, _ in answers} == {200}
    assert {answer["model_version"] for _, answer in answers} == {"1"}
    status, refused = runtime.infer(np.zeros((1, 4, 4, 3), np.float32))  # what neither takes is told so by what serves
    assert (status, "toy 2 takes" in refused["error"]) == (400, True)


def test_a_version_that_was_compiled_again_has_time_series_of_its_own(runtime: Runtime) -> None:
    """Both artifacts bear one version; a series that is there twice costs a scrape its samples."""
    again = runtime.add("1", seed=2)
    runtime.client.load(again)
    assert runtime.infer(X)[0] == 200
    rows = [
        row.rpartition(" ")[0] for row in runtime.get("/metrics")[1].decode().splitlines() if not row.startswith("#")
    ]
    assert len(rows) == len(set(rows))
    counted = 'edgefleet_runtime_requests_total{model="toy",version="%s"}'
    assert {counted % "1", counted % f"1@{again.removeprefix('sha256:')[:12]}"} <= set(rows)
    assert runtime.get("/v2/models/toy")[1]["versions"] == ["1"]
    runtime.client.switch(again)
    np.testing.assert_allclose(
        np.array(runtime.infer(X)[1]["outputs"][0]["data"]).reshape(len(X), -1), artifacts.truth(2, X), atol=1e-4
    )


ABUSE = {
    "nothing": b"\n",
    "no JSON": b"\xff\xfe\n",
    "no order": b'{"op":"dance"}\n',
    "an order of another shape": b'{"op":"load","manifest":["a"]}\n',
    "a path for a digest": b'{"op":"load","manifest":"sha256:../../../etc/passwd"}\n',
    "a digest of nothing": b'{"op":"load","manifest":"sha256:' + b"0" * 64 + b'"}\n',
    "half a character": b'{"op":"load","manifest":"\\ud800"}\n',
    "a mode that is none": b'{"op":"load","manifest":"a","mode":"sideways"}\n',
    "a switch to nothing": b'{"op":"switch","manifest":""}\n',
    "a shadow of nothing": b'{"op":"shadow","manifest":""}\n',
    "a million brackets": b"[" * 1_000_000 + b"\n",
}


def test_an_order_that_is_none_is_refused_with_a_reason_and_the_next_one_carried_out(runtime: Runtime) -> None:
    with socket.socket(socket.AF_UNIX) as link, short_path(socket_path(runtime.state)) as address:
        link.settimeout(30)
        link.connect(address)
        with link.makefile("rb") as answers:
            for what, line in ABUSE.items():
                link.sendall(line)
                answer = json.loads(answers.readline())
                assert answer["op"] == "refused", what
                assert answer["error"]["message"], what
            link.sendall(b'{"op":"ping"}\n')
            assert json.loads(answers.readline())["op"] == "pong"
    assert runtime.infer(X)[0] == 200


def test_whoever_writes_a_line_without_end_or_reads_nothing_keeps_nobody_from_giving_orders(runtime: Runtime) -> None:
    with short_path(socket_path(runtime.state)) as address:
        endless, deaf = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        with endless, deaf:
            for link in (endless, deaf):
                link.connect(address)
                link.setblocking(False)
            for link, line in ((endless, b"x" * 4096), (deaf, b'{"op":"status"}\n' * 256)):
                try:
                    for _ in range(10_000):
                        link.send(line)
                except OSError:
                    pass  # full, or hung up on
            assert runtime.client.ping().pid == runtime.process.pid
            new = runtime.add("2")
            runtime.client.load(new)
            runtime.client.switch(new)
    assert runtime.infer(X)[1]["model_version"] == "2"
