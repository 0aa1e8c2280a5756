"""Hot swaps, crashes and restarts of a real runtime under real load: no request fails, no answer names the wrong version."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from edgefleet_agent.runtime import priority
from edgefleet_shared.errors import ArtifactError, ConflictError, EdgefleetError, EngineError, NotFoundError
from support import artifacts
from support.processes import assert_ends
from support.runtimes import Load, Runtime, running, until


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        yield made


def served(runtime: Runtime, version: str = "1") -> str:
    digest = runtime.add(version)
    runtime.install(digest)
    runtime.start()
    return digest


def clean(load: Load) -> None:
    assert load.failed == []
    assert load.wrong == 0


def test_many_hot_swaps_under_load_fail_no_request_and_mislabel_no_answer(runtime: Runtime) -> None:
    current = served(runtime)
    with Load(runtime) as load:
        for number in range(2, 7):
            new = runtime.add(str(number))
            assert runtime.client.load(new).mode == "blue-green"
            assert runtime.client.switch(new).previous == current
            load.seen(str(number))
            runtime.client.retire(current)
            current = new
    clean(load)
    assert {v.version for v in runtime.status().versions} == {"6"}
    assert set(load.answers) == {"1", "2", "3", "4", "5", "6"}
    assert runtime.status().failed == 0


def test_a_request_that_comes_while_the_model_is_loaded_at_the_start_waits(runtime: Runtime) -> None:
    digest = runtime.add("1", content=artifacts.onnx_model(1, padding_bytes=60_000_000))
    runtime.install(digest)
    runtime.start(ready=False)
    status, told = runtime.get("/v2/models/toy")
    assert (status, told["name"]) == (200, "toy")
    assert runtime.get("/v2/health/live")[0] == 200
    assert runtime.get("/v2/models/other")[0] == 404
    assert runtime.infer(np.zeros((1, 8, 8, 3), np.float32))[0] == 200
    assert runtime.get("/v2/health/ready")[0] == 200


def test_an_artifact_that_can_not_be_loaded_at_the_start_gives_way_to_the_one_before_it(runtime: Runtime) -> None:
    good, bad = runtime.add("1"), runtime.add("2", content=b"no model")
    runtime.install(bad, previous=good)
    runtime.start(ready=False)
    until(lambda: runtime.get("/v2/health/ready")[0] == 200, what="the previous one serves")
    assert runtime.infer(np.zeros((1, 8, 8, 3), np.float32))[1]["model_version"] == "1"


def test_after_the_switch_returned_no_request_is_answered_by_the_old_version(runtime: Runtime) -> None:
    served(runtime)
    new = runtime.add("2")
    with Load(runtime) as load:
        runtime.client.load(new)
        runtime.client.switch(new)
        for _ in range(20):
            assert runtime.infer(np.zeros((1, 8, 8, 3), np.float32))[1]["model_version"] == "2"
    clean(load)


def test_two_models_are_served_at_once_by_name_and_by_version(runtime: Runtime) -> None:
    served(runtime)
    other = runtime.add("2", model="other")
    runtime.client.load(other)
    x = np.full((1, 8, 8, 3), 0.5, np.float32)
    for path, name, version in (
        ("/v2/models/toy/infer", "toy", 1),
        ("/v2/models/other/infer", "other", 2),
        ("/v2/models/other/versions/2/infer", "other", 2),
    ):
        status, answer = runtime.infer(x, path)
        assert (status, answer["model_name"], answer["model_version"]) == (200, name, str(version))
        np.testing.assert_allclose(answer["outputs"][0]["data"], artifacts.truth(version, x).ravel(), atol=1e-4)
    assert runtime.infer(x, "/v2/models/other/versions/1/infer")[0] == 404
    with Load(
        runtime
    ) as load:  # a swap between models: whoever still asks for the old one is answered until it is retired
        runtime.client.switch(other)
        load.seen("1")
    clean(load)
    assert runtime.infer(x, "/v2/models/other/infer")[1]["model_version"] == "2"


def test_loading_does_not_change_what_serves(runtime: Runtime) -> None:
    old, new = served(runtime), runtime.add("2")
    runtime.client.load(new)
    status = runtime.status()
    assert status.serving == old
    assert runtime.infer(np.zeros((1, 8, 8, 3), np.float32))[1]["model_version"] == "1"
    assert (
        runtime.infer(np.zeros((1, 8, 8, 3), np.float32), "/v2/models/toy/versions/2/infer")[1]["model_version"] == "2"
    )


def test_a_killed_worker_fails_no_request_and_is_counted(runtime: Runtime) -> None:
    served(runtime)
    with Load(runtime) as load:
        for crash in range(1, 4):
            os.kill(runtime.version("1").pid, signal.SIGKILL)
            until(lambda crash=crash: runtime.version("1").crashes == crash, what="the crash being counted")
            until(lambda: runtime.version("1").state == "ready", what="the worker coming back")
            load.seen("1")
    clean(load)
    assert runtime.version("1").last_problem == "killed by SIGKILL"


def test_the_death_of_what_starts_workers_costs_no_request(runtime: Runtime) -> None:
    served(runtime)
    with Load(runtime) as load:
        for crash in (1, 2):
            worker = runtime.version("1").pid
            (spawner,) = children_of(runtime.client.ping().pid)
            assert children_of(spawner) == [worker]
            os.kill(spawner, signal.SIGKILL)
            until(lambda crash=crash: runtime.version("1").crashes == crash, what="the crash being counted")
            until(lambda: runtime.version("1").state == "ready", what="the worker coming back")
            load.seen("1")
        new = runtime.add("2")
        runtime.client.load(new)
        runtime.client.switch(new)
        load.seen("2")
    clean(load)


def test_a_worker_that_loads_stands_aside_for_what_serves_and_serves_in_the_first_row(runtime: Runtime) -> None:
    """Policy 5 is SCHED_IDLE, 0 the usual one (proc_pid_stat(5), field 41)."""
    served(runtime)
    serving = runtime.version("1").pid
    (spawner,) = children_of(runtime.client.ping().pid)
    everything = os.sched_getaffinity(0)
    new, policies, overlaps = runtime.add("2"), set(), []
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(runtime.client.load, new)
        while not loading.done():
            for pid in children_of(spawner):
                if pid != serving:
                    policies.add(policy_of(pid))
                    with suppress(ProcessLookupError):
                        overlaps.append(os.sched_getaffinity(pid) & os.sched_getaffinity(serving))
        loading.result()
    assert 5 in policies
    assert set() in overlaps or len(everything) == 1
    pid = runtime.version("2").pid
    assert {policy_of(thread) for thread in threads_of(pid)} == {0}
    assert policy_of(serving) == policy_of(spawner) == 0
    assert all(os.sched_getaffinity(thread) == everything for thread in threads_of(pid) + threads_of(serving))


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_an_engine_that_was_loaded_on_one_processor_is_not_tied_to_it(
    runtime: Runtime, engine: artifacts.EngineName
) -> None:
    served(runtime)
    new = runtime.add("2", engine=engine)
    runtime.client.load(new)
    runtime.client.switch(new)
    with Load(runtime) as load:
        load.seen("2", 20)
        pid = runtime.version("2").pid
        assert {frozenset(os.sched_getaffinity(thread)) for thread in threads_of(pid)} == {
            frozenset(os.sched_getaffinity(0))
        }
    assert load.failed == []


def test_a_candidate_that_dies_while_it_loads_leaves_its_processor_to_what_serves(runtime: Runtime) -> None:
    served(runtime)
    serving = runtime.version("1").pid
    with pytest.raises(EdgefleetError):
        runtime.client.load(runtime.add("2", behaviour="crash"))
    assert all(os.sched_getaffinity(thread) == os.sched_getaffinity(0) for thread in threads_of(serving))


def test_memory_does_not_grow_by_swaps(runtime: Runtime) -> None:
    """What a version that is gone leaves behind must not wait for the collector: that looks like a leak, megabytes in an hour of swaps."""
    current, other = served(runtime), runtime.add("2")

    def swaps(count: int) -> int:
        nonlocal current, other
        for _ in range(count):
            runtime.client.load(other)
            runtime.client.switch(other)
            runtime.client.retire(current)
            current, other = other, current
        return runtime.client.status().memory_bytes

    memory = [swaps(count) for count in (5, 7, 7, 7)]
    # What is needed once may come at any time; what is left behind comes with each.
    assert min(after - before for before, after in itertools.pairwise(memory)) < 64 * 1024


WITHOUT_RIGHTS = """
import os
os.setgid(65534)
os.setuid(65534)
from edgefleet_agent.runtime import priority
priority.step_back(os.getpid())
stood = os.sched_getscheduler(0)
priority.come_forward(os.getpid())
print(stood == os.SCHED_BATCH, os.sched_getscheduler(0) == os.SCHED_OTHER)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="giving rights up needs root")
def test_without_the_right_to_come_back_a_worker_stands_aside_only_as_far_as_it_can_return(tmp_path: Path) -> None:
    # The interpreter's own folders need not be readable for that user.
    early = "import contextlib, pathlib, resource, edgefleet_agent.runtime.priority\n" + WITHOUT_RIGHTS
    told = subprocess.run([sys.executable, "-c", early], capture_output=True, text=True, check=True, cwd=tmp_path.root)
    assert told.stdout.split() == ["True", "True"]


