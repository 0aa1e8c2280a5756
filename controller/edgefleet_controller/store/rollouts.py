"""Rollouts and assignments in the database: the engine's frozen values to rows and back. Works in the caller's session."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from edgefleet_shared.assignment import Subject, subject_of
from edgefleet_shared.errors import ConflictError, NotFoundError
from sqlalchemy import literal, text, tuple_
from sqlmodel import Session, col, select

from edgefleet_controller import versions
from edgefleet_controller.rollout.views import (
    ENDED,
    Gate,
    Intent,
    IntentKind,
    Phase,
    Progress,
    Rollout,
    RolloutSpec,
    Standing,
    TargetArtifact,
    Track,
    Wave,
)
from edgefleet_controller.store.tables import Assignment, Device, RolloutRow

_ENDED = tuple(phase.value for phase in ENDED)
_STOPPING = (Phase.STOPPING.value, Phase.ROLLING_BACK.value)
_STOPS = (IntentKind.ABORT.value, IntentKind.ROLLBACK.value)


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine remembers of a rollout beside its boards."""

    waves: tuple[Wave, ...]
    tracks: dict[str, Track]
    gates: tuple[Gate, ...]
    after_stop: Phase
    undo_wave: int


def add(session: Session, rollout: Rollout) -> None:
    """Store a new rollout.

    Raises:
        ConflictError: there is one of that name.
    """
    if session.get(RolloutRow, rollout.name) is not None:
        raise ConflictError(f"there is a rollout {rollout.name!r} already", hint="choose another name")
    row = RolloutRow(
        name=rollout.name, model=rollout.spec.model, version=rollout.spec.version, spec=_text(rollout.spec),
        artifacts=_text(rollout.artifacts), phase=rollout.phase.value, state=_state(rollout),
        created_at=rollout.created_at,
    )  # fmt: skip
    session.add(row)
    session.flush()
    _put_boards(session, rollout.name, rollout.boards.values())


def load(session: Session, name: str) -> tuple[Rollout, int]:
    """A rollout and its revision.

    Raises:
        NotFoundError: there is none of that name.
    """
    row = session.get(RolloutRow, name)
    if row is None:
        raise NotFoundError(f"no rollout {name!r}", hint="fleet rollout list shows them")
    state = msgspec.json.decode(row.state, type=_State)
    found = session.connection().execute(
        text("SELECT progress FROM rollout_board WHERE rollout = :name ORDER BY device"), {"name": name}
    )
    boards = [_progress.decode(content) for content in found.scalars()]
    rollout = Rollout(
        name=row.name,
        spec=msgspec.json.decode(row.spec, type=RolloutSpec),
        waves=state.waves,
        artifacts=msgspec.json.decode(row.artifacts, type=dict[str, TargetArtifact]),
        boards={p.device: p for p in boards},
        tracks=state.tracks,
        phase=Phase(row.phase),
        reason=row.reason,
        gates=state.gates,
        intent=Intent(kind=IntentKind(row.intent), number=row.intent_number, by=row.intent_by),
        intent_seen=row.intent_seen,
        after_stop=state.after_stop,
        undo_wave=state.undo_wave,
        created_at=row.created_at,
        ended_at=row.ended_at,
    )
    return rollout, row.revision


def save(session: Session, rollout: Rollout, revision: int, changed: Iterable[Progress]) -> None:
    """Store what the engine decided. The operator's intent is not written: it may have changed meanwhile.

    Raises:
        ConflictError: the rollout was changed by someone else since ``revision``.
    """
    result = session.connection().execute(
        text(
            "UPDATE rollout SET phase = :phase, reason = :reason, state = :state, intent_seen = :seen, "
            "ended_at = :ended, revision = :next WHERE name = :name AND revision = :revision"
        ),
        {
            "phase": rollout.phase.value, "reason": rollout.reason, "state": _state(rollout),
            "seen": rollout.intent_seen, "ended": rollout.ended_at, "next": revision + 1, "name": rollout.name,
            "revision": revision,
        },
    )  # fmt: skip
    if result.rowcount != 1:
        raise ConflictError(f"rollout {rollout.name} was changed by another controller meanwhile")
    _put_boards(session, rollout.name, changed)


def rows(session: Session) -> list[RolloutRow]:
    """Every rollout, oldest first."""
    return list(session.exec(select(RolloutRow).order_by(col(RolloutRow.created_at), RolloutRow.name)))


