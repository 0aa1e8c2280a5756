"""Stage 7, accept: plans, which some engines have to make of a model on the very board that runs it. Receives a plan as it is built, hands
it on after any crash.

::

    <state>/artifacts/plans.json           which plan was made of which artifact, and what it was made by
    <state>/artifacts/blobs/sha256/<hex>   the plan, by digest, beside the artifacts' blobs

A plan is a cache: what is missing, torn, or made by another version of the engine is made again. So a plan gets its record only when it
is durable to the last byte, and nobody uses one without holding it against the digest in its record (:func:`find`).
Not handled here: making one (:mod:`edgefleet_agent.build`), when it may go (:func:`edgefleet_agent.slots.collect_garbage`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Descriptor, Layout, hex_of
from edgefleet_shared.errors import ArtifactError, EdgefleetError, EnvironmentProblem, NotFoundError
from edgefleet_shared.malformed import MALFORMED

log = logging.getLogger(__name__)

SPARE_BYTES = 16 * 1024 * 1024  # what must stay free beside a plan


class Plan(msgspec.Struct, frozen=True):
    """The record of a plan: the manifest's digest of its artifact, what it was made by (engine, driver, processor), its own digest and
    size in bytes."""

    artifact: str
    key: str
    digest: str
    size: int


def read(layout: Layout) -> dict[str, Plan]:
    """The records by artifact. A damaged file, or record, or one that is lost, is as good as none: what it named is made again.

    Raises:
        EnvironmentProblem: it can't be read.
    """
    path = _path(layout)
    try:
        content = atomic.unless_lost(lambda: atomic.read(path, files=layout.files))
        records = msgspec.json.decode(content, type=tuple[Plan, ...]) if content is not None else ()
        for record in records:
            hex_of(record.digest)  # becomes a file's name
    except FileNotFoundError:
        return {}
    except (*MALFORMED, ArtifactError) as exc:
        log.error("plans damaged", extra={"reason": f"{path}: {exc}"})
        return {}
    return {record.artifact: record for record in records}


def is_whole(layout: Layout, plan: Plan) -> bool:
    """Whether the plan is on the disk to the byte.

    Raises:
        EnvironmentProblem: the disk can't be read.
    """

    def check() -> bool:
        layout.check(Descriptor("", plan.digest, plan.size))
        return True

    try:
        return bool(atomic.unless_lost(check))
    except (NotFoundError, ArtifactError):
        return False


def find(layout: Layout, artifact: str, key: str) -> Path:
    """The plan of an artifact, good to the byte.

    Args:
        key: what the engine that will run it is now.

    Raises:
        NotFoundError: none was made yet, or by another engine, driver or processor.
        ArtifactError: it was changed on the disk.
    """
    plan = read(layout).get(artifact)
    if plan is None or plan.key != key:
        made = f"the one here was made by {plan.key}" if plan else "none was made on this board"
        raise NotFoundError(f"no plan of {artifact} for {key}: {made}", hint="the agent builds it")
    layout.check(Descriptor("", plan.digest, plan.size))
    return layout.path(plan.digest)


def keep(layout: Layout, plan: Plan) -> None:
    """Record a plan that is durable, in place of an earlier one of the same artifact.

    Raises:
        EnvironmentProblem: the disk refused; the earlier record holds.
    """
    _write(layout, read(layout) | {plan.artifact: plan})


def settle(layout: Layout) -> None:
    """The plans and records that are there survive a power cut from now on: an earlier start may have been killed between naming one and
    syncing its name.

    Raises:
        EnvironmentProblem: the disk refused.
    """
    layout.sync()


def forget_others(layout: Layout, artifacts: Iterable[str]) -> set[str]:
    """Drop the records of all artifacts but these. Returns the digests of the plans that stay.

    Raises:
        EnvironmentProblem: the disk can't be read or written.
    """
    wanted, known = set(artifacts), read(layout)
    kept = {artifact: plan for artifact, plan in known.items() if artifact in wanted}
    if kept != known:
        _write(layout, kept)
    elif known:
        # What they no longer name is removed next: a killed start may not have synced the name that says so.
        with atomic.disk_errors(layout.root):
            atomic.sync_folder(layout.root, files=layout.files)
    return {plan.digest for plan in kept.values()}


def _path(layout: Layout) -> Path:
    return layout.root / "plans.json"


def _write(layout: Layout, plans: dict[str, Plan]) -> None:
    ordered = [plans[artifact] for artifact in sorted(plans)]
    atomic.write(_path(layout), msgspec.json.encode(ordered), files=layout.files)


class Incoming:
    """A plan that is being made. Nobody can take it for one before :meth:`adopt`.

    Raises:
        EnvironmentProblem: the disk is full already, or what an earlier start left can't be removed.
    """

    def __init__(self, layout: Layout, artifact: str) -> None:
        self._layout, self._artifact = layout, artifact
        self._temporary = layout.path(artifact).with_name(f".plan-{hex_of(artifact)}")
        self._state, self.size = hashlib.sha256(), 0
        atomic.remove(self._temporary, files=layout.files)
        with atomic.disk_errors(layout.root, "read"):
            self._room = layout.files.free_bytes(layout.root) - SPARE_BYTES

    def take(self, piece: bytes) -> None:
        """The next piece.

        Raises:
            EnvironmentProblem: the disk does not take it.
        """
        if self.size + len(piece) > self._room:
            raise EnvironmentProblem(
                f"the plan leaves less than {SPARE_BYTES} bytes free on the disk", hint="free some space on the board"
            )
        atomic.write_piece(self._temporary, piece, self.size, files=self._layout.files)
        self._state.update(piece)
        self.size += len(piece)

    def adopt(self, key: str) -> Plan:
        """Make it durable under its digest. Its record is still to be kept.

        Raises:
            EnvironmentProblem: the disk refused.
        """
        digest = "sha256:" + self._state.hexdigest()
        atomic.adopt(self._temporary, self._layout.path(digest), files=self._layout.files)
        return Plan(self._artifact, key, digest, self.size)

    def drop(self) -> None:
        """It came to nothing: give its space back, if the disk lets it."""
        with suppress(EdgefleetError):
            atomic.remove(self._temporary, files=self._layout.files)
