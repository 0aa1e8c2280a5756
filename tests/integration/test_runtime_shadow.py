"""A candidate that answers live requests unseen: real workers, real load."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from edgefleet_agent.runtime.control import VersionStatus
from edgefleet_shared.contract import ShadowFigures, TensorSpec
from edgefleet_shared.errors import ConflictError, NotFoundError
from edgefleet_shared.reading import BoxDecoding
from support import artifacts
from support.runtimes import Load, Runtime, UnixConnection, running, until


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        made.install(made.add("1"))
        made.start()
        yield made


def figures(runtime: Runtime) -> ShadowFigures:
    found = runtime.status().shadow
    assert found is not None
    return found


def compared(runtime: Runtime, count: int) -> ShadowFigures:
    until(lambda: figures(runtime).compared >= count, what=f"{count} requests are compared")
    return figures(runtime)


def test_a_build_of_the_same_network_agrees_and_no_client_sees_it(runtime: Runtime) -> None:
    twin = runtime.add("2", seed=1)
    runtime.client.load(twin)
    with Load(runtime) as load:
        runtime.client.shadow(twin)
        seen = compared(runtime, 30)
    assert load.failed == []
    assert set(load.answers) == {"1"}
    assert (seen.agreed, seen.failed) == (seen.compared, 0)
    assert seen.p50_ms is not None
    assert seen.p50_ms > 0
    assert seen.serving_p50_ms is not None


class Before(msgspec.Struct):
    """What counts were to versions of the agent that knew no detectors; one may be returned to, and meet this runtime."""

    compared: int
    agreed: int


def as_before(runtime: Runtime) -> Before:
    return msgspec.json.decode(msgspec.json.encode(figures(runtime)), type=Before)


def test_an_agent_of_before_can_read_what_is_counted(runtime: Runtime) -> None:
    twin = runtime.add("2", seed=1)
    runtime.client.load(twin)
    runtime.client.shadow(twin)
    assert runtime.infer(np.full((1, 8, 8, 3), 0.5, np.float32))[0] == 200
    compared(runtime, 1)
    assert as_before(runtime) == Before(compared=1, agreed=1)


def test_another_network_disagrees_and_what_serves_is_not_disturbed(runtime: Runtime) -> None:
    other = runtime.add("2", seed=77)
    runtime.client.load(other)
    with Load(runtime) as load:
        runtime.client.shadow(other)
        seen = compared(runtime, 30)
    assert load.failed == []
    assert load.wrong == 0
    assert seen.agreed < seen.compared


SEEN = np.array([[1, 1, 3, 3, 0.9, 0], [4, 4, 7, 7, 0.8, 2], [5, 1, 7, 2, 0.1, 0]], np.float32)


def detector(rows: np.ndarray) -> dict[str, Any]:
    """A network that sees ``rows`` in every picture."""
    told = BoxDecoding(decoder="end_to_end", threshold=0.5, nms_iou=0.45, match_iou=0.5)
    return {
        "content": artifacts.detector_model(rows), "statistics": None, "model": "detector",
        "contract": artifacts.make_contract(kind="detection", detection=told),
        "outputs": (TensorSpec("y", "FP32", (-1, *rows.shape)),),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "alike"), [(SEEN[[1, 0, 2]], 10), (SEEN * 1.01, 10), (SEEN[[0, 0, 2]], 5), (SEEN[[0, 2, 2]], 5), (SEEN[[2, 2, 2]], 0)],
    ids=["in another order", "nearly there", "one instead of the other", "one less", "blind"],
)  # fmt: skip
def test_a_detector_agrees_by_the_share_of_boxes_that_both_report(
    runtime: Runtime, rows: np.ndarray, alike: int
) -> None:
    serving, candidate = runtime.add("3", **detector(SEEN)), runtime.add("4", **detector(rows))
    for digest in (serving, candidate):
        runtime.client.load(digest)
    runtime.client.switch(serving)
    runtime.client.shadow(candidate)
    for count in range(1, 11):
        assert runtime.infer(np.full((1, 8, 8, 3), 0.5, np.float32), "/v2/models/detector/infer")[0] == 200
        compared(runtime, count)
    assert (figures(runtime).alike, figures(runtime).failed) == (alike, 0)
    assert as_before(runtime).agreed in (0, 10), "only what was alike as a whole counts there"


def test_a_candidate_whose_process_dies_costs_no_live_request(runtime: Runtime) -> None:
    twin = runtime.add("2", seed=1)
    runtime.client.load(twin)
    with Load(runtime) as load:
        runtime.client.shadow(twin)
        compared(runtime, 5)
        os.kill(runtime.version("2").pid, signal.SIGKILL)
        until(lambda: runtime.version("2").crashes == 1, what="its death is counted")
        before = figures(runtime).compared
        compared(runtime, before + 5)
    assert load.failed == []
    assert set(load.answers) == {"1"}


@pytest.mark.parametrize("name", ["1", "2"], ids=["of the same version", "of another version"])
def test_what_a_candidate_died_of_is_not_compared_with_anybody_elses_answer(runtime: Runtime, name: str) -> None:
    """Compiled again, a version has its name twice: then what serves would be compared with itself."""
    other = runtime.add(name, seed=77)
    runtime.client.load(other)
    runtime.client.shadow(other)

    def candidate() -> VersionStatus:
        return next(v for v in runtime.status().versions if v.manifest == other)

    worker = candidate().pid
    os.kill(worker, signal.SIGSTOP)
    assert runtime.infer(np.full((1, 8, 8, 3), 0.5, np.float32))[0] == 200
    until(lambda: candidate().in_flight, what="the candidate being asked")
    os.kill(worker, signal.SIGKILL)
    until(lambda: candidate().crashes and candidate().state == "ready", what="its return")
    until(lambda: figures(runtime).compared + figures(runtime).failed, what="the request being counted")
    assert (figures(runtime).compared, figures(runtime).failed) == (0, 1)


def test_switching_to_it_or_retiring_it_ends_the_shadow(runtime: Runtime) -> None:
    twin = runtime.add("2", seed=1)
    runtime.client.load(twin)
    runtime.client.shadow(twin)
    runtime.client.switch(twin)
    assert runtime.status().shadow is None
    third = runtime.add("3", seed=1)
    runtime.client.load(third)
    runtime.client.shadow(third)
    runtime.client.retire(third)
    assert runtime.status().shadow is None
    with Load(runtime) as load:
        load.seen("2")
    assert load.failed == []


def test_what_can_not_follow_is_refused(runtime: Runtime) -> None:
    with pytest.raises(NotFoundError):
        runtime.client.shadow("sha256:" + "0" * 64)
    with pytest.raises(ConflictError, match="it serves"):
        runtime.client.shadow(runtime.version("1").manifest)
    other = runtime.add("2", model="another")
    runtime.client.load(other)
    with pytest.raises(ConflictError, match="other tensors"):
        runtime.client.shadow(other)


def of_width(inputs: int, outputs: int) -> dict[str, Any]:
    """A network that takes and gives so many numbers."""
    return {
        "content": artifacts.wide_model(outputs, inputs), "statistics": None, "model": "wide",
        "contract": artifacts.make_contract(kind="raw", tolerance_abs=0.5),
        "inputs": (TensorSpec("x", "FP32", (-1, inputs)),), "outputs": (TensorSpec("y", "FP32", (-1, outputs)),),
    }  # fmt: skip


def followed(runtime: Runtime, network: dict[str, Any]) -> None:
    """Let one build of a network serve, and another follow it."""
    serving, candidate = runtime.add("3", **network), runtime.add("4", **network)
    for digest in (serving, candidate):
        runtime.client.load(digest)
    runtime.client.switch(serving)
    runtime.client.shadow(candidate)


def binary(rows: int, columns: int) -> tuple[bytes, dict[str, str]]:
    """An infer request's body and fields."""
    size = rows * columns * 4
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, columns], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + bytes(size), {"Inference-Header-Content-Length": str(len(head))}