def to_work_on(session: Session) -> list[str]:
    """The names of rollouts that have not ended, or whose operator has said something since; oldest first."""
    found = session.connection().execute(
        text(
            "SELECT name, phase, intent_number, intent_seen FROM rollout ORDER BY created_at, name",
        )
    )
    return [name for name, phase, number, seen in found if phase not in _ENDED or number > seen]


def holders(session: Session, subject: Subject = Subject.MODEL) -> dict[str, str]:
    """For every board that an unfinished rollout about ``subject`` has selected, that rollout's name."""
    found = session.connection().execute(
        text(
            "SELECT b.device, b.rollout, r.phase, b.standing, r.model FROM rollout_board b "
            "JOIN rollout r ON r.name = b.rollout"
        )
    )
    return {
        device: rollout
        for device, rollout, phase, standing, model in found
        if phase not in _ENDED and standing != Standing.EXCLUDED.value and subject_of(model) is subject
    }


def intend(session: Session, name: str, kind: IntentKind, by: str = "") -> Intent:
    """Note the operator's word for the engine.

    Raises:
        NotFoundError: there is no such rollout.
        ConflictError: it has ended (a roll-back is possible even then), or it is stopping, and what is asked for would change nothing, or undo
            a stop that somebody asked for and the engine has not heard of yet.
    """
    row = session.get(RolloutRow, name, with_for_update=True)  # of two operators one waits for the other
    if row is None:
        raise NotFoundError(f"no rollout {name!r}", hint="fleet rollout list shows them")
    if row.phase in _ENDED and kind is not IntentKind.ROLLBACK:
        raise ConflictError(f"rollout {name} has ended: {row.phase}", hint="only rollback is possible now")
    if kind in (IntentKind.PAUSE, IntentKind.RESUME):
        if row.intent_number > row.intent_seen and row.intent in _STOPS:
            by = f" by {row.intent_by}" if row.intent_by else ""
            raise ConflictError(
                f"rollout {name}: {row.intent}{by} was asked for", hint="fleet rollout status tells how far it is"
            )
        if row.phase in _STOPPING:
            raise ConflictError(
                f"rollout {name} is {row.phase}: it can't {kind.value} any more",
                hint="when it has ended, start another one: fleet rollout create",
            )
    # In SQL, not through the row: the engine writes its own columns of it at the same time.
    session.connection().execute(
        text(
            "UPDATE rollout SET intent = :kind, intent_by = :by, intent_number = intent_number + 1 WHERE name = :name"
        ),
        {"kind": kind.value, "by": by, "name": name},
    )
    session.refresh(row)
    return Intent(kind=kind, number=row.intent_number, by=by)


# ------------------------------------------------------------------------------------------------------------- assignments

_IN_FORCE = {
    Subject.MODEL: "UPDATE device SET assignment = :id WHERE name = :device",
    Subject.AGENT: "UPDATE device SET agent_assignment = :id WHERE name = :device",
}
_PUT_ASSIGNMENT = """
INSERT INTO assignment (id, device, version, manifest, rollout, payload, payload_digest, created_at, published, subject)
VALUES (:id, :device, :version, :manifest, :rollout, :payload, :payload_digest, :created_at, :published, :subject)
ON CONFLICT (id) DO UPDATE SET version = excluded.version, manifest = excluded.manifest, payload = excluded.payload,
payload_digest = excluded.payload_digest, created_at = excluded.created_at, published = excluded.published
"""


def next_version(session: Session, device: str, now: float) -> int:
    """The next assignment version of a board (see :mod:`edgefleet_controller.versions`). It only rises, and counts in the session's transaction.

    Raises:
        NotFoundError: no such board.
    """
    found = session.connection().execute(
        text(
            "UPDATE device SET assignment_version = CASE WHEN assignment_version >= :least THEN assignment_version + 1 ELSE :least END "
            "WHERE name = :name RETURNING assignment_version"
        ),
        {"name": device, "least": versions.least(now)},
    )
    version = found.scalar_one_or_none()
    if version is None:
        raise NotFoundError(f"no device {device!r}")
    return int(version)


def put_assignments(session: Session, assignments: Iterable[Assignment]) -> None:
    """Store signed assignments and put them in force. Signing one anew, before it expires, replaces its bytes and version."""
    given = [row.model_dump() for row in assignments]
    if given:
        connection = session.connection()
        connection.execute(text(_PUT_ASSIGNMENT), given)
        for subject, statement in _IN_FORCE.items():
            named = [{"id": row["id"], "device": row["device"]} for row in given if row["subject"] == subject.value]
            if named:
                connection.execute(text(statement), named)


def get_assignment(session: Session, assignment: str) -> Assignment:
    row = session.get(Assignment, assignment)
    if row is None:
        raise NotFoundError(f"no assignment {assignment!r}")
    return row


