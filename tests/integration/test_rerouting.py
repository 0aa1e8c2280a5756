"""A job that failed by its worker's own fault: who gets it next, what is told of it, and that a job's own fault is told at once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator

import pytest
from edgefleet_controller.compile import environments
from edgefleet_shared import enrolling, work_client
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import ConflictError, EnvironmentProblem, ModelError
from edgefleet_shared.work import CompileTask, MeasureTask, Progress
from edgefleet_shared.work_client import WorkClient
from edgefleet_shared.work_loop import Held
from support import workers
from support.artifacts import make_artifact
from support.broker import until
from support.fleet import Fleet, manifests, workers_of
from support.workers import CLASS, LEASE_S, Process, apply, ended, on_board, serve

FULL = EnvironmentProblem("the disk is full: /var can't be written", hint="make room")
UNTOLD = AcceptanceReport(verdict=Verdict.ERROR, reason="no memory left")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A controller that compiles nothing itself, with model toy."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    folder = manifests(made.folder / "manifests")
    try:
        serve(made)
        apply(made, CLASS)
        made.json("model", "add", "-f", str(folder / "model-1.yaml"))
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def alone(fleet: Fleet) -> Iterator[None]:
    """Each test has its workers, and its jobs, to itself."""
    yield
    for worker in fleet.client().workers():
        fleet.client().revoke_worker(worker["name"])
    for job in fleet.client().jobs(unfinished=True):
        fleet.client().cancel_job(job["id"])


@pytest.fixture
def started() -> Iterator[Callable[[Process], Process]]:
    with workers.starting() as start:
        yield start


def there(fleet: Fleet, name: str, device_class: str = "") -> WorkClient:
    """A worker that has asked for work, and got none."""
    client = workers.client(fleet, name, device_class)
    assert client.claim() is None
    return client


def submit(fleet: Fleet, device_class: str = "pc") -> str:
    return str(fleet.client().compile("toy", "1", device_class, despite_quality=False))


def take(client: WorkClient, job: str) -> str:
    task = client.claim()
    assert isinstance(task, CompileTask | MeasureTask)
    assert task.job == job
    return task.lease


def test_a_job_that_failed_by_its_workers_own_fault_is_anothers_also_after_a_restart(fleet):
    full, sound = there(fleet, "full"), there(fleet, "sound")
    job = submit(fleet)
    full.fail(take(full, job), FULL.as_dict())
    told = fleet.client().job(job)
    assert (told["state"], told["step"]) == ("queued", f"waiting for another worker; full: {FULL.message}")
    fleet.end(signal.SIGKILL)
    serve(fleet)
    assert full.claim() is None, "it failed there"
    lease = take(sound, job)
    shown = fleet.run("job", "show", job).stdout
    assert all(words in shown for words in ("full", FULL.message, FULL.hint, "sound")), shown
    sound.fail(lease, ModelError("node conv1: Foo is no operator that x86 has").as_dict())
    told = fleet.client().job(job)
    assert (told["state"], told["error"]["code"]) == ("failed", "bad_model"), "that is the job's own fault"


def test_a_job_that_failed_by_its_own_fault_is_tried_nowhere_else(fleet):
    first, _other = there(fleet, "first"), there(fleet, "other")
    job = submit(fleet)
    first.fail(take(first, job), ModelError("node conv1: Foo is no operator that x86 has").as_dict())
    told = fleet.client().job(job)
    assert (told["state"], told["attempts"], told["failures"]) == ("failed", 1, [])


def test_a_job_that_nobody_is_there_for_says_so_until_somebody_comes(fleet):
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    assert "no worker is there" in fleet.client().job(job)["step"]
    assert "no worker is there" in fleet.run("job", "list").stdout
    client = workers.client(fleet, "latecomer")
    task = client.claim()
    assert isinstance(task, CompileTask)
    assert fleet.client().job(job)["step"] == ""
    client.give_back(task.lease)
    assert fleet.client().job(job)["step"] == "", "there is one now"


def test_where_nobody_else_is_there_it_fails_at_once_with_what_the_worker_said(fleet):
    only = there(fleet, "only")
    job = submit(fleet)
    only.fail(take(only, job), FULL.as_dict())
    told = fleet.client().job(job)
    assert (told["state"], told["error"]) == ("failed", FULL.as_dict() | {"message": f"only: {FULL.message}"})


def test_where_the_others_go_away_meanwhile_the_job_does_not_wait_for_ever(fleet):
    stays, _leaves = there(fleet, "stays"), there(fleet, "leaves")
    job = submit(fleet)
    stays.fail(take(stays, job), FULL.as_dict())
    assert fleet.client().job(job)["state"] == "queued"
    fleet.client().revoke_worker("leaves")
    assert stays.claim() is None
    assert fleet.client().job(job)["state"] == "failed"


def test_a_job_that_three_machines_failed_at_is_given_up_with_the_words_of_each(fleet):
    clients = [there(fleet, f"full-{n}") for n in range(4)]
    job = submit(fleet)
    for client in clients[:3]:
        client.fail(take(client, job), FULL.as_dict())
    told = fleet.client().job(job)
    assert told["state"] == "failed"
    assert told["error"]["message"].startswith("3 workers failed at it: full-0: the disk is full")
    assert [f["worker"] for f in told["failures"]] == ["full-0", "full-1", "full-2"]
    listed = fleet.run("job", "list", "--all").stdout
    assert job in listed
    assert job not in fleet.run("job", "list").stdout


def test_a_worker_that_was_silent_is_given_its_job_again_where_it_is_the_only_one(fleet):
    only = there(fleet, "restarted")
    job = submit(fleet)
    take(only, job)
    until(lambda: only.claim() is not None, "its lease is over, and it has it again", LEASE_S + 10)
    assert fleet.client().job(job)["attempts"] == 2


def test_a_worker_that_was_silent_leaves_its_job_to_one_that_is_there(fleet):
    silent, other = there(fleet, "silent"), there(fleet, "awake")
    job = submit(fleet)
    take(silent, job)

    def lost() -> bool:
        assert silent.claim() is None
        return bool(fleet.client().job(job)["state"] == "queued")

    until(lost, "its lease is over", LEASE_S + 10)
    take(other, job)


@pytest.mark.parametrize("told", ["failed", "untold"])
def test_what_one_builder_board_could_not_measure_another_one_measures(fleet, told):
    kiosk = f"kiosk-{told}"
    apply(fleet, on_board(kiosk))
    full, sound = there(fleet, f"{kiosk}-full", kiosk), there(fleet, f"{kiosk}-sound", kiosk)
    compiler = workers.client(fleet, f"compiles-{told}")
    with Held(compiler, take(compiler, submit(fleet, kiosk)), LEASE_S) as held:
        candidate = make_artifact(Layout(fleet.home / "artifacts"), device_class=kiosk).digest
        wished = compiler.wish(held.lease, candidate)
        lease = take(full, wished)
        if told == "failed":
            full.fail(lease, FULL.as_dict())
        else:
            full.finish(lease, UNTOLD)
        assert full.claim() is None
        assert compiler.answer(held.lease, wished).state == "waiting"
        sound.finish(take(sound, wished), AcceptanceReport(verdict=Verdict.PASSED))
        answer = compiler.answer(held.lease, wished)
        assert (answer.state, answer.by) == ("measured", sound_name := f"{kiosk}-sound")
        again = compiler.wish(held.lease, candidate)
        full.fail(take(full, again), FULL.as_dict())
        sound.finish(take(sound, again), UNTOLD)
        answer = compiler.answer(held.lease, again)
        assert (answer.report, answer.by) == (UNTOLD, sound_name), "nobody else is there: as the last one says"


def test_a_worker_whose_toolchain_is_broken_leaves_the_job_to_another_machine(fleet, started):
    broken = started(workers.worker(fleet, "broken"))
    toolchains = fleet.folder / "broken-cache/toolchains"
    toolchains.unlink()  # a link to those that are installed here
    folder = environments.folder_of(toolchains, environments.lock_named("onnxruntime"))
    folder.mkdir(parents=True)
    (folder / environments.MARKER).write_text(json.dumps({"onnxruntime": "0"}))
    busy = there(fleet, "busy")

    def failed() -> bool:
        with pytest.raises(ConflictError):
            busy.progress("0" * 32, Progress("with other work", 0, 1))  # it is heard of
        return "job failed" in broken.log()

    job = submit(fleet)
    until(failed, "it has failed there", 120)
    started(workers.worker(fleet, "whole"))
    done = ended(fleet, job)
    assert (done["state"], done["worker"]) == ("done", "whole"), done
    assert [(f["worker"], f["error"]["code"]) for f in done["failures"]] == [("broken", "toolchain_unusable")]


def test_a_job_whose_process_was_killed_is_anothers(fleet, started):
    starved = started(workers.worker(fleet, "starved"))
    job = submit(fleet)
    until(lambda: bool(workers_of(starved.process.pid)), "it has begun", 150)
    (process,) = workers_of(starved.process.pid)
    os.kill(process, signal.SIGSTOP)  # it must not end by itself meanwhile
    started(workers.worker(fleet, "roomy"))
    os.kill(process, signal.SIGKILL)
    done = ended(fleet, job)
    assert (done["state"], done["worker"]) == ("done", "roomy"), done
    assert [(f["worker"], "SIGKILL" in f["error"]["message"]) for f in done["failures"]] == [("starved", True)]


# ------------------------------------------------------------------------------------------------------ another version


def test_a_worker_of_another_version_is_refused_before_its_token_is_spent(fleet, monkeypatch):
    token = fleet.client().token("", device="older", role="worker")
    url = f"https://127.0.0.1:{fleet.api_port}"
    with monkeypatch.context() as older:
        older.setattr(enrolling, "__version__", "0.0.9")
        with pytest.raises(
            ConflictError, match=r"runs edgefleet 0\.0\.9, the controller .*install edgefleet-controller"
        ):
            enrolling.ask(url, token, "", lambda: enrolling.new_key()[0])
    enrolled, _ = enrolling.ask(url, token, "", lambda: enrolling.new_key()[0])
    assert enrolled.device == "older"


def test_a_worker_that_stayed_behind_gets_no_work_and_the_list_says_so(fleet, monkeypatch):
    behind = there(fleet, "behind")
    job = submit(fleet)
    with monkeypatch.context() as older:
        older.setattr(work_client, "__version__", "0.0.9")
        with pytest.raises(ConflictError, match=r"worker behind runs edgefleet 0\.0\.9"):
            behind.claim()
    assert "0.0.9: not the controller's, gets no work" in fleet.run("worker", "list").stdout
    take(behind, job)


def test_a_builder_board_of_another_version_measures(fleet, monkeypatch):
    apply(fleet, on_board("old-agent"))
    monkeypatch.setattr(work_client, "__version__", "0.0.9")
    assert workers.client(fleet, "old-agent-1", "old-agent").claim() is None
