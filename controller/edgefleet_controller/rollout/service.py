"""Stage 4, rollout: the loop around the engine. Receives the operator's wishes and the stored fleet; hands on one assignment per
board.

Persist, then act: what the engine decided, and every signed assignment with it, is committed before anything is published. An
assignment that is in force and not known to be published is published (again): bytes and names are the stored ones, so a
controller may be killed between any two lines and ends the same.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence

import msgspec
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import Subject, subject_of
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import ConflictError, EdgefleetError, TransportError
from edgefleet_shared.fingerprint import Requirement
from edgefleet_shared.trust import Assignment as Wanted
from sqlmodel import Session

from edgefleet_controller.rollout import engine
from edgefleet_controller.rollout.boards import board_time_s
from edgefleet_controller.rollout.fleet import FleetReader
from edgefleet_controller.rollout.plan import PlanRow, create, plan
from edgefleet_controller.rollout.ports import Director, FiguresSource, Publisher
from edgefleet_controller.rollout.views import (
    Assign,
    Decision,
    Enter,
    Intent,
    IntentKind,
    Phase,
    Progress,
    Rollout,
    RolloutSpec,
    Settle,
    Standing,
    TargetArtifact,
)
from edgefleet_controller.store import catalog, rollouts
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import Artifact, Assignment

log = logging.getLogger(__name__)

# Signing takes part of a millisecond each, under the database's write lock: no more at once than others may wait for.
MAX_ASSIGNMENTS_PER_COMMIT = 500
_FORWARD = frozenset({Phase.PLANNED, Phase.RUNNING, Phase.CATCHING_UP})


class _Follows(msgspec.Struct):
    """As much of a board's report as says which assignment it follows."""

    assignment: str = ""
    agent: _Follows | None = None


def _followed(reported: str, subject: Subject) -> str:
    """The assignment about ``subject`` that the board is at or ended last; empty for none."""
    report: _Follows | None = msgspec.json.decode(reported, type=_Follows)
    if report is not None and subject is Subject.AGENT:
        report = report.agent
    return report.assignment if report is not None else ""


