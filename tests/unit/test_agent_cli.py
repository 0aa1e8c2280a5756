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


def test_a_file_for_the_token_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["enroll", "--url", "https://127.0.0.1:1", "--token-file", str(tmp_path / "lost")])
    assert done.exit_code == 2
    assert "lost" in done.output
    assert "does not exist" in done.output


def test_a_file_that_holds_no_token_is_refused_as_that(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"\xff\xfe\x00\x01")
    done = CliRunner().invoke(
        main,
        ["enroll", "--url", "https://127.0.0.1:1", "--token-file", str(tmp_path / "odd"), "--state", str(tmp_path)],
    )
    assert done.exit_code == 2
    assert "no enrolment token" in done.output
