"""``fleet-agent``: what a person can hand in."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from edgefleet_agent.cli import main


@pytest.mark.parametrize(
    ("option", "value"), [("--health-period", "0"), ("--health-period", "-1"), ("--threads", "0"), ("--threads", "-2")]
)
def test_a_limit_that_would_keep_the_board_busy_or_means_nothing_is_refused_before_the_token_is_spent(
    tmp_path: Path, option: str, value: str
) -> None:
    done = CliRunner().invoke(
        main, ["enroll", "--url", "https://127.0.0.1:1", "--token", "t", "--state", str(tmp_path / "s"), option, value]
    )
    assert done.exit_code == 2
    assert option in done.output
    assert not (tmp_path / "s").exists()
