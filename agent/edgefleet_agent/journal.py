"""The persisted state: receives a record, hands it on after any crash. Written before each act (lifecycle.py, rule 2)."""

from __future__ import annotations

from pathlib import Path

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.contract import AcceptanceReport
from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.lifecycle import Life
from edgefleet_shared.messages import Ended


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """Where the board stands.

    Args:
        life: state, restarts and pending outcome.
        assignment: what is being worked on, or was last.
        pending: a verified assignment that waits until this one is done with.
        reason: why the pending outcome is what it is.
        acceptance: the last verdict on this assignment.
        ended: how the last assignment ended.
        desired_seen: digest of the last ``desired`` message that was decided about.
        refusal: why that one was refused, if it was.
    """

    life: Life = Life()
    assignment: Assignment | None = None
    pending: Assignment | None = None
    reason: str = ""
    acceptance: AcceptanceReport | None = None
    ended: Ended | None = None
    desired_seen: str = ""
    refusal: str = ""


def read(state: Path) -> Journal:
    """The journal on disk; an absent one is a board that never did anything.

    Raises:
        ArtifactError: it is damaged, which our own writing can't cause.
    """
    path = state / "journal.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Journal)
    except FileNotFoundError:
        return Journal()
    except msgspec.DecodeError as exc:
        raise ArtifactError(f"{path} is damaged: {exc}", hint="run fleet-agent doctor") from exc


def write(state: Path, journal: Journal) -> None:
    """Replace the journal durably."""
    atomic.write(state / "journal.json", msgspec.json.encode(journal))
