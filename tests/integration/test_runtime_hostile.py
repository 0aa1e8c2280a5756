"""Workers that lie or meddle, in a real runtime under real load: it costs them their process, and nobody a request."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from edgefleet_shared.errors import EngineError
from support import artifacts, hostile
from support.runtimes import Load, Runtime, running, until

TRIGGER = np.zeros((1, 8, 8, 3), np.float32)
TRIGGER[0, 0, 0, 0] = 1.0


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path / "state") as made:
        yield made


@pytest.fixture
def served(runtime: Runtime, tmp_path: Path) -> Callable[[hostile.Deed], str]:
    """Version 1, which is good, serves; version 2, which is not, is loaded beside it."""

    def serve(deed: hostile.Deed) -> str:
        runtime.install(runtime.add("1"))
        runtime.start(env=hostile.install(tmp_path / "engine"))
        bad = runtime.add("2", engine="hostile", contract=artifacts.make_contract(), content=hostile.model(2, deed))
        runtime.client.load(bad)
        return bad

    return serve


@pytest.mark.parametrize("deed", ["observe", "start"])
def test_a_worker_that_never_stops_talking_is_ended_and_holds_up_nobody(
    runtime: Runtime, served: Callable[[hostile.Deed], str], deed: hostile.Deed
) -> None:
    served(deed)
    with Load(runtime) as load, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(runtime.infer, TRIGGER, "/v2/models/toy/versions/2/infer")
        until(lambda: runtime.version("2").crashes, what="its end")
        load.seen("1")
        assert asked.result(30)[0] == 500  # it killed every worker that it was given to
    assert load.failed == []
    assert load.wrong == 0
    assert "makes no sense" in runtime.version("2").last_problem


@pytest.mark.parametrize(
    ("deed", "problem"),
    [("misplace", "was in slot"), ("misshape", "lies outside its slot"), ("mistime", "can't have computed")],
)
def test_a_worker_that_lies_about_its_answer_is_ended_and_the_standby_answers(
    runtime: Runtime, served: Callable[[hostile.Deed], str], deed: hostile.Deed, problem: str
) -> None:
    runtime.client.switch(served(deed))
    status, answer = runtime.infer(TRIGGER)
    assert (status, answer["model_version"]) == (200, "1")
    np.testing.assert_allclose(answer["outputs"][0]["data"], artifacts.truth(1, TRIGGER).ravel(), atol=1e-4)
    assert problem in runtime.version("2").last_problem
    assert runtime.get("/v2/models/stats")[0] == 200


def test_what_a_worker_prints_is_no_line_of_the_runtimes_log_and_fills_no_disk(
    runtime: Runtime, served: Callable[[hostile.Deed], str]
) -> None:
    served("print")
    with Load(runtime) as load:
        assert runtime.infer(TRIGGER, "/v2/models/toy/versions/2/infer")[0] == 500
        load.seen("1")
    assert load.failed == []
    log = (runtime.state / "runtime.log").read_bytes()
    lines = [json.loads(line) for line in log.splitlines()]
    assert "forged" not in {line["event"] for line in lines}
    assert len(log) < 300_000  # it printed more, three times
    ends = [line for line in lines if line["event"] == "worker_ended"]
    assert len(ends) == 3
    assert all(line["output"].endswith("its last words") for line in ends)


def test_why_a_model_could_not_be_loaded_is_told_in_the_words_of_its_engine(
    runtime: Runtime, served: Callable[[hostile.Deed], str]
) -> None:
    with pytest.raises(EngineError, match=r"killed by SIGABRT while loading the model: \W\[2Jno such device") as told:
        served("give up")
    assert "\x1b" not in told.value.message


def test_an_engine_that_says_too_much_is_heard_as_far_as_anybody_reads(
    runtime: Runtime, served: Callable[[hostile.Deed], str]
) -> None:
    served("complain")
    status, answer = runtime.infer(TRIGGER, "/v2/models/toy/versions/2/infer")
    assert (status, answer["error"].startswith("there is much that is wrong")) == (500, True)
    assert len(answer["error"]) < 5000
    assert runtime.version("2").crashes == 0
    longwinded = runtime.add(
        "3", engine="hostile", contract=artifacts.make_contract(), content=hostile.model(3, "refuse")
    )
    with pytest.raises(EngineError, match="there is much that is wrong") as told:
        runtime.client.load(longwinded)
    assert len(told.value.message) < 5000


def test_a_worker_holds_nothing_of_what_started_it(runtime: Runtime) -> None:
    """One that could read the spawner's bell would keep it from hearing that another has ended."""
    runtime.install(runtime.add("1"))
    runtime.start()
    runtime.client.load(runtime.add("2"))
    for version in ("1", "2"):
        folder = Path(f"/proc/{runtime.version(version).pid}/fd")
        held = sorted(os.readlink(folder / fd).partition(":")[0] for fd in os.listdir(folder) if int(fd) > 2)
        # Its channel, the memory that it shares with the front, and what its own confinement lets it read of the kernel.
        assert [name for name in held if not name.startswith("/proc/")] == ["/memfd", "/memfd", "socket"]


