"""The board's record that an operator may change: what is said of a wrong change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edgefleet_agent import settings
from edgefleet_agent.enroll import enroll
from edgefleet_agent.settings import Settings
from edgefleet_shared.errors import EnvironmentProblem


@pytest.mark.parametrize(
    ("name", "value"),
    [("spool_bytes", "8MiB"), ("spool_bytes", 0), ("spool_flush_s", -1), ("health_period_s", 0), ("threads", 0)],
)
def test_a_setting_that_is_none_is_named_and_costs_nobody_an_enrolment(
    tmp_path: Path, name: str, value: object
) -> None:
    """A pause of 0 s between two health reports had the agent do nothing else; a word was taken for damage."""
    settings.write(tmp_path, Settings(device="b1", device_class="pc", site="", broker_host="h", broker_port=1))
    path = tmp_path / "agent.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(EnvironmentProblem) as told:
        settings.read(tmp_path)
    assert name in told.value.message
    assert str(path) in told.value.message
    assert told.value.hint == "correct it there"
    with pytest.raises(EnvironmentProblem, match=name):  # nor is the board one that anybody may enrol anew
        enroll(tmp_path, "https://127.0.0.1:1", "efe.0.0")
