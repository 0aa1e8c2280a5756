"""Stage 8, swap: the slots on disk. Receives an accepted candidate, hands on which artifact serves.

::

    <state>/artifacts/     OCI layout: blobs of all slots, shared by digest
    <state>/slots.json     which artifact is active, candidate, previous; good, bad or unknown

``slots.json`` is replaced durably and in one step (:func:`edgefleet_shared.atomic.write`), so at every instant it names
one consistent set. Order of an install (RAUC's ``install.c``): mark the candidate bad, write its blobs, fsync, accept,
flip, soak, mark good; only then may blobs that no slot names be collected. The runtime reads this file at its start
and serves ``active`` with no agent alive.
"""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Layout, Manifest
from edgefleet_shared.errors import ArtifactError, NotFoundError
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent import plans

log = logging.getLogger(__name__)


class SlotStatus(str, Enum):
    GOOD = "good"  # accepted, soaked, committed
    BAD = "bad"  # being written, refused, or failed while serving
    UNKNOWN = "unknown"  # accepted but not yet soaked


class Slot(msgspec.Struct, frozen=True):
    """One artifact on the board: its manifest's digest, what it is for people, how far it is trusted."""

    manifest: str
    model: str
    version: str
    status: SlotStatus


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """The three slots. ``serving`` is what the runtime should serve after a restart."""

    active: Slot | None = None
    candidate: Slot | None = None
    previous: Slot | None = None

    @property
    def serving(self) -> Slot | None:
        """The active artifact, or the previous one when the active one is bad."""
        for slot in (self.active, self.previous):
            if slot is not None and slot.status is not SlotStatus.BAD:
                return slot
        return None

    def flipped(self) -> Slots:
        """The candidate is active with status unknown, the old active one is previous, the old previous one forgotten."""
        if self.candidate is None:
            raise ValueError("no candidate to flip to")
        active = msgspec.structs.replace(self.candidate, status=SlotStatus.UNKNOWN)
        return Slots(active=active, previous=self.active)

    def returned(self) -> Slots:
        """The previous artifact is active again and the failed one forgotten. Without a previous one nothing is active."""
        return Slots(active=self.previous)


def artifacts(state: Path, *, files: FileSystem = DISK) -> Layout:
    """The board's OCI layout."""
    return Layout(state / "artifacts", files=files)


def read(state: Path, *, files: FileSystem = DISK, given_up: bool = False) -> Slots:
    """The slots as they are on disk; an absent file is a board that never had an artifact.

    Args:
        given_up: what can't be read is as good as damaged by now.

    Raises:
        ArtifactError: the file is damaged. EnvironmentProblem: it can't be read.
    """
    path = state / "slots.json"
    try:
        return msgspec.json.decode(atomic.read_or_damaged(path, given_up, files=files), type=Slots)
    except FileNotFoundError:
        return Slots()
    except MALFORMED as exc:
        raise ArtifactError(f"{path} is damaged: {exc}", hint="the agent mends it when it starts") from exc


def write(state: Path, slots: Slots, *, files: FileSystem = DISK) -> None:
    """Replace the slots durably and in one step."""
    atomic.write(state / "slots.json", msgspec.json.encode(slots), files=files)


def mend(state: Path, committed: Slot | None, *, files: FileSystem = DISK, given_up: bool = False) -> None:
    """Set a damaged ``slots.json`` aside and name what the journal remembers as committed, if every byte of it is there.

    Args:
        given_up: see :func:`read`.

    Raises:
        EnvironmentProblem: the disk can't be read or written.
    """
    try:
        read(state, files=files, given_up=given_up)
    except ArtifactError as exc:
        aside = atomic.set_aside(state / "slots.json", files=files)
        whole = committed is not None and _is_whole(artifacts(state, files=files), committed.manifest)
        log.error(
            "slots damaged",
            extra={
                "reason": str(exc),
                "kept_as": str(aside),
                "digest": committed.manifest if committed and whole else "",
            },
        )
        write(state, Slots(active=committed if whole else None), files=files)


def _is_whole(layout: Layout, manifest: str) -> bool:
    def check() -> bool:
        for blob in layout.manifest(manifest).blobs():
            layout.check(blob)
        return True

    try:
        return bool(atomic.unless_lost(check))
    except (NotFoundError, ArtifactError):
        return False


def commit(state: Path, slots: Slots, *, files: FileSystem = DISK) -> Slots:
    """Mark the active artifact good, durably, and forget the candidate; the previous one too when its manifest is damaged, gone or can't be
    read any more: nobody can return to it, and as long as a slot names it no blob can be told from garbage.

    Raises:
        EnvironmentProblem: the disk can't be read or written.
    """
    active, previous = slots.active, slots.previous
    if active is not None:
        active = msgspec.structs.replace(active, status=SlotStatus.GOOD)
    if previous is not None and _manifest(artifacts(state, files=files), previous) is None:
        log.error("previous artifact forgotten", extra={"digest": previous.manifest})
        previous = None
    good = Slots(active=active, previous=previous)
    write(state, good, files=files)
    return good


def _manifest(layout: Layout, slot: Slot) -> Manifest | None:
    """The manifest of a slot's artifact; None when it is damaged, gone or lost."""
    try:
        return atomic.unless_lost(lambda: layout.manifest(slot.manifest))
    except (NotFoundError, ArtifactError):
        return None


def collect_garbage(state: Path, slots: Slots, *, files: FileSystem = DISK) -> list[str]:
    """Remove every blob that no slot names, the plans of such artifacts, and what never became a blob. Returns the digests that went: none
    where the active or the previous artifact's manifest can't be read, which may name any.

    Call only while nothing is being fetched or built, with slots that are on the disk already, or with those without the candidate.

    Raises:
        EnvironmentProblem: the disk can't be read or written.
    """
    layout = artifacts(state, files=files)
    keep: set[str] = set()
    for slot in (slots.active, slots.candidate, slots.previous):
        if slot is None:
            continue
        keep.add(slot.manifest)
        manifest = _manifest(layout, slot)
        if manifest is not None:
            keep.update(blob.digest for blob in manifest.blobs())
        elif slot is not slots.candidate:
            return []
    keep |= plans.forget_others(layout, keep)
    gone = [digest for digest in layout.digests() if digest not in keep]
    for digest in gone:
        layout.remove(digest)
    for path in layout.unfinished():
        atomic.remove(path, files=files)
    return gone
