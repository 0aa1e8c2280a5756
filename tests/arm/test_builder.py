"""A builder board for Raspberry Pis: the agent in a userland for 64-bit Arm measures what a real controller compiles for that class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import workers
from support.arm import CLASSES
from support.broker import until
from support.fleet import Fleet, manifests
from support.userland import ARM64, ROOT, Userland, UserlandMissing

AGENT = ("python3", "-m", "edgefleet_agent.cli")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    try:
        made.start(EDGEFLEET_CACHE=str(workers.own_cache(tmp_path / "cache")))
        yield made
    finally:
        made.close()


def test_candidates_for_a_raspberry_pi_are_timed_on_its_builder_board(fleet: Fleet) -> None:
    (pi,) = [one for one in CLASSES if one.name == "pi4-arm64"]
    told = pi.model_dump(mode="json")
    told["spec"]["search"] = {"effort": "fixed", "prefer": "size"}
    folder = manifests(fleet.folder / "manifests")
    (folder / "pi.yaml").write_text(yaml.safe_dump(told))
    fleet.json("apply", "-f", str(folder / "pi.yaml"))
    fleet.json("model", "add", "-f", str(folder / "model-1.yaml"))
    try:
        board = Userland(ARM64, ROOT / "requirements/agent-litert.txt")
    except UserlandMissing as exc:
        pytest.skip(str(exc))
    token = fleet.run("worker", "token", "--name", "bench", "--class", "pi4-arm64").stdout.strip()
    with board.folder() as (_, inside):
        url = f"https://127.0.0.1:{fleet.api_port}"
        enrolled = board.run(*AGENT, "enroll", "--state", f"{inside}/state", "--url", url, "--token", token)
        assert enrolled.returncode == 0, enrolled.stderr
        with board.started(fleet.folder / "bench.log", *AGENT, "measure", "--state", f"{inside}/state"):
            until(lambda: any(w["last_seen"] for w in fleet.client().workers()), "the builder board asks for work", 300)
            job = fleet.client().compile("toy", "1", "pi4-arm64", despite_quality=False)
            until(lambda: fleet.client().job(job)["state"] not in ("queued", "running"), "the job has ended", 240)
    assert fleet.client().job(job)["state"] == "done", (
        fleet.client().job(job),
        (fleet.folder / "bench.log").read_text(),
    )
    (made,) = fleet.client().models("toy", "1")[0]["artifacts"]
    print(f"timed on {made['quality']['timed_on']}: {made['timings']}")
    assert made["quality"]["timed_on"] == "bench"
    assert made["quality"]["unmeasured"] == []
    assert made["timings"]["p50_ms"] > 0
    assert made["timings"]["float_p50_ms"] > 0