def test_a_worker_that_stands_aside_is_ended_first_when_the_board_is_out_of_memory() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        place = Path(f"/proc/{child.pid}/oom_score_adj")
        before = int(place.read_text())
        priority.step_back(child.pid)
        assert int(place.read_text()) == 1000
        priority.come_forward(child.pid)
        assert int(place.read_text()) == before
    finally:
        child.communicate(b"\n")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def threads_of(pid: int) -> list[int]:
    return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]


def policy_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[38])
    except OSError:
        return None


def test_when_a_new_versions_worker_dies_the_old_one_answers_at_once(runtime: Runtime) -> None:
    served(runtime)
    new = runtime.add("2")
    with Load(runtime) as load:
        runtime.client.load(new)
        runtime.client.switch(new)
        load.seen("2")
        before = load.answers["1"]
        os.kill(runtime.version("2").pid, signal.SIGKILL)
        until(lambda: load.answers["1"] > before, what="the standby answering")
        until(lambda: runtime.version("2").state == "ready", what="the new version coming back")
        load.seen("2")
    clean(load)


def test_a_picture_that_kills_the_new_version_is_answered_by_the_standby(runtime: Runtime) -> None:
    old, new = served(runtime), runtime.add("2", behaviour="poison")
    runtime.client.load(new)
    runtime.client.switch(new)
    poison = np.zeros((1, 8, 8, 3), np.float32)
    poison[0, 0, 0, 0] = 1.0
    status, answer = runtime.infer(poison)
    assert (status, answer["model_version"]) == (200, "1")
    assert runtime.version("2").crashes == 1
    assert runtime.version("2").last_problem == "killed by SIGFPE"
    runtime.client.switch(old)
    runtime.client.retire(new)
    assert [v.version for v in runtime.status().versions] == ["1"]


