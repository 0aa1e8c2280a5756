"""The persisted state: receives a record, hands it on after any crash. Written before each act (lifecycle.py, rule 2)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.contract import AcceptanceReport
from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.lifecycle import Life
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.messages import Ended, SignedResult
from edgefleet_shared.open_enum import is_known

log = logging.getLogger(__name__)


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """Where the board stands.

    Args:
        life: state, restarts and pending outcome.
        assignment: what is being worked on, or was last.
        pending: a verified assignment that waits until this one is done with.
        committed: the assignment that was committed last: what a late regression is told of.
        reason: why the pending outcome is what it is.
        acceptance: the last verdict on this assignment.
        ended: how the last assignment ended; its ``number`` counts those that ever did.
        result: the same, signed, once it is.
        desired_seen: digest of the last ``desired`` message that was decided about.
        refusal: why that one was refused, if it was.
        kernel_boot: the board's start (not the agent's) in which ``life`` was last changed; empty when the kernel does not name it.
        stopped: the agent was stopped in order since then.
        soaked_s: for how long what soaks had served well when it was.
    """

    life: Life = Life()
    assignment: Assignment | None = None
    pending: Assignment | None = None
    committed: Assignment | None = None
    reason: str = ""
    acceptance: AcceptanceReport | None = None
    ended: Ended | None = None
    result: SignedResult | None = None
    desired_seen: str = ""
    refusal: str = ""
    kernel_boot: str = ""
    stopped: bool = False
    soaked_s: float = 0.0


# Where the board stands, and goes next: without these it would miss something.
NEEDED = ("life", "assignment", "pending")


def read(state: Path, *, files: FileSystem = DISK, given_up: bool = False) -> Journal:
    """The journal on disk; an absent one is a board that never did anything. It may be of a newer agent, which was left for this one: what is
    not understood of it is as if it had not been said.

    Args:
        given_up: what can't be read is as good as damaged by now.

    Raises:
        ArtifactError: it is damaged, which our own writing can't cause, or a newer agent's words say where the board stands.
        EnvironmentProblem: it can't be read.
    """
    path = state / "journal.json"
    hint = "the agent begins a new one when it starts"
    try:
        told = msgspec.json.decode(atomic.read_or_damaged(path, given_up, files=files), type=dict[str, msgspec.Raw])
    except FileNotFoundError:
        return Journal()
    except MALFORMED as exc:
        raise ArtifactError(f"{path} is damaged: {exc}", hint=hint) from exc
    understood: dict[str, Any] = {}
    for field in msgspec.structs.fields(Journal):
        try:
            if field.name in told:
                understood[field.name] = msgspec.json.decode(told[field.name], type=field.type)
        except MALFORMED as exc:
            if field.name in NEEDED:
                raise ArtifactError(f"{path} is damaged, or of a newer agent: {field.name}: {exc}", hint=hint) from exc
            log.warning("journal not understood", extra={"field": field.name, "reason": str(exc)})
    found = Journal(**understood)
    if not is_known(found.life.state):
        raise ArtifactError(f"{path} is of a newer agent: it stands in {found.life.state.value}", hint=hint)
    return found


def write(state: Path, journal: Journal, *, files: FileSystem = DISK) -> None:
    """Replace the journal durably."""
    atomic.write(state / "journal.json", msgspec.json.encode(journal), files=files)


class Keeper:
    """The journal as it is on the disk, held in memory by the one thread that may change it.

    ``loaded`` is False, and ``now`` an empty journal, until :meth:`load` has read it.
    """

    def __init__(self, state: Path, files: FileSystem) -> None:
        self._state, self._files = state, files
        self.now, self.loaded = Journal(), False

    def load(self, *, given_up: bool = False) -> None:
        """Read the journal; set a damaged one, or one that is ``given_up``, aside and begin anew.

        What the board should run is level-triggered, so nothing is lost but the memory of how the last assignment ended.

        Raises:
            EnvironmentProblem: it can't be read, or a damaged one can't be set aside.
        """
        try:
            self.now = read(self._state, files=self._files, given_up=given_up)
        except ArtifactError as exc:
            aside = atomic.set_aside(self._state / "journal.json", files=self._files)
            log.error("journal damaged", extra={"reason": str(exc), "kept_as": str(aside)})
        self.loaded = True

    def replace(self, journal: Journal) -> None:
        """Put ``journal`` in place of what is, on the disk first.

        Raises:
            EnvironmentProblem: the disk refused; ``now`` is as before.
        """
        write(self._state, journal, files=self._files)
        self.now = journal

    def keep(self, **changes: Any) -> None:
        """Replace single fields. Raises like :meth:`replace`."""
        self.replace(msgspec.structs.replace(self.now, **changes))