class RolloutService:
    """Creates rollouts and carries them on.

    Args:
        figures: what boards measure, for the gates.
    """

    def __init__(
        self, database: Database, director: Director, publisher: Publisher, figures: FiguresSource, clock: Clock
    ) -> None:
        self._database, self._director, self._publisher = database, director, publisher
        self._figures, self._clock = figures, clock
        self._fleet = FleetReader(figures)
        self._wake = threading.Event()
        self._ticking = threading.Lock()
        self._started_at = clock.now()

    # -- for the operator's faces

    def create(self, name: str, spec: RolloutSpec) -> Rollout:
        """Create a rollout; the loop starts it.

        Raises:
            InputError: the spec can't be used, or selects no board that can take the version.
            NotFoundError: no such model version.
            ConflictError: nothing of it is signed, the name is taken, or another rollout holds a board.
        """
        self._figures.flush()
        with self._database.write() as session:
            self._database.serialise(session)
            artifacts = self._artifacts(spec)
            fleet = self._fleet.read(session, subject_of(spec.model))
            rollout = create(name, spec, artifacts, fleet, self._clock.now())
            rollouts.add(session, rollout)
        self.wake()
        return rollout

    def plan(self, name: str, spec: RolloutSpec) -> list[PlanRow]:
        """What :meth:`create` would do, for every board. Raises the same, but for the name that is taken."""
        self._figures.flush()
        with self._database.read() as session:
            fleet = self._fleet.read(session, subject_of(spec.model))
        now = self._clock.now()
        return plan(create(name, spec, self._artifacts(spec), fleet, now), fleet, now)

    def get(self, name: str) -> Rollout:
        """Raises:
        NotFoundError: there is none of that name."""
        with self._database.read() as session:
            return rollouts.load(session, name)[0]

    def intend(self, name: str, kind: IntentKind, by: str = "") -> Intent:
        """The operator's word: pause, resume, abort or rollback.

        Raises:
            NotFoundError: no such rollout. ConflictError: it has ended.
        """
        with self._database.write() as session:
            intent = rollouts.intend(session, name, kind, by)
        self.wake()
        return intent

    # -- the loop

    def run(self, stop: threading.Event, every_s: float = 1.0) -> None:
        """Tick until ``stop``. What a person can mend (disk full, database away) is logged, and tried again."""
        while not stop.is_set():
            try:
                self.tick()
            except EdgefleetError as exc:
                log.error("rollouts not carried on", extra={"code": exc.code, "reason": str(exc)})
            self._wake.wait(every_s)
            self._wake.clear()

    def wake(self) -> None:
        """Have the loop look now (also after ``stop`` was set)."""
        self._wake.set()

    def tick(self) -> list[tuple[str, Decision]]:
        """Carry every rollout as far as it goes now.

        Returns:
            (rollout, decision) in the order in which they were persisted.
        """
        with self._ticking:
            self._figures.flush()
            with self._database.read() as session:
                names = rollouts.to_work_on(session)
            done: list[tuple[str, Decision]] = []
            for name in names:
                while decisions := self._carry_on(name):
                    done += [(name, decision) for decision in decisions]
            self.publish()
            return done

    def publish(self) -> None:
        """Publish the assignments that are in force and not known to be published, and have the broker forget those that are withdrawn."""
        self._publish(rollouts.unpublished, lambda row: row.payload)
        self._publish(rollouts.withdrawn, lambda row: b"")

    def _publish(
        self, waiting_in: Callable[[Session], list[Assignment]], content: Callable[[Assignment], bytes]
    ) -> None:
        while True:
            with self._database.read() as session:
                waiting = waiting_in(session)
            sent: list[tuple[str, int]] = []
            try:
                for row in waiting:
                    if row.subject == Subject.AGENT.value:
                        self._publisher.publish_desired_agent(row.device, content(row))
                    else:
                        self._publisher.publish_desired(row.device, content(row))
                    sent.append((row.id, row.version))
            except TransportError as exc:
                log.warning("assignments not published", extra={"count": len(waiting) - len(sent), "reason": str(exc)})
            if sent:
                with self._database.write() as session:
                    rollouts.mark_published(session, sent)
            if not waiting or len(sent) < len(waiting):
                return

    def publish_all_again(self) -> None:
        """The broker may have lost its retained messages: every assignment in force is published anew by the loop."""
        with self._database.write() as session:
            rollouts.publish_all_again(session)
        self.wake()

    def renew_assignments(self, older_than_s: float) -> int:
        """Sign assignments in force anew that are older than that, so that none expires while its board is away.

        Not those of boards that follow one which this controller never gave, or that it has not heard of since it started: it may have been restored
        from a backup, and what is in force by that is what boards have left behind. Signed anew, they would go back to it.

        Returns:
            how many. The loop publishes them.
        """
        self._figures.flush()
        count, now, beyond = 0, self._clock.now(), (0.0, "")
        while True:
            with self._database.write() as session:
                self._database.serialise(session)
                old = rollouts.signed_before(session, now - older_than_s, self._started_at, beyond)
                renewed = []
                for row, reported in old:
                    beyond = (row.created_at, row.id)
                    followed = _followed(reported, Subject(row.subject))
                    if followed and not rollouts.is_known(session, followed):
                        log.warning("assignment not renewed", extra={"device": row.device, "assignment": followed})
                        continue
                    version = rollouts.next_version(session, row.device, now)
                    payload = self._director.renew(row.payload, version)
                    fields = {"version": version, "payload": payload, "payload_digest": digest_of(payload)}
                    renewed.append(Assignment(**(row.model_dump() | fields | {"created_at": now, "published": False})))
                rollouts.put_assignments(session, renewed)
            count += len(renewed)
            if not old:
                break
        if count:
            self.wake()
        return count

    def _carry_on(self, name: str) -> Sequence[Decision]:
        """Decide and persist once; returns what was persisted, nothing when the rollout rests."""
        now = self._clock.now()
        with self._database.read() as session:
            rollout, revision = rollouts.load(session, name)
            fleet = self._fleet.read(session, subject_of(rollout.spec.model), but_not_held_by=name)
        decisions = _first(engine.decide(rollout, fleet, now))
        if not decisions:
            return []
        try:
            return self._persist(rollout, revision, decisions, now)
        except ConflictError as exc:
            # Another controller, or the operator, was faster: look again at the next tick.
            log.info("rollout changed meanwhile", extra={"rollout": name, "reason": str(exc)})
            return []
        except _CannotAssign as exc:
            return self._hold(rollout, revision, str(exc), now)

    def _persist(self, rollout: Rollout, revision: int, decisions: list[Decision], now: float) -> list[Decision]:
        with self._database.write() as session:
            found: dict[str, Artifact | None] = {}
            signed: list[Assignment] = []
            kept: list[Decision] = []
            for decision in decisions:
                if not isinstance(decision, Assign):
                    kept.append(decision)
                    continue
                if decision.manifest not in found:
                    found[decision.manifest] = session.get(Artifact, decision.manifest)
                artifact = found[decision.manifest]
                if artifact is None and decision.back:
                    kept.append(Settle(progress=_cannot_return(decision)))
                    continue
                if artifact is None:
                    raise _CannotAssign(f"there is no artifact {decision.manifest}")
                version = rollouts.next_version(session, decision.progress.device, now)
                signed.append(self._sign(rollout, decision, artifact, version, now))
                kept.append(decision)
            after = engine.apply(rollout, kept, now)
            rollouts.put_assignments(session, signed)
            changed = [p for device, p in after.boards.items() if p is not rollout.boards[device]]
            rollouts.save(session, after, revision, changed)
        return kept

    def _sign(self, rollout: Rollout, decision: Assign, artifact: Artifact, version: int, now: float) -> Assignment:
        progress, spec = decision.progress, rollout.spec
        wanted = Wanted(
            id=progress.assignment, device=progress.device, device_class=artifact.device_class, rollout=rollout.name,
            model=artifact.model, version=artifact.version, manifest=artifact.manifest, size=artifact.manifest_bytes,
            issued_at=int(now), soak_s=math.ceil(spec.soak_s), timeout_s=math.ceil(board_time_s(rollout)), swap=artifact.swap,
        )  # fmt: skip
        try:
            payload = self._director.sign(wanted, version)
        except EdgefleetError as exc:
            raise _CannotAssign(f"the assignment of {progress.device} can't be signed: {exc}") from exc
        return Assignment(
            id=wanted.id, device=wanted.device, version=version, manifest=wanted.manifest, rollout=rollout.name,
            payload=payload, payload_digest=digest_of(payload), created_at=now, subject=wanted.subject.value,
        )  # fmt: skip

    def _hold(self, rollout: Rollout, revision: int, reason: str, now: float) -> list[Decision]:
        """The controller itself can't go on, which is no board's fault: a rollout on its way forward pauses and says why, one on
        its way back tries again at each tick."""
        log.error("rollout held up", extra={"rollout": rollout.name, "reason": reason})
        if rollout.phase not in _FORWARD:
            return []
        decisions: list[Decision] = [Enter(phase=Phase.PAUSED, reason=reason)]
        with self._database.write() as session:
            rollouts.save(session, engine.apply(rollout, decisions, now), revision, [])
        return decisions

    def _artifacts(self, spec: RolloutSpec) -> dict[str, TargetArtifact]:
        with self._database.read() as session:
            catalog.get_version(session, spec.model, spec.version)
            rows = catalog.list_artifacts(session, spec.model, spec.version, state="signed")
        if not rows:
            raise ConflictError(
                f"nothing of {spec.model} {spec.version} is compiled and signed", hint="fleet model compile comes first"
            )
        return {
            row.device_class: TargetArtifact(row.manifest, msgspec.json.decode(row.requirement, type=Requirement))
            for row in rows
        }


class _CannotAssign(Exception):
    """The decisions can't be carried out as a whole; the transaction is undone."""


def _first(decisions: list[Decision]) -> list[Decision]:
    """The decisions up to the limit of assignments. The engine decides the rest again."""
    count = 0
    for index, decision in enumerate(decisions):
        count += isinstance(decision, Assign)
        if count > MAX_ASSIGNMENTS_PER_COMMIT:
            return decisions[:index]
    return decisions


def _cannot_return(decision: Assign) -> Progress:
    return msgspec.structs.replace(
        decision.progress,
        standing=Standing.STUCK,
        back_reason=f"what it had before, {decision.manifest}, is not known here",
    )
