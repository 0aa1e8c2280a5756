"""Stages 4-6: the assignment and the names of the image repository. Pure: what :mod:`edgefleet_shared.trust` verified is one of these.

Apart from the checks, because the resident agent works with a verified assignment but must not import python-tuf (27 MB).
"""

from __future__ import annotations

from enum import Enum

import msgspec

from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.fingerprint import Requirement

DIRECTOR = "director"
MAX_ASSIGNMENT_BYTES = 64 * 1024
AGENT = "edgefleet-agent"  # what the agent is called where a model has its name; no model may have it


class Subject(str, Enum):
    """What an assignment is about. A board has one assignment of each, apart from each other (ADR 0010)."""

    MODEL = "model"
    AGENT = "agent"


def subject_of(model: str) -> Subject:
    """What is meant by a name in a target's path, which the release keys have signed."""
    return Subject.AGENT if model == AGENT else Subject.MODEL


class Incomplete(EdgefleetError):
    """The metadata at hand is not one complete, consistent publication yet."""

    code = "metadata_incomplete"


def class_role(device_class: str) -> str:
    """The name of a device class's delegated role; its file is ``<role>.json``."""
    return f"class-{device_class}"


def metadata_files(device_class: str, root_version: int) -> tuple[str, ...]:
    """The metadata files that a board of the class needs, the next root first."""
    return (
        f"{root_version + 1}.root.json",
        f"{class_role(device_class)}.json",
        "targets.json",
        "snapshot.json",
        "timestamp.json",
    )


def target_path(device_class: str, model: str, version: str) -> str:
    """The path of an artifact in the image repository."""
    return f"{device_class}/{model}/{version}"


class Floors(msgspec.Struct, frozen=True, kw_only=True):
    """What a board has already accepted, below which nothing is accepted again: metadata, assignments about a model
    (``assignment_``) and about the agent (``agent_``), each by version and digest. ``clock`` is UTC seconds."""

    versions: dict[str, int] = {}
    assignment_version: int = 0
    assignment_digest: str = ""
    agent_version: int = 0
    agent_digest: str = ""
    clock: float = 0.0

    def of(self, subject: Subject) -> tuple[int, str]:
        """Version and digest of the assignment about it that was accepted last."""
        if subject is Subject.AGENT:
            return self.agent_version, self.agent_digest
        return self.assignment_version, self.assignment_digest

    def raised(self, subject: Subject, version: int, digest: str) -> Floors:
        """With another assignment about it accepted."""
        if subject is Subject.AGENT:
            return msgspec.structs.replace(self, agent_version=version, agent_digest=digest)
        return msgspec.structs.replace(self, assignment_version=version, assignment_digest=digest)


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """What the director wants of one board: the signed ``custom`` field of its one target, and what the target says.

    Whole numbers, because canonical JSON has no others. ``soak_s``: how long the runtime must serve well before commit. ``timeout_s``: for the whole deployment, 0 is no limit.
    ``swap``: auto, blue-green or in-place.
    """

    id: str
    device: str
    device_class: str
    rollout: str
    model: str
    version: str
    manifest: str
    size: int
    issued_at: int
    soak_s: int = 10
    timeout_s: int = 0
    swap: str = "auto"

    @property
    def subject(self) -> Subject:
        return subject_of(self.model)


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """A verified assignment and the floors that hold from now on."""

    assignment: Assignment
    desired: str  # digest of the assignment's bytes
    requires: Requirement
    floors: Floors
    root: bytes  # the newest trusted root, to be kept