def test_requests_that_stand_behind_slow_ones_do_not_count_as_hanging(
    runtime: Runtime, served: Callable[[hostile.Deed], str]
) -> None:
    served("linger")
    path = "/v2/models/toy/versions/2/infer"
    with ThreadPoolExecutor(4) as pool:  # 3.2 s each: the last one is there for longer than one may be computed
        answers = list(pool.map(lambda _: runtime.infer(TRIGGER, path), range(4)))
    assert [status for status, _ in answers] == [200] * 4
    assert runtime.version("2").crashes == 0


def test_a_worker_that_hangs_up_and_stays_costs_nobody_an_answer(
    runtime: Runtime, served: Callable[[hostile.Deed], str]
) -> None:
    """Until it is killed it still looks as if it had room; whoever waits then is not given to it."""
    runtime.client.switch(served("hang up"))
    picture = np.full((1, 8, 8, 3), 0.5, np.float32)
    with ThreadPoolExecutor(16) as pool:
        asked = pool.submit(runtime.infer, TRIGGER)
        answers = []
        while not runtime.version("2").crashes:
            waiting = [pool.submit(runtime.infer, picture) for _ in range(8)]
            # Whenever another version is done with one, those that wait are looked after.
            assert runtime.infer(picture, "/v2/models/toy/versions/1/infer")[0] == 200
            answers += waiting
        assert {answer.result(20)[0] for answer in answers} == {200}
        assert asked.result(20)[0] == 200


def test_a_board_that_was_paused_takes_no_worker_for_a_hanging_one(runtime: Runtime) -> None:
    """As a paused container, or a machine that swaps: it would count as a crash, which a model is rolled back for."""
    runtime.install(runtime.add("1"))
    runtime.start()
    status = runtime.status()
    processes = [status.pid, status.versions[0].pid]
    with ThreadPoolExecutor(1) as pool:
        os.kill(processes[1], signal.SIGSTOP)
        asked = pool.submit(runtime.infer, TRIGGER)
        until(lambda: runtime.version("1").in_flight, what="it being computed")
        os.kill(processes[0], signal.SIGSTOP)
        time.sleep(10.5)  # longer than a worker may take
        os.kill(processes[0], signal.SIGCONT)
        woke_s = runtime.status().uptime_s
        until(lambda: runtime.status().uptime_s > woke_s + 0.6, what="a look at all workers")
        os.kill(processes[1], signal.SIGCONT)
        assert asked.result(20)[0] == 200
    assert runtime.version("1").crashes == 0


def test_a_worker_whose_memory_grows_is_relieved_before_a_request_has_to_wait_for_the_next_one(
    runtime: Runtime, tmp_path: Path
) -> None:
    """It loads for three seconds; killed at its limit, it kept all that came meanwhile waiting for so long."""
    contract = artifacts.make_contract(peak_memory_bytes=100 << 20)
    runtime.install(runtime.add("1", engine="hostile", contract=contract, content=hostile.model(1, "leak")))
    runtime.start(env=hostile.install(tmp_path / "engine"))
    limit = 2 * (100 << 20) + (64 << 20)  # and the memory that it shares with the front
    first = runtime.version("1").pid
    with Load(runtime) as load:
        while runtime.version("1").memory_bytes < 0.85 * limit:
            assert runtime.infer(TRIGGER)[0] == 200
        until(lambda: runtime.version("1").pid != first, 90, what="a fresh worker")
        load.seen("1")
    assert load.failed == []
    assert load.wrong == 0
    assert load.longest_s < hostile.LEAKER_LOADS_S / 2
    version = runtime.version("1")
    assert (version.crashes, version.retried) == (0, 0)
    assert version.memory_bytes < 0.5 * limit
    assert "was relieved" in version.last_problem
    until(lambda: not Path(f"/proc/{first}").exists(), what="the end of the one before")


def test_a_worker_that_says_it_is_ready_and_ends_while_nobody_listens_is_no_version_that_serves(
    runtime: Runtime, tmp_path: Path
) -> None:
    """Of both the front hears in one turn, after a busy second. It believed the first and forgot the second: nothing ever served again."""
    runtime.install(runtime.add("1"))
    runtime.start(env=hostile.install(tmp_path / "engine"))
    bad = runtime.add("2", engine="hostile", contract=artifacts.make_contract(), content=hostile.model(2, "leave"))
    front, worker = runtime.status().pid, Path(f"/proc/{runtime.version('1').pid}")
    siblings = Path(f"/proc/{parent_of(worker)}/task/{parent_of(worker)}/children")
    before = set(siblings.read_text().split())
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(runtime.client.load, bad)
        (pid,) = until(lambda: set(siblings.read_text().split()) - before, what="its worker")
        until(lambda: len(os.listdir(f"/proc/{pid}/task")) > 1, what="its library")
        os.kill(front, signal.SIGSTOP)
        try:
            until(lambda: pid not in siblings.read_text().split(), what="its end")
        finally:
            os.kill(front, signal.SIGCONT)
        with pytest.raises(EngineError, match="ended as soon as it was loaded"):
            loading.result(30)
    assert [v.version for v in runtime.status().versions] == ["1"]


def parent_of(process: Path) -> str:
    return next(line.split()[1] for line in (process / "status").read_text().splitlines() if line.startswith("PPid:"))
