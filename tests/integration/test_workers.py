"""Compile workers on other machines and builder boards: real processes over the real protocol, and workers that die, come late or lie."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edgefleet_controller import model_version
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult, Share
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.manifests.files import parse_value
from edgefleet_shared import artifact, golden
from edgefleet_shared.artifact import GOLDEN_LAYER, Layout, digest_of
from edgefleet_shared.contract import AcceptanceContract, AcceptanceFigures, AcceptanceReport, Verdict, judge
from edgefleet_shared.errors import ConflictError, EdgefleetError, InputError, NotFoundError, QualityError, TrustError
from edgefleet_shared.work import CompileTask, Progress
from edgefleet_shared.work_client import WorkClient
from edgefleet_shared.work_loop import Held
from support import workers
from support.broker import until
from support.fleet import FLEET, Fleet, device_class, manifests, workers_of
from support.workers import CLASS, LEASE_S, Process, apply, ended, on_board, serve


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A controller that compiles nothing itself, with model toy in three versions."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    folder = manifests(made.folder / "manifests")
    try:
        serve(made)
        apply(made, CLASS)
        for version in ("1", "2", "3"):
            made.json("model", "add", "-f", str(folder / f"model-{version}.yaml"))
        yield made
    finally:
        made.close()


@pytest.fixture
def started(fleet: Fleet) -> Iterator[Callable[[Process], Process]]:
    with workers.starting() as start:
        yield start


def claimed(client: WorkClient, job: str) -> CompileTask:
    """The task of a job, claimed by hand."""
    found: list[CompileTask] = []

    def claim() -> bool:
        task = client.claim()
        if task is not None:
            assert isinstance(task, CompileTask)
            found.append(task)
        return bool(found)

    until(claim, "there is a task", 20)
    assert found[0].job == job
    return found[0]


def settle(fleet: Fleet, job: str) -> None:
    """Leave no job to the next test."""
    if fleet.client().job(job)["state"] in ("queued", "running"):
        fleet.client().cancel_job(job)


# -------------------------------------------------------------------------------------------------------- compiling elsewhere


def test_a_worker_on_another_machine_makes_the_digest_that_is_made_here(fleet, started, tmp_path):
    started(workers.worker(fleet, "far"))
    other = fleet.folder / "far-cache" / "logs" / "toy-1-pc-big-compile.log"
    other.parent.mkdir()
    other.write_text("of a class whose name begins like this one's")
    os.utime(other, (time.time() + 3600, time.time() + 3600))
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    done = ended(fleet, job)
    assert done["state"] == "done", done
    (shown,) = fleet.client().models("toy", "1")
    (made,) = shown["artifacts"]
    assert made["quality"]["agreement"] == 1.0
    layout = Layout(fleet.home / "artifacts")
    for blob in layout.manifest(done["manifest"]).blobs():
        layout.check(blob)
    here = compiled(layout, "1", fleet, workers.own_cache(tmp_path / "cache"))
    assert here.artifact.digest == done["manifest"]
    logged = fleet.run("model", "log", "toy", "1", "pc").stdout
    assert all(f"== {step}\n" in logged for step in ("prepare", "measure")), logged
    assert "of a class" not in logged
    assert fleet.run("model", "log", "toy", "3", "pc").returncode == 2, "never compiled"
    assert [w["name"] for w in fleet.json("worker", "list") if w["last_seen"]] == ["far"]


def test_a_compile_elsewhere_that_ships_nothing_leaves_its_report_here(fleet, started, tmp_path):
    budgets = CLASS["spec"]["budgets"] | {"size_bytes": 10}
    apply(fleet, device_class("pc-tiny", precision="int8", search={"effort": "fixed"}, budgets=budgets))
    started(workers.worker(fleet, "far-off"))
    job = fleet.client().compile("toy", "1", "pc-tiny", despite_quality=False)
    done = ended(fleet, job)
    assert done["state"] == "failed", done
    assert "fleet model report toy 1 pc-tiny" in done["error"]["hint"]
    told = fleet.json("model", "report", "toy", "1", "pc-tiny")
    assert told["shipped"] is False
    assert all(any("budget 10" in miss for miss in one["misses"]) for one in told["candidates"])
    page = tmp_path / "why.html"
    fleet.run("model", "report", "toy", "1", "pc-tiny", "-o", str(page))
    assert "nothing is shipped" in page.read_text()


@pytest.mark.parametrize("digest", ["sha256:" + "0" * 64, "../../keys"])
def test_a_report_that_a_worker_names_and_did_not_send_is_not_told_of(fleet, digest):
    client = workers.client(fleet, "talker" + digest[-1])
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    task = claimed(client, job)
    client.fail(task.lease, QualityError("too large", report=digest, page=digest).as_dict())
    assert ended(fleet, job)["error"].keys() == {"code", "message", "hint"}


def compiled(layout: Layout, version: str, fleet: Fleet, cache: Path) -> CompileResult:
    """The same compile, in this process."""
    (shown,) = fleet.client().models("toy", version)
    manifest = parse_value(CLASS)
    assert isinstance(manifest, DeviceClass)
    asked = model_version.decode(layout.read(shown["digest"], 1 << 24))
    return compile_version(asked, manifest, layout, Toolchains(cache), cache=cache)


def test_a_job_whose_worker_was_killed_is_done_by_the_next(fleet, started):
    first = started(workers.worker(fleet, "mortal"))
    job = fleet.client().compile("toy", "2", "pc", despite_quality=False)
    until(lambda: bool(workers_of(first.process.pid)), "the worker has begun", 150)
    first.end(signal.SIGKILL)
    second = started(workers.worker(fleet, "heir"))
    done = ended(fleet, job)
    assert done["state"] == "done", (done, second.log())
    assert (done["worker"], done["attempts"]) == ("heir", 2)


def test_a_worker_that_is_told_to_stop_gives_its_job_back_at_once(fleet, started):
    far = started(workers.worker(fleet, "tidy"))
    job = fleet.client().compile("toy", "2", "pc", despite_quality=False)
    until(lambda: bool(workers_of(far.process.pid)), "the worker has begun", 150)
    assert far.end(signal.SIGTERM) == 0
    told = fleet.client().job(job)
    assert (told["state"], told["attempts"], told["worker"]) == ("queued", 0, "")
    settle(fleet, job)


def test_a_controller_that_was_killed_gets_the_result_of_a_worker_that_went_on(fleet, started):
    far = started(workers.worker(fleet, "patient"))
    job = fleet.client().compile("toy", "3", "pc", despite_quality=False)
    until(lambda: bool(workers_of(far.process.pid)), "the worker has begun", 150)
    fleet.end(signal.SIGKILL)
    serve(fleet)
    done = ended(fleet, job)
    assert done["state"] == "done", (done, far.log())


def test_the_command_that_waits_for_a_compile_waits_for_a_controller_that_starts_again(fleet, started):
    command = [*FLEET, "model", "compile", "toy", "2", "--class", "pc", "--json"]
    waiting = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"EDGEFLEET_HOME": str(fleet.home)},
    )  # fmt: skip
    until(lambda: bool(fleet.client().models("toy", "2")[0]["compiling"]), "it has asked", 30)
    fleet.end(signal.SIGKILL)
    serve(fleet)
    started(workers.worker(fleet, "after"))
    told, said = waiting.communicate(timeout=150)
    assert waiting.returncode == 0, said
    assert [a["state"] for a in json.loads(told)["artifacts"]] == ["signed"]


def test_a_cancelled_job_ends_the_process_on_the_other_machine(fleet, started):
    far = started(workers.worker(fleet, "obedient"))
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    until(lambda: bool(workers_of(far.process.pid)), "the worker has begun", 150)
    fleet.client().cancel_job(job)
    until(lambda: not workers_of(far.process.pid), "its process has ended", 150)
    assert fleet.client().job(job)["state"] == "cancelled"
    assert far.process.poll() is None, "it goes on with other work"


# ------------------------------------------------------------------------------------------------------ leases and identities


def test_what_comes_after_the_lease_has_ended_is_refused_and_only_the_next_is_heard(fleet):
    late, next_one = workers.client(fleet, "late"), workers.client(fleet, "next")
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    lost = claimed(late, job)
    assert next_one.claim() is None, "nobody else gets it meanwhile"
    task = claimed(next_one, job)
    for call in (
        lambda: late.progress(lost.lease, Progress("still at it", 1, 2)),
        lambda: late.fail(lost.lease, InputError("too hard").as_dict()),
        lambda: late.wish(lost.lease, "sha256:" + "0" * 64),
    ):
        with pytest.raises((ConflictError, NotFoundError)):
            call()
    with pytest.raises(TrustError, match="another worker's"):
        late.progress(task.lease, Progress("mine", 1, 2))
    assert next_one.progress(task.lease, Progress("mine", 1, 2)) is True
    settle(fleet, job)
    assert next_one.progress(task.lease, Progress("mine", 2, 2)) is False, "it was cancelled"


def test_a_job_that_ends_its_workers_fails_after_three(fleet):
    clients = [workers.client(fleet, f"fragile-{n}") for n in range(3)]
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    for client in clients:
        claimed(client, job)
    until(lambda: client.claim() is None and fleet.client().job(job)["state"] == "failed", "it is given up", 30)
    assert "3 workers failed at it" in fleet.client().job(job)["error"]["message"]


def test_work_is_for_workers_alone_and_a_revoked_one_is_none(fleet):
    board = fleet.board("no-worker")
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    for credentials in ({}, {"operator": True}, {"certificate": board.certificate}):
        with fleet.http(**credentials) as http:
            answer = http.post("/v1/work/claim")
            assert (answer.status_code, answer.json()["code"]) == (403, "untrusted")
    revoked = workers.client(fleet, "revoked")
    task = claimed(revoked, job)
    fleet.run("worker", "revoke", "revoked")
    for call in (revoked.claim, lambda: revoked.progress(task.lease, Progress("on", 1, 2))):
        with pytest.raises(TrustError, match="no worker of this fleet"):
            call()
    settle(fleet, job)


def test_a_worker_that_was_revoked_ends_and_says_why(fleet, started):
    far = started(workers.worker(fleet, "unwanted"))
    fleet.run("worker", "revoke", "unwanted")
    assert far.process.wait(30) == 1
    assert "unwanted is no worker of this fleet" in far.log()


def test_a_job_whose_blobs_are_gone_fails_and_keeps_no_other_from_being_done(fleet):
    client = workers.client(fleet, "behind")
    fleet.json("model", "add", "-f", str(fleet.folder / "manifests/model-1.yaml"), "--version", "gone")
    (shown,) = fleet.client().models("toy", "gone")
    lost = fleet.client().compile("toy", "gone", "pc", despite_quality=False)
    good = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    Layout(fleet.home / "artifacts").remove(shown["digest"])
    claimed(client, good)
    assert fleet.client().job(lost)["state"] == "failed"
    assert shown["digest"] in fleet.client().job(lost)["error"]["message"]
    settle(fleet, good)


def test_a_worker_reads_the_blobs_of_its_task_alone_and_a_board_none_of_them(fleet, tmp_path):
    client = workers.client(fleet, "curious")
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    task = claimed(client, job)
    layout = Layout(tmp_path / "layout")
    for digest in task.blobs:
        client.fetch(task.lease, digest, layout)
        assert digest_of(layout.path(digest).read_bytes()) == digest
    spoilt = layout.path(task.blobs[-1])
    spoilt.write_bytes(b"what a bad disk made of it")
    client.fetch(task.lease, task.blobs[-1], layout)
    assert digest_of(spoilt.read_bytes()) == task.blobs[-1], "what is not whole is fetched again"
    (other,) = fleet.client().models("toy", "2")
    with pytest.raises(NotFoundError, match="in this task"):
        client.fetch(task.lease, other["digest"], layout)
    with fleet.http(certificate=fleet.board("nosy").certificate) as http:
        assert http.get(f"/v1/work/{task.lease}/blobs/{task.blobs[0]}").status_code == 403
    settle(fleet, job)


# ------------------------------------------------------------------------------------------------------------------ lies


class Lie:
    """A true result that a test may bend before it is handed in."""

    def __init__(self, layout: Layout, result: CompileResult) -> None:
        self.layout, self.result = layout, result
        self.blobs = [b.digest for b in layout.manifest(result.artifact.digest).blobs()]
        self.left_out: str = ""

    def rebuilt(self, config: Any = None, **layers: bytes) -> None:
        """Pack the artifact anew, with another config or other layers (by media type)."""
        manifest = self.layout.manifest(self.result.artifact.digest)
        content = [(b.media_type, layers.get(b.media_type, self.layout.path(b.digest))) for b in manifest.layers]
        made = artifact.build(self.layout, config or self.layout.config(manifest), content)
        self.result = msgspec.structs.replace(self.result, artifact=made)
        self.blobs = [b.digest for b in self.layout.manifest(made.digest).blobs()]


def looser_contract(lie: Lie) -> str:
    config = lie.layout.config(lie.layout.manifest(lie.result.artifact.digest))
    contract = msgspec.structs.replace(config.contract, min_agreement=0.01, latency_p95_ms=1e9)
    lie.rebuilt(msgspec.structs.replace(config, contract=contract))
    return "contract is not what the manifests ask for"


def another_class(lie: Lie) -> str:
    lie.result = msgspec.structs.replace(lie.result, device_class="tv")
    return "not what was asked"


def easier_pictures(lie: Lie) -> str:
    blob = lie.layout.manifest(lie.result.artifact.digest).layer(GOLDEN_LAYER)
    inputs, references = golden.unpack(lie.layout.path(blob.digest).read_bytes(), None)
    lie.rebuilt(**{GOLDEN_LAYER: golden.pack({k: v * 0 for k, v in inputs.items()}, references)})
    return "golden pictures are not the version's"


def better_figures(lie: Lie) -> str:
    figures = msgspec.structs.replace(lie.result.figures, sqnr_db=99.0, compiled_bytes=1)
    lie.result = msgspec.structs.replace(lie.result, figures=figures)
    return "figures are not the artifact's: sqnr_db, compiled_bytes"


def passed_although_it_failed(lie: Lie) -> str:
    figures = msgspec.structs.replace(lie.result.figures, agreement=0.2)
    lie.result = msgspec.structs.replace(lie.result, figures=figures)
    return "that was not to be shipped"


def lost_label(lie: Lie) -> str:
    lost = {"cup": Share(value=0.1, low=0.0, high=1.0, count=1, of=10)}
    lie.result = msgspec.structs.replace(lie.result, figures=msgspec.structs.replace(lie.result.figures, by_label=lost))
    return "'cup' 0.100 of 10, budget 0.500 for each: that was not to be shipped"


def missing_bytes(lie: Lie) -> str:
    lie.left_out = lie.blobs.pop()
    return "no blob"


def missing_report(lie: Lie) -> str:
    lie.result = msgspec.structs.replace(lie.result, report="sha256:" + "0" * 64)
    return "is missing"


LIES = (
    looser_contract, another_class, easier_pictures, better_figures, passed_although_it_failed, lost_label, missing_bytes,
    missing_report,
)  # fmt: skip


@pytest.fixture(scope="module")
def honest(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, CompileTask, WorkClient], Lie]:
    """A true compile of a claimed task; made once, copied for each who bends it."""
    cache = workers.own_cache(tmp_path_factory.mktemp("honest") / "cache")

    def make(folder: Path, task: CompileTask, client: WorkClient) -> Lie:
        layout = Layout(folder / "layout")
        for digest in task.blobs:
            client.fetch(task.lease, digest, layout)
        manifest = parse_value(msgspec.json.decode(task.device_class))
        assert isinstance(manifest, DeviceClass)
        asked = model_version.decode(layout.read(task.version, 1 << 24))
        return Lie(layout, compile_version(asked, manifest, layout, Toolchains(cache), cache=cache))

    return make


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_result_that_is_not_what_it_says_is_refused_and_the_job_goes_to_another(fleet, honest, tmp_path, lie):
    # A version that nobody has compiled: the controller knows none of its blobs.
    version = f"lied-{lie.__name__}"[:20].replace("_", "-")
    fleet.json("model", "add", "-f", str(fleet.folder / "manifests/model-2.yaml"), "--version", version)
    client = workers.client(fleet, f"liar-{version}")
    assert workers.client(fleet, f"next-{version}").claim() is None
    job = fleet.client().compile("toy", version, "pc", despite_quality=False)
    task = claimed(client, job)
    with Keeping(client, task.lease):
        told = honest(tmp_path, task, client)
        words = lie(told)
        for digest in (*told.blobs, told.result.artifact.digest, told.result.report, told.result.page):
            if told.layout.has(digest):
                client.upload(task.lease, digest, told.layout)
        with pytest.raises(EdgefleetError, match=words):
            client.finish(task.lease, told.result)
    assert fleet.client().job(job)["state"] == "queued"
    assert fleet.client().models("toy", version)[0]["artifacts"] == []
    settle(fleet, job)


class Keeping:
    """Renews a lease by hand while a test is busy."""

    def __init__(self, client: WorkClient, lease: str) -> None:
        self._held = Held(client, lease, LEASE_S)

    def __enter__(self) -> None:
        self._held.__enter__()

    def __exit__(self, *_: object) -> None:
        self._held.__exit__()


def test_bytes_that_are_not_their_digest_are_not_taken(fleet, tmp_path):
    client = workers.client(fleet, "forger")
    job = fleet.client().compile("toy", "1", "pc", despite_quality=False)
    task = claimed(client, job)
    layout = Layout(tmp_path / "layout")
    stored = layout.put(b"what was meant")
    layout.path(stored.digest).write_bytes(b"something else")
    with pytest.raises(InputError, match="the bytes hash to"):
        client.upload(task.lease, stored.digest, layout)
    assert not Layout(fleet.home / "artifacts").has(stored.digest)
    settle(fleet, job)


# --------------------------------------------------------------------------------------------------------- builder boards


def test_a_builder_board_times_what_the_compiler_may_not_and_its_figures_are_told_as_its_own(fleet, started):
    apply(fleet, on_board("kiosk"))
    started(workers.worker(fleet, "compiler"))
    alone = ended(fleet, fleet.client().compile("toy", "1", "kiosk", despite_quality=False))
    assert alone["state"] == "done", alone
    (before,) = [a for a in fleet.client().models("toy", "1")[0]["artifacts"] if a["class"] == "kiosk"]
    assert before["quality"]["unmeasured"] == ["latency"]
    assert before["timings"]["p50_ms"] is None
    board = started(workers.builder(fleet, "kiosk-builder", "kiosk"))
    until(lambda: any(w["name"] == "kiosk-builder" and w["last_seen"] for w in fleet.client().workers()), "it asks", 20)
    done = ended(fleet, fleet.client().compile("toy", "1", "kiosk", despite_quality=False))
    assert done["state"] == "done", (done, board.log())
    (after,) = [a for a in fleet.client().models("toy", "1")[0]["artifacts"] if a["class"] == "kiosk"]
    assert after["quality"]["unmeasured"] == []
    assert after["quality"]["timed_on"] == "kiosk-builder"
    for figure in ("p50_ms", "p95_ms", "float_p50_ms"):
        assert after["timings"][figure] > 0
    assert after["manifest"] == before["manifest"], "times are no part of the artifact"
    assert list((fleet.folder / "kiosk-builder/artifacts/blobs/sha256").iterdir()) == [], "nothing stays on the board"


def test_what_a_builder_board_refuses_is_not_shipped(fleet, started):
    # A fall-back to the CPU, which only a board's acceptance sees.
    apply(fleet, on_board("slow", acceptance={"allowed_providers": ["NpuExecutionProvider"]}))
    started(workers.worker(fleet, "compiler-2"))
    started(workers.builder(fleet, "slow-builder", "slow"))
    until(lambda: any(w["name"] == "slow-builder" and w["last_seen"] for w in fleet.client().workers()), "it asks", 20)
    done = ended(fleet, fleet.client().compile("toy", "1", "slow", despite_quality=False))
    assert done["state"] == "failed"
    assert "refused by the builder board slow-builder: providers" in done["error"]["message"]


def test_a_builder_board_that_was_busy_is_asked_again_and_then_left_unmeasured(fleet, started):
    apply(fleet, on_board("busy"))
    board = workers.client(fleet, "busy-builder", "busy")
    assert board.claim() is None
    started(workers.worker(fleet, "compiler-3"))
    job = fleet.client().compile("toy", "1", "busy", despite_quality=False)
    contract = AcceptanceContract(
        kind="classification",
        min_agreement=0.5,
        latency_p95_ms=1.0,
        peak_memory_bytes=1 << 30,
        allowed_providers=("CPU",),
    )
    slow = AcceptanceFigures(
        golden_count=16, agreement=1.0, cosine=1.0, load_ms=1.0, first_ms=1.0, p50_ms=5.0, p95_ms=9.0, peak_memory_bytes=1,
        providers=("CPU",), cpu_share=0.2,
    )  # fmt: skip
    asked = 0

    def answered() -> bool:
        nonlocal asked
        task = board.claim()
        if task is not None:
            asked += 1
            board.finish(task.lease, judge(contract, slow))
        return bool(fleet.client().job(job)["state"] not in ("queued", "running"))

    until(answered, "the job has ended", 120)
    done = fleet.client().job(job)
    assert done["state"] == "done", done
    (made,) = [a for a in fleet.client().models("toy", "1")[0]["artifacts"] if a["class"] == "busy"]
    assert asked >= 3
    assert made["timings"]["p50_ms"] is None
    assert made["quality"]["unmeasured"] == ["latency"]


def test_figures_come_from_a_builder_board_of_that_class_with_a_lease_or_not_at_all(fleet, honest, tmp_path):
    apply(fleet, on_board("gate"))
    apply(fleet, on_board("door"))
    compiler, of_gate, of_door = (
        workers.client(fleet, "asks"), workers.client(fleet, "gate-1", "gate"), workers.client(fleet, "door-1", "door"),
    )  # fmt: skip
    assert of_gate.claim() is None
    job = fleet.client().compile("toy", "2", "gate", despite_quality=False)
    assert of_gate.claim() is None, "a builder board compiles nothing"
    task = claimed(compiler, job)
    assert task.builder
    invented = AcceptanceReport(verdict=Verdict.PASSED)
    with Keeping(compiler, task.lease):
        told = honest(tmp_path, task, compiler)
        manifest = told.result.artifact.digest
        with pytest.raises(NotFoundError):
            compiler.wish(task.lease, manifest)  # before its bytes are there
        for digest in (*told.blobs, manifest):
            compiler.upload(task.lease, digest, told.layout)
        wished = compiler.wish(task.lease, manifest)
        assert compiler.claim() is None, "a compiling worker measures nothing"
        assert of_door.claim() is None, "nor a board of another class"
        assert compiler.answer(task.lease, wished).state == "waiting"
        measuring = of_gate.claim()
        assert measuring is not None
        for liar, lease in ((of_door, measuring.lease), (of_gate, "0" * 32)):
            with pytest.raises((TrustError, ConflictError)):
                liar.finish(lease, invented)
        with pytest.raises(EdgefleetError):
            compiler.finish(measuring.lease, told.result)
        assert compiler.answer(task.lease, wished).state == "waiting", "nobody who may has told anything"
        of_gate.finish(measuring.lease, invented)
        answer = compiler.answer(task.lease, wished)
        assert (answer.state, answer.by) == ("measured", "gate-1")
        # A builder board that goes away: the wish is given up, and the candidate stays unmeasured.
        again = compiler.wish(task.lease, manifest)
        lost = of_gate.claim()
        assert lost is not None
        of_gate.fail(lost.lease, InputError("no sensor").as_dict())
        assert compiler.answer(task.lease, again).state == "unmeasured"
    settle(fleet, job)