def test_others_have_their_turn_while_answers_of_millions_of_numbers_are_compared(runtime: Runtime) -> None:
    followed(runtime, of_width(4, 5_000_000))
    asking = UnixConnection(runtime.state / "run" / "infer.sock")
    assert runtime.ask("POST", "/v2/models/wide/infer", *binary(1, 4))[0] == 200
    served = 0
    while not figures(runtime).compared:
        asking.request("GET", "/v2/health/live")
        asking.getresponse().read()
        served += 1
    asking.close()
    assert figures(runtime).agreed == 1
    assert served > 20


def test_a_request_that_there_is_no_memory_to_follow_is_answered_all_the_same(runtime: Runtime) -> None:
    followed(runtime, of_width(2_000_000, 4))
    pid = runtime.status().pid
    _, most = resource.prlimit(pid, resource.RLIMIT_AS)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    resource.prlimit(pid, resource.RLIMIT_AS, ((int(status["VmSize"].split()[0]) + 8192) * 1024, most))
    try:
        answer, _ = runtime.ask("POST", "/v2/models/wide/infer", *binary(4, 2_000_000))
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
    assert answer == 200
    assert figures(runtime).compared == 0
    assert runtime.ask("POST", "/v2/models/wide/infer", *binary(4, 2_000_000))[0] == 200
    assert compared(runtime, 1).agreed == 1