def test_a_picture_that_kills_every_worker_fails_alone_after_a_bound(runtime: Runtime) -> None:
    digest = runtime.add("1", behaviour="poison")
    runtime.install(digest)
    runtime.start()
    with Load(runtime) as load:
        poison = np.zeros((1, 8, 8, 3), np.float32)
        poison[0, 0, 0, 0] = 1.0
        status, answer = runtime.infer(poison)
        assert status == 500
        assert "died 3 times" in answer["error"]
        load.seen("1")
    clean(load)
    assert runtime.version("1").failed == 1


def hungry_picture() -> np.ndarray:
    picture = np.zeros((1, 8, 8, 3), np.float32)
    picture[0, 0, 0, 0] = 1.0
    return picture


SMALL = artifacts.make_contract(peak_memory_bytes=100 << 20)


def test_a_worker_that_outgrows_its_contract_is_killed_and_started_again_and_no_request_fails(runtime: Runtime) -> None:
    runtime.install(runtime.add("1", behaviour="hungry", contract=SMALL))
    runtime.start()
    with Load(runtime) as load:
        status, answer = runtime.infer(hungry_picture())
        # It may be killed before it answers or after; a picture that outgrows every worker fails alone.
        assert status == 200 or "outgrew" in answer["error"]
        until(lambda: runtime.version("1").crashes, what="the worker being killed")
        until(lambda: runtime.version("1").state == "ready", what="the worker coming back")
        load.seen("1")
    clean(load)
    assert "outgrew its" in runtime.version("1").last_problem
    # The same picture may have been given to the next worker too.
    until(lambda: 0 < runtime.version("1").memory_bytes < 200 << 20, what="a worker of the size that it may have")


