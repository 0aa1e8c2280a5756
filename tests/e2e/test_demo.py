"""The demo in its short form: the real programs as processes, and its report held against what it must show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_short_demo_tells_the_whole_story(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    fleet = Path(sys.executable).with_name("fleet")
    done = subprocess.run(
        [str(fleet), "demo", "--short", "--folder", str(tmp_path / "demo"), "--report", str(report)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    figures = json.loads(report.read_text())
    outcomes = [(r["version"], r["outcome"]) for r in figures["rollouts"]]
    assert outcomes == [("1", "succeeded"), ("2", "succeeded"), ("3", "rolled_back"), ("4", "rolled_back")]
    for rollout in figures["rollouts"][2:]:
        assert rollout["boards_touched"] == 2, "one canary per class, no other board"
        assert rollout["boards_rolled_back"] == 2
        assert len(rollout["reasons"]) >= 2
    for board in figures["boards"]:
        assert board["requests"] > 20
        assert (board["failed"], board["wrong_version"], board["final_version"]) == (0, 0, "2")
        assert set(board["answers_by_version"]) <= {"1", "2"}
    for one in figures["classes"]:
        assert one["compiled_bytes"] < one["float_bytes"] / 2
        assert one["agreement"] > 0.8
    assert figures["controller_sent_bytes"] > sum(c["compiled_bytes"] for c in figures["classes"])
