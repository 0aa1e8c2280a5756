"""Stage 9, health: events into the database. Receives batches, hands on what is durable: the acknowledgements.

Written as SQL, not by the ORM: SQLModel's ``add_all`` costs 25 times as much per row. Each (device, boot, sequence) is stored once,
whatever the network repeats. Sequence numbers begin at 1 with each boot.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from edgefleet_shared.messages import Ack, Dropped, Event
from sqlalchemy import bindparam, text
from sqlmodel import Session, col, select

from edgefleet_controller.store.tables import EventRow

BATCH = 500

_COLUMNS = "device, boot, sequence, kind, at, received_at, body"
_SQLITE = f"INSERT INTO event ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"  # noqa: S608
# One statement and one JSON parameter for the whole batch: an executemany, or arrays made by psycopg, cost several times as much.
_POSTGRESQL = (
    f"INSERT INTO event ({_COLUMNS}) SELECT {_COLUMNS} FROM json_to_recordset(%s::json) AS e(device text, boot text, "  # noqa: S608
    "sequence bigint, kind text, at float8, received_at float8, body text) ON CONFLICT DO NOTHING"
)
_FLOOR = text(
    "INSERT INTO event_floor (device, boot, contiguous, highest) VALUES (:device, :boot, :contiguous, :highest) "
    "ON CONFLICT (device, boot) DO UPDATE SET contiguous = :contiguous, highest = :highest"
)


def insert(session: Session, events: Sequence[Event], received_at: float) -> dict[str, list[Ack]]:
    """Store events in the session's transaction.

    Returns:
        by device, for every boot in the batch, up to where its events are stored without a gap. True once the transaction is
        committed, not before. What the agent itself gave up (``Dropped``) is no gap.
    """
    if not events:
        return {}
    rows = [
        (
            e.device,
            e.boot,
            e.sequence,
            e.body.__struct_config__.tag,
            e.at,
            received_at,
            msgspec.json.encode(e.body).decode(),
        )
        for e in events
    ]
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_SQLITE, rows)
    else:
        names = _COLUMNS.split(", ")
        content = msgspec.json.encode([dict(zip(names, row, strict=True)) for row in rows]).decode()
        connection.exec_driver_sql(_POSTGRESQL, (content,))
    batch = _by_boot(events)
    floors = _floors(session, sorted({device for (device, _), _, _ in batch}))
    moved: list[dict[str, object]] = []
    acks: dict[str, list[Ack]] = {}
    for (device, boot), sequences, given_up in batch:
        before = floors.get((device, boot), (0, 0))
        floor, highest = _advance(session, device, boot, sequences, given_up, before)
        if (floor, highest) != before:
            moved.append({"device": device, "boot": boot, "contiguous": floor, "highest": highest})
        acks.setdefault(device, []).append(Ack(boot, floor))
    if moved:
        connection.execute(_FLOOR, moved)
    return acks


def _by_boot(events: Sequence[Event]) -> list[tuple[tuple[str, str], list[int], int]]:
    sequences: dict[tuple[str, str], set[int]] = {}
    given_up: dict[tuple[str, str], int] = {}
    for event in events:
        sequences.setdefault((event.device, event.boot), set()).add(event.sequence)
        if isinstance(event.body, Dropped):
            # A start of the agent also speaks for those before it.
            boot, up_to = event.body.earlier or (event.boot, event.body.up_to)
            sequences.setdefault((event.device, boot), set())
            given_up[event.device, boot] = max(given_up.get((event.device, boot), 0), up_to)
    return [(key, sorted(found), given_up.get(key, 0)) for key, found in sorted(sequences.items())]


def _floors(session: Session, names: list[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """By (device, boot): up to where events are stored without a gap, and the highest that is stored."""
    query = text("SELECT device, boot, contiguous, highest FROM event_floor WHERE device IN :names")
    found = session.connection().execute(query.bindparams(bindparam("names", expanding=True)), {"names": names})
    return {(device, boot): (int(contiguous), int(highest)) for device, boot, contiguous, highest in found}


def _advance(
    session: Session, device: str, boot: str, sequences: list[int], given_up: int, before: tuple[int, int]
) -> tuple[int, int]:
    """The boot's floor and highest sequence number after what was just stored; 0 while nothing is contiguous yet."""
    contiguous, highest = before
    floor = max(contiguous, given_up)
    if highest > contiguous:
        # There was a gap: what this batch fills may join with events that were stored behind it.
        query = text(
            "SELECT sequence FROM event WHERE device = :device AND boot = :boot AND sequence > :floor ORDER BY sequence"
        )
        found = session.connection().execute(query, {"device": device, "boot": boot, "floor": floor}).scalars()
        sequences = [int(sequence) for sequence in found]
    for sequence in sequences:
        if sequence == floor + 1:
            floor = sequence
        elif sequence > floor:
            break
    return floor, max(highest, floor, *sequences[-1:])


def recent(session: Session, device: str = "", kind: str = "", limit: int = 100) -> list[EventRow]:
    """The newest events, newest first; of one device or one kind where given."""
    query = select(EventRow).order_by(col(EventRow.received_at).desc(), col(EventRow.sequence).desc()).limit(limit)
    if device:
        query = query.where(EventRow.device == device)
    if kind:
        query = query.where(EventRow.kind == kind)
    return list(session.exec(query))


def purge(session: Session, before: float) -> int:
    """Delete events received before that time; the floors stay. Returns how many."""
    result = session.connection().execute(text("DELETE FROM event WHERE received_at < :before"), {"before": before})
    return int(result.rowcount)