_WAITING = (
    "SELECT a.id FROM assignment a JOIN device d ON a.device = d.name "
    "WHERE NOT a.published AND {0} ORDER BY a.created_at, a.id LIMIT :limit"
)
_UNPUBLISHED = _WAITING.format("a.id IN (d.assignment, d.agent_assignment) AND NOT d.revoked")
_WITHDRAWN = _WAITING.format(
    "(d.revoked OR (CASE a.subject WHEN 'agent' THEN d.agent_assignment ELSE d.assignment END) = '') AND a.version = "
    "(SELECT max(b.version) FROM assignment b WHERE b.device = a.device AND b.subject = a.subject)"
)


def unpublished(session: Session, limit: int = 1000) -> list[Assignment]:
    """Assignments in force that the broker has not taken yet, oldest first."""
    return _waiting(session, _UNPUBLISHED, limit)


def withdrawn(session: Session, limit: int = 1000) -> list[Assignment]:
    """Assignments of boards of which nothing is wanted any more, about that subject, which the broker has not forgotten yet: the newest
    of each. A revoked board's, and those for the class that a name had before it was another board's."""
    return _waiting(session, _WITHDRAWN, limit)


def _waiting(session: Session, statement: str, limit: int) -> list[Assignment]:
    names = list(session.connection().execute(text(statement), {"limit": limit}).scalars())
    rows = session.exec(select(Assignment).where(col(Assignment.id).in_(names))).all() if names else []
    by_name = {row.id: row for row in rows}
    return [by_name[name] for name in names]


def signed_before(
    session: Session, before: float, heard_since: float, beyond: tuple[float, str], limit: int = 500
) -> list[tuple[Assignment, str]]:
    """Assignments in force that were signed before then (seconds since 1970), of boards that were heard of since ``heard_since``; each with the
    board's last report.

    Args:
        beyond: signed when and named how the last one was that is known already; oldest first.
    """
    signed, name = col(Assignment.created_at), col(Assignment.id)
    query = (
        select(Assignment, Device.reported)
        .join(Device, name.in_([col(Device.assignment), col(Device.agent_assignment)]))
        .where(signed < before, tuple_(signed, name) > tuple_(*map(literal, beyond)), col(Device.revoked).is_(False))
        .where(col(Device.reported_at) >= heard_since)
        .order_by(signed, name)
        .limit(limit)
    )
    return [(assignment, reported) for assignment, reported in session.exec(query)]


def is_known(session: Session, assignment: str) -> bool:
    """Whether it was ever given by this controller."""
    return session.get(Assignment, assignment) is not None


def mark_published(session: Session, assignments: Iterable[tuple[str, int]]) -> None:
    """Note that the broker took these (id, version)."""
    given = [{"id": name, "version": version} for name, version in assignments]
    if given:
        session.connection().execute(
            text("UPDATE assignment SET published = true WHERE id = :id AND version = :version"), given
        )


def publish_all_again(session: Session) -> int:
    """Mark every assignment in force as not published, and withdrawn ones as not withdrawn: the broker lost its retained messages, or has
    some that it had forgotten. Returns how many."""
    result = session.connection().execute(
        text(
            "UPDATE assignment SET published = false "
            "WHERE id IN (SELECT assignment FROM device UNION SELECT agent_assignment FROM device) "
            "OR (subject = 'agent' AND device IN (SELECT name FROM device WHERE agent_assignment = '')) "
            "OR (subject <> 'agent' AND device IN (SELECT name FROM device WHERE assignment = ''))"
        )
    )
    return int(result.rowcount)


# ---------------------------------------------------------------------------------------------------------------- the rest

_progress = msgspec.json.Decoder(Progress)


def _put_boards(session: Session, rollout: str, boards: Iterable[Progress]) -> None:
    given = [
        {"rollout": rollout, "device": p.device, "standing": p.standing.value, "progress": _text(p)} for p in boards
    ]
    if given:
        session.connection().execute(
            text(
                "INSERT INTO rollout_board (rollout, device, standing, progress) "
                "VALUES (:rollout, :device, :standing, :progress) ON CONFLICT (rollout, device) "
                "DO UPDATE SET standing = excluded.standing, progress = excluded.progress"
            ),
            given,
        )


def _state(rollout: Rollout) -> str:
    return _text(
        _State(
            waves=rollout.waves, tracks=rollout.tracks, gates=rollout.gates, after_stop=rollout.after_stop,
            undo_wave=rollout.undo_wave,
        )
    )  # fmt: skip


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
