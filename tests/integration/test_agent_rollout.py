"""An operator brings a version of the agent to boards: `fleet agent add`, a rollout, real boards; a bad one stops at the canary."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edgefleet_shared.assignment import AGENT
from support import agents
from support.agents import Kept
from support.broker import until
from support.fleet import Fleet, manifests, write
from support.runtimes import Runtime

BOARDS = ("one", "two")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        folder = manifests(made.folder / "manifests")
        made.start()
        made.json("apply", "-f", str(folder / "class.yaml"))
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def boards(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Enrolled boards with runtime and launcher, that have reported what their package provides."""
    states, running = {}, []
    try:
        for name in BOARDS:
            state = states[name] = tmp_path_factory.mktemp(name) / "state"
            token = fleet.client().token("pc", site="lab", device=name)
            subprocess.run(
                [sys.executable, "-m", "edgefleet_agent.cli", "enroll", "--state", str(state),
                 "--url", f"https://127.0.0.1:{fleet.api_port}", "--token", token, "--health-period", "1"],
                check=True, capture_output=True,
            )  # fmt: skip
            runtime = Runtime(state)
            runtime.start(ready=False)
            running += [runtime, Kept(state)]
        until(lambda: all(report(fleet, name) for name in BOARDS), "every board has reported", 90)
        yield states
    finally:
        for one in reversed(running):
            one.stop()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return agents.wheels(tmp_path_factory.mktemp("wheels"))


def report(fleet: Fleet, name: str) -> dict[str, Any]:
    told: dict[str, Any] = fleet.client().device(name)["report"] or {}
    return told


def roll_out(fleet: Fleet, name: str, version: str) -> dict[str, Any]:
    spec = {
        "model": AGENT, "version": version, "soak_s": 0.0, "timeout_s": 150.0, "reach_window_s": 60.0,
        "waves": [{"name": "canary", "count": 1}, {"name": "all", "percent": 100}],
    }  # fmt: skip
    fleet.json("rollout", "create", "-f", str(write(fleet.folder / f"{name}.yaml", "Rollout", name, spec)))
    fleet.run("rollout", "watch", name, "--timeout", "240", "--json", timeout_s=300)
    state: dict[str, Any] = fleet.client().rollout(name)
    return state


def test_a_version_is_added_once_signed_for_every_class_and_is_no_model(fleet, boards, wheels, tmp_path) -> None:
    sources = [str(path) for path in agents.changed(wheels, tmp_path / "v", "0.2.0")]
    added = fleet.json("agent", "add", *sources)
    assert (added["version"], [(a["class"], a["state"]) for a in added["artifacts"]]) == ("0.2.0", [("pc", "signed")])
    assert "msgspec" in added["requires"]
    assert fleet.json("agent", "add", *sources) == added
    assert fleet.json("agent", "list") == [added]
    assert fleet.json("model", "list") == []
    other = agents.changed(
        wheels, tmp_path / "w", "0.2.0", "edgefleet_agent/notify.py", "import os\n", "import os  # other\n"
    )
    done = fleet.run("agent", "add", *map(str, other))
    assert done.returncode != 0
    assert "exists and is something else" in done.stderr


def test_it_is_rolled_out_in_waves_and_every_board_runs_it(fleet, boards) -> None:
    state = roll_out(fleet, "agents-0.2.0", "0.2.0")
    assert state["phase"] == "succeeded", state
    assert {b["wave"] for b in state["boards"]} == {"canary", "all"}
    for name in BOARDS:
        told = report(fleet, name)
        assert told["agent_version"] == "0.2.0"
        assert told["agent"]["active"]["version"] == "0.2.0"
    assert "agent active" in fleet.run("device", "show", "one").stdout


def test_one_that_does_not_come_up_stops_at_the_canary_which_returns_by_itself(fleet, boards, wheels, tmp_path) -> None:
    anchor = "    settings = board_settings.read(state)\n"
    bad = agents.changed(wheels, tmp_path / "v", "0.3.0", "edgefleet_agent/app.py", anchor, f"    return\n{anchor}")
    fleet.json("agent", "add", *map(str, bad))
    state = roll_out(fleet, "agents-0.3.0", "0.3.0")
    assert state["phase"] in ("rolled_back", "failed"), state
    (canary,) = [b for b in state["boards"] if b["touched"]]
    assert canary["outcome"] == "failed_rolled_back"
    assert "it was started 3 times" in canary["reason"]
    assert {report(fleet, name)["agent_version"] for name in BOARDS} == {"0.2.0"}


def test_one_that_the_boards_package_can_not_run_selects_no_board(fleet, boards, wheels, tmp_path) -> None:
    greedy = agents.changed(wheels, tmp_path / "v", "0.4.0", metadata="Requires-Dist: msgspec>=99\n")
    fleet.json("agent", "add", *map(str, greedy))
    spec = {"model": AGENT, "version": "0.4.0", "waves": [{"name": "all", "percent": 100}]}
    path = write(fleet.folder / "greedy.yaml", "Rollout", "greedy", spec)
    done = fleet.run("rollout", "create", "-f", str(path))
    assert done.returncode != 0
    assert "needs msgspec >=99" in done.stderr


def test_attack_a_model_that_calls_itself_the_agent_is_refused(fleet, boards) -> None:
    text = (fleet.folder / "manifests" / "model-1.yaml").read_text().replace("name: toy", f"name: {AGENT}")
    path = fleet.folder / "manifests" / "impostor.yaml"
    path.write_text(text)
    done = fleet.run("model", "add", "-f", str(path))
    assert done.returncode != 0
    assert "no model may be called" in done.stderr
