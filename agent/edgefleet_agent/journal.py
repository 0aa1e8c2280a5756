"""The persisted state: receives a record, hands it on after any crash. Written before each act (lifecycle.py, rule 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


class Keeper:
    """The journal as it is on the disk, held in memory by the one thread that may change it."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self.now = read(state)

    def replace(self, journal: Journal) -> None:
        """Put ``journal`` in place of what is, on the disk first."""
        write(self._state, journal)
        self.now = journal

    def keep(self, **changes: Any) -> None:
        """Replace single fields, on the disk first."""
        self.replace(msgspec.structs.replace(self.now, **changes))