def test_a_new_version_that_outgrows_its_contract_leaves_the_old_one_answering(runtime: Runtime) -> None:
    old, new = served(runtime), runtime.add("2", behaviour="hungry", contract=SMALL)
    with Load(runtime) as load:
        runtime.client.load(new)
        runtime.client.switch(new)
        load.seen("2")
        before = load.answers["1"]
        assert runtime.infer(hungry_picture())[0] == 200
        until(lambda: runtime.version("2").crashes, what="the worker being killed")
        until(lambda: load.answers["1"] > before, what="the standby answering")
        runtime.client.switch(old)
        runtime.client.retire(new)
        load.seen("1")
    clean(load)


def test_a_candidate_that_is_larger_than_its_contract_is_refused_and_the_old_one_serves_on(runtime: Runtime) -> None:
    served(runtime)
    tiny = artifacts.make_contract(peak_memory_bytes=1 << 20)
    large = runtime.add("2", contract=tiny, content=artifacts.onnx_model(2, padding_bytes=400 << 20))
    with Load(runtime) as load:
        with pytest.raises(EngineError, match="outgrew its"):
            runtime.client.load(large, "blue-green")
        load.seen("1")
    clean(load)
    assert [v.version for v in runtime.status().versions] == ["1"]


def test_memory_beyond_any_measure_is_refused_to_the_model_at_once(runtime: Runtime) -> None:
    tiny = artifacts.make_contract(peak_memory_bytes=24 << 20)
    runtime.install(runtime.add("1", behaviour="hungry", contract=tiny))
    runtime.start()
    with Load(runtime) as load:
        status, answer = runtime.infer(hungry_picture())
        assert status == 500
        assert answer["error"]
        load.seen("1")
    clean(load)


@pytest.mark.parametrize(("behaviour", "reason"), [("crash", "killed by SIGFPE"), ("corrupt", "can't load the model")])
def test_a_candidate_that_does_not_load_is_refused_with_the_reason_and_nothing_else_happens(
    runtime: Runtime, behaviour: artifacts.Behaviour, reason: str
) -> None:
    old, bad = served(runtime), runtime.add("2", behaviour=behaviour)
    with Load(runtime) as load:
        with pytest.raises(EngineError, match=reason):
            runtime.client.load(bad)
        load.seen("1")
    clean(load)
    status = runtime.status()
    assert status.serving == old
    assert [v.version for v in status.versions] == ["1"]
    with pytest.raises(NotFoundError):
        runtime.client.switch(bad)


