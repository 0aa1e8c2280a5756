"""A journal that a newer agent wrote, read by the one that is returned to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from edgefleet_agent import journal
from edgefleet_agent.journal import Journal
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.lifecycle import Life, State
from edgefleet_shared.messages import Ended
from edgefleet_shared.outcomes import Outcome

ASSIGNMENT = Assignment(
    id="a1", device="b1", device_class="c", rollout="r", model="toy", version="2", manifest="sha256:2", size=1,
    issued_at=0, soak_s=1,
)  # fmt: skip
KEPT = Journal(
    life=Life(State.SOAKING, 1),
    assignment=ASSIGNMENT,
    acceptance=AcceptanceReport(verdict=Verdict.PASSED),
    ended=Ended(assignment="a0", manifest="sha256:1", outcome=Outcome.FAILED_ROLLED_BACK, number=7),
    desired_seen="sha256:d",
)


def newer(state: Path, *path: str, value: Any) -> None:
    """Keep the journal as an agent would for which ``value`` is a thing to write there."""
    told = msgspec.json.decode(msgspec.json.encode(KEPT))
    at = told
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    (state / "journal.json").write_bytes(msgspec.json.encode(told))


def test_an_outcome_that_only_a_newer_agent_knows_is_kept_in_its_words(tmp_path: Path) -> None:
    newer(tmp_path, "ended", "outcome", value="failed_by_the_weather")
    found = journal.read(tmp_path)
    assert found.life == KEPT.life
    assert found.ended is not None
    assert (found.ended.outcome.value, found.ended.number) == ("failed_by_the_weather", 7)
    journal.write(tmp_path, found)
    assert journal.read(tmp_path) == found
    assert found.ended.outcome not in list(Outcome)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("acceptance", "verdict"), "doubtful"), (("acceptance", "figures"), 3.5), (("acceptance",), "a digest")],
    ids=["a verdict", "another type", "another shape"],
)
def test_what_is_not_understood_costs_its_own_field_alone(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    newer(tmp_path, *path, value=value)
    assert journal.read(tmp_path) == msgspec.structs.replace(KEPT, acceptance=None)


def test_how_the_last_one_ended_is_forgotten_rather_than_what_is_being_done(tmp_path: Path) -> None:
    newer(tmp_path, "ended", "acceptance", value="a digest")
    found = journal.read(tmp_path)
    assert (found.ended, found.life, found.assignment, found.desired_seen) == (None, KEPT.life, ASSIGNMENT, "sha256:d")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("life", "state"), "dreaming"),
        (("life", "restarts"), "few"),
        (("assignment", "size"), None),
        (("pending",), "a2"),
    ],
)
def test_where_the_board_stands_is_not_guessed(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    newer(tmp_path, *path, value=value)
    with pytest.raises(ArtifactError, match="newer agent"):
        journal.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}x", b"\0\0\0\0", b'{"life":{"state":"idle"'])
def test_what_is_no_journal_at_all_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        journal.read(tmp_path)
