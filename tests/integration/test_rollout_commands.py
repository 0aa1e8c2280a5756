"""From a model to boards by the operator's commands: add, compile, sign, roll out, steer, survive the controller's death."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.outcomes import Outcome
from support.broker import until
from support.fleet import FakeBoard, Fleet, broker_pid, device_class, workers_of, write
from support.processes import alive


@pytest.fixture(scope="module")
def released(fleet: Fleet) -> Fleet:
    """Versions 1 to 3 of model toy, added, compiled by the real toolchain, signed, all by command."""
    for version in ("1", "2", "3"):
        fleet.json("model", "add", "-f", str(fleet.folder / "manifests" / f"model-{version}.yaml"))
        shown = fleet.json("model", "compile", "toy", version, "--class", "pc")
        (artifact,) = shown["artifacts"]
        assert artifact["state"] == "signed"
        assert artifact["quality"]["agreement"] == 1.0
    return fleet


@pytest.fixture
def boards(released: Fleet, request: pytest.FixtureRequest) -> Iterator[list[FakeBoard]]:
    """Three fresh boards of class pc, named after the test."""
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:6]
    made = [released.board(f"{prefix}-{n}").start() for n in (1, 2, 3)]
    names = {b.name for b in made}
    until(
        lambda: names <= {d["name"] for d in released.client().devices() if d["online"] and d["state"]},
        "all have reported",
    )
    yield made
    for board in made:
        board.stop()


def rollout_for(fleet: Fleet, boards: list[FakeBoard], version: str, name: str, **spec: object) -> Path:
    given = yaml.safe_load((fleet.folder / "manifests" / "rollout.yaml").read_text())["spec"]
    return write(
        fleet.folder / f"{name}.yaml", "Rollout", name,
        given | {"version": version, "selector": {"devices": [b.name for b in boards]}} | spec,
    )  # fmt: skip


def test_a_rollout_goes_canary_first_and_succeeds_with_exit_status_zero(released, boards):
    path = rollout_for(released, boards, "1", "good")
    plan = released.json("rollout", "plan", "-f", str(path))
    assert sorted(row["wave"] for row in plan) == ["all", "all", "canary"]
    released.json("rollout", "create", "-f", str(path))
    done = released.run("rollout", "watch", "good", "--timeout", "60", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads(done.stdout)
    assert state["phase"] == "succeeded"
    assert {b["standing"] for b in state["boards"]} == {"took"}
    assert next(g["wave"] for g in state["gates"] if g["verdict"] == "passed") == "canary"
    manifest = boards[0].active.manifest
    with released.http(certificate=boards[0].certificate) as http:
        assert digest_of(http.get(f"/v1/blobs/{manifest}").content) == manifest
    assert released.json("device", "show", boards[0].name)["version"] == "1"
    assert "good" in [row["name"] for row in released.json("rollout", "list")]


def test_boards_are_labelled_and_chosen_by_that(released, boards):
    first, second, third = (board.name for board in boards)
    assert released.json("device", "label", first, "hall=north", "line=3") == {"hall": "north", "line": "3"}
    released.json("device", "label", second, "hall=north")
    assert released.json("device", "label", first, "line-", "note=a=b") == {"hall": "north", "note": "a=b"}
    assert released.json("device", "label", first) == {"hall": "north", "note": "a=b"}
    assert released.json("device", "show", first)["labels"] == {"hall": "north", "note": "a=b"}
    path = rollout_for(released, boards, "1", "by-label", selector={"labels": {"hall": "north"}})
    assert sorted(row["device"] for row in released.json("rollout", "plan", "-f", str(path))) == sorted([first, second])
    released.json("device", "label", second, "hall=south")
    assert [row["device"] for row in released.json("rollout", "plan", "-f", str(path))] == [first]
    assert {d["name"]: d["labels"] for d in released.json("device", "list")}[third] == {}
    assert "hall=south" in released.run("device", "list").stdout
    for wrong in (["hall"], ["=x"], ["hall=a", "hall-"], ["Hall=x"]):
        done = released.run("device", "label", first, *wrong)
        assert done.returncode not in (0, 1), wrong
        assert "Traceback" not in done.stderr
    assert released.run("device", "label", "nobody", "a=b").returncode != 0


def test_a_bad_version_stops_at_the_canary_which_returns_and_the_command_says_why(released, boards):
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "1", "before-bad")))
    assert released.run("rollout", "watch", "before-bad", "--timeout", "60").returncode == 0
    for board in boards:
        board.outcome_of = lambda version: Outcome.FAILED_ROLLED_BACK if version == "3" else Outcome.SUCCEEDED
    touched_before = {b.name: len(b.assigned) for b in boards}
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "3", "bad")))
    done = released.run("rollout", "watch", "bad", "--timeout", "60")
    assert done.returncode == 1
    assert "as the test says" in done.stdout
    state = released.client().rollout("bad")
    assert state["phase"] == "rolled_back"
    (canary,) = [b for b in state["boards"] if b["touched"]]
    untouched = [b for b in boards if b.name != canary["device"]]
    assert [len(b.assigned) for b in untouched] == [touched_before[b.name] for b in untouched]
    assert {b.active.version for b in boards} == {"1"}


def test_an_outcome_that_nobody_signed_takes_no_wave_further_and_the_commands_say_so(released, boards):
    for board in boards:
        board.signs = False
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "1", "unsigned")))

    def doubted() -> list[dict[str, object]]:
        return [b for b in released.client().rollout("unsigned")["boards"] if b["standing"] == "unclear"]

    until(lambda: len(doubted()) == 1, "the canary has spoken, and is not believed")
    (canary,) = doubted()
    assert (canary["signed"], canary["reason"]) == (False, "its result is not signed")
    assert "its result is not signed" in released.run("rollout", "status", "unsigned").stdout
    shown = released.json("device", "show", str(canary["device"]))
    assert (shown["result"], shown["must_sign"], shown["outcome"]) == ("unsigned", True, "succeeded")
    assert [len(b.assigned) for b in boards if b.name != canary["device"]] == [0, 0]
    released.json("rollout", "abort", "unsigned")
    until(lambda: released.client().rollout("unsigned")["ended"], "it is over")


def test_a_controller_killed_in_the_middle_of_a_rollout_goes_on_where_it_was(released, boards):
    for board in boards[1:] + boards[:1]:
        board.held = True
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "2", "cut")))
    until(lambda: any(b.assigned for b in boards), "the canary is assigned")
    before = {b["device"]: b["standing"] for b in released.client().rollout("cut")["boards"]}
    orphan = broker_pid(released)
    released.end(signal.SIGKILL)
    assert alive(orphan), "this test is about a broker that outlives its controller"
    for board in boards:
        board.held = False
    released.start()
    assert not alive(orphan)
    assert {b["device"]: b["standing"] for b in released.client().rollout("cut")["boards"]}.keys() == before.keys()
    done = released.run("rollout", "watch", "cut", "--timeout", "90", "--json")
    assert done.returncode == 0, done.stdout
    assert {b.active.version for b in boards} == {"2"}
    # The canary was asked once, by the controller that died; the one after it did not ask again under another name.
    assert [len(b.assigned) for b in boards] == [1, 1, 1]


def test_a_rollout_can_be_paused_resumed_and_aborted(released, boards):
    for board in boards:
        board.held = True
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "2", "steered")))
    until(lambda: any(b.assigned for b in boards), "the canary is assigned")
    released.json("rollout", "pause", "steered")
    until(lambda: released.client().rollout("steered")["phase"] == "paused", "paused")
    released.json("rollout", "resume", "steered")
    until(lambda: released.client().rollout("steered")["phase"] == "running", "running again")
    assert released.run("rollout", "watch", "steered", "--timeout", "1", "--json").returncode == 3
    held = released.run("rollout", "create", "-f", str(rollout_for(released, boards, "1", "second")))
    assert "held by another rollout" in held.stderr
    released.json("rollout", "abort", "steered")
    for board in boards:
        board.held = False
    until(lambda: released.client().rollout("steered")["phase"] in ("stopping", "aborted"), "stopping")


def test_a_selector_that_matches_no_board_is_refused(released, tmp_path):
    spec = {"model": "toy", "version": "1", "selector": {"sites": ["nowhere"]}}
    path = write(tmp_path / "r.yaml", "Rollout", "nobody", spec)
    done = released.run("rollout", "create", "-f", str(path))
    assert done.returncode == 2
    assert "matches no board" in done.stderr
    assert released.run("rollout", "status", "nobody").returncode == 2


def test_nothing_is_rolled_out_that_is_not_signed(fleet, tmp_path):
    source = yaml.safe_load((fleet.folder / "manifests" / "model-1.yaml").read_text())
    source["metadata"]["name"] = "unsigned"
    path = fleet.folder / "manifests" / "unsigned.yaml"
    path.write_text(yaml.safe_dump(source))
    try:
        fleet.json("model", "add", "-f", str(path))
        shown = fleet.json("model", "compile", "unsigned", "1", "--class", "pc", "--no-sign")
        assert [a["state"] for a in shown["artifacts"]] == ["compiled"]
        rollout = write(tmp_path / "r.yaml", "Rollout", "early", {"model": "unsigned", "version": "1"})
        done = fleet.run("rollout", "create", "-f", str(rollout))
        assert done.returncode == 1
        assert "compiled and signed" in done.stderr
        assert fleet.json("model", "sign", "unsigned", "1") == {"signed": ["pc"]}
    finally:
        path.unlink()


def test_versions_are_compared_and_reported_by_command(released, tmp_path):
    rows = {row["figure"]: row for row in released.json("model", "compare", "toy", "1", "2")}
    assert (rows["agreement"]["device_class"], rows["agreement"]["meaning"]) == ("pc", "alike")
    assert rows["recipe"]["before"] == "fp32"
    page = tmp_path / "report.html"
    done = released.run("model", "report", "toy", "1", "pc", "-o", str(page))
    assert done.returncode == 0, done.stderr
    assert page.read_text().startswith("<!doctype html>")
    told = released.json("model", "report", "toy", "1", "pc")
    assert (told["class"], told["fits"], told["changed"]["count"]) == ("pc", True, 0)
    unknown = released.run("model", "compare", "toy", "1", "9")
    assert unknown.returncode != 0
    assert "no model toy 9" in unknown.stderr
    assert "toy 1 is not compiled for other" in released.run("model", "report", "toy", "1", "other").stderr


def test_why_a_version_is_not_compiled_for_a_class_stands_where_its_figures_are_looked_for(released, tmp_path):
    tiny = device_class("tiny", budgets={"latency_p95_ms": 1000.0, "memory_bytes": 2_000_000_000, "size_bytes": 9})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    released.json("apply", "-f", str(tmp_path / "tiny.yaml"))
    failed = released.run("model", "compile", "toy", "1", "--class", "tiny")
    assert failed.returncode == 1
    assert "--ship-despite-quality" in failed.stderr
    shown = released.run("model", "show", "toy").stdout
    assert "the last compile for tiny failed: toy 1 for tiny: size" in shown
    page = tmp_path / "why.html"
    assert released.run("model", "report", "toy", "1", "tiny", "-o", str(page)).returncode == 0
    assert "nothing is shipped" in page.read_text()
    assert released.run("model", "compile", "toy", "1", "--class", "tiny", "--ship-despite-quality").returncode == 0
    assert "the last compile for tiny" not in released.run("model", "show", "toy").stdout
    assert released.run("model", "report", "toy", "1", "tiny", "-o", str(page)).returncode == 0
    assert "nothing is shipped" not in page.read_text()


def test_a_version_never_changes(released):
    source = yaml.safe_load((released.folder / "manifests" / "model-2.yaml").read_text())
    path = released.folder / "changed.yaml"
    source["spec"]["source"]["path"] = "manifests/1.onnx"
    for split in ("calibration", "holdout", "golden"):
        source["spec"][split]["path"] = f"manifests/2-{split}.safetensors"
    path.write_text(yaml.safe_dump(source))
    done = released.run("model", "add", "-f", str(path))
    assert done.returncode == 1
    assert "give the changed model a new version" in done.stderr


def test_a_compile_job_that_was_running_when_the_controller_died_is_run_by_the_next(released):
    with released.http(operator=True) as http:
        answer = http.put("/v1/classes", json=device_class("pc-int8", precision="int8"))
        assert answer.status_code == 200
        job = released.client().compile("toy", "1", "pc-int8", despite_quality=True)
    assert released.process is not None
    controller = released.process.pid
    until(lambda: bool(workers_of(controller)), "the job has its process")
    orphans = workers_of(controller)
    released.end(signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in orphans), "the process of the dead controller's job ended")
    released.start()
    until(lambda: released.client().job(job)["state"] in ("done", "failed"), "the job ended", 120)
    told = released.client().job(job)
    assert told["state"] == "done", told["error"]
    assert told["manifest"].startswith("sha256:")