def test_one_changed_byte_on_disk_is_refused_at_load(runtime: Runtime) -> None:
    served(runtime)
    new = runtime.add("2")
    model = runtime.layout.manifest(new).layers[0]
    path = runtime.layout.path(model.digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for mode in ("blue-green", "in-place"):
        with pytest.raises(ArtifactError, match="changed on disk"):
            runtime.client.load(new, mode)  # type: ignore[arg-type]
    assert runtime.infer(np.zeros((1, 8, 8, 3), np.float32))[0] == 200


def test_an_in_place_swap_parks_requests_and_fails_none(runtime: Runtime) -> None:
    old, new = served(runtime), runtime.add("2")
    with Load(runtime) as load:
        loaded = runtime.client.load(new, "in-place")
        assert loaded.mode == "in-place"
        assert runtime.status().serving == old
        switched = runtime.client.switch(new)
        assert switched.mode == "in-place"
        assert switched.parked_ms > 0
        load.seen("2")
    clean(load)
    assert [v.version for v in runtime.status().versions] == ["2"]


def test_an_in_place_swap_to_a_model_that_kills_its_worker_brings_the_old_one_back(runtime: Runtime) -> None:
    old, bad = served(runtime), runtime.add("2", behaviour="crash")
    with Load(runtime) as load:
        runtime.client.load(bad, "in-place")
        with pytest.raises(EngineError, match="SIGFPE"):
            runtime.client.switch(bad)
        load.seen("1")
    clean(load)
    assert runtime.status().serving == old
    assert [v.version for v in runtime.status().versions] == ["1"]


def test_the_device_class_chooses_the_swap_mode_unless_the_caller_does(runtime: Runtime) -> None:
    served(runtime)
    new = runtime.add("2", swap="in-place")
    assert runtime.client.load(new).mode == "in-place"
    runtime.client.retire(new)
    assert runtime.client.load(new, "blue-green").mode == "blue-green"


def test_a_model_that_does_not_fit_beside_the_old_one_is_swapped_in_place(runtime: Runtime) -> None:
    served(runtime)
    new = runtime.add("2", contract=artifacts.make_contract(peak_memory_bytes=1 << 50))
    loaded = runtime.client.load(new)
    assert loaded.mode == "in-place"
    assert "are needed" in loaded.why


def test_orders_may_be_repeated_by_an_agent_that_lost_its_place(runtime: Runtime) -> None:
    old, new = served(runtime), runtime.add("2")
    runtime.client.load(new)
    runtime.client.load(new)
    runtime.client.switch(new)
    assert runtime.client.switch(new).previous == new
    runtime.client.retire(old)
    runtime.client.retire(old)
    with pytest.raises(ConflictError, match="serving"):
        runtime.client.retire(new)


def test_the_runtime_serves_the_active_artifact_at_its_start_with_no_agent(runtime: Runtime) -> None:
    served(runtime, "3")
    assert runtime.stop(signal.SIGKILL) == -signal.SIGKILL
    runtime.start()
    x = np.full((1, 8, 8, 3), 0.5, np.float32)
    _, answer = runtime.infer(x)
    assert answer["model_version"] == "3"
    np.testing.assert_allclose(answer["outputs"][0]["data"], artifacts.truth(3, x).ravel(), atol=1e-4)


def test_the_previous_artifact_serves_when_the_active_one_does_not_load(runtime: Runtime) -> None:
    good, bad = runtime.add("1"), runtime.add("2", behaviour="crash")
    runtime.install(bad, previous=good)
    runtime.start()
    assert runtime.status().serving == good


def test_without_any_artifact_it_lives_but_is_not_ready_and_takes_the_first_one_later(runtime: Runtime) -> None:
    runtime.start(ready=False)
    assert runtime.get("/v2/health/live")[0] == 200
    assert runtime.get("/v2/health/ready")[0] == 503
    assert runtime.infer(np.zeros((1, 8, 8, 3), np.float32))[0] == 404
    digest = runtime.add("1")
    runtime.client.load(digest)
    runtime.client.switch(digest)
    assert runtime.get("/v2/health/ready")[0] == 200


def test_damaged_slots_leave_it_alive_and_waiting_for_the_agent(runtime: Runtime) -> None:
    (runtime.state / "slots.json").write_bytes(b'{"active": ')
    runtime.start(ready=False)
    assert runtime.status().serving is None


def test_a_worker_does_not_outlive_a_killed_runtime(runtime: Runtime) -> None:
    served(runtime)
    pid = runtime.version("1").pid
    runtime.stop(signal.SIGKILL)
    assert_ends(pid, "the worker")


def test_sigterm_answers_what_is_in_flight_and_ends_with_0(runtime: Runtime) -> None:
    served(runtime)
    assert runtime.stop() == 0


def test_a_second_runtime_on_the_same_state_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    served(runtime)
    second = Runtime(tmp_path)
    with pytest.raises(AssertionError, match="in use by fleet-runtime"):
        second.start()
    assert runtime.status().serving is not None


def test_the_control_socket_is_for_its_owner_alone_and_survives_rubbish(runtime: Runtime) -> None:
    served(runtime)
    path = runtime.state / "run" / "control.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    import socket

    from edgefleet_agent.runtime.control import short_path

    for rubbish in (
        b"\n",
        b"{}\n",
        b'{"op": "load"}\n',
        b'{"op":"load","manifest":"../../etc/passwd"}\n',
        b"\xff" * 5000 + b"\n",
    ):
        with socket.socket(socket.AF_UNIX) as link, short_path(path) as address:
            link.settimeout(10)
            link.connect(address)
            link.sendall(rubbish)
            reply = json.loads(link.makefile().readline())
            assert reply["op"] == "refused"
            assert reply["error"]["message"]
    with pytest.raises(EdgefleetError):
        runtime.client.load("sha256:" + "0" * 64)
    assert runtime.client.ping().pid > 0
