"""Workers in the database: get, list, put. Every function works in the caller's session."""

from __future__ import annotations

from edgefleet_shared.errors import ConflictError, NotFoundError, TrustError
from edgefleet_shared.topics import check_name
from sqlmodel import Session, col, select

from edgefleet_controller.store import devices
from edgefleet_controller.store.tables import Worker

RENEWED_KEPT = 8  # of the certificates that were given in place of one


def enrol(session: Session, name: str, device_class: str, *, certificate_serial: str, now: float) -> Worker:
    """Take a worker in.

    Args:
        device_class: of a builder board; empty for a worker that compiles.

    Raises:
        InputError: the name is not usable. NotFoundError: no such class.
        ConflictError: a worker of that name is there already and was not revoked.
    """
    check_name(name, "worker")
    if device_class:
        devices.get_class(session, device_class)
    row = session.get(Worker, name)
    if row is not None and not row.revoked:
        raise ConflictError(f"worker {name} is enrolled already", hint="revoke it first: fleet worker revoke")
    row = row or Worker(name=name, certificate_serial="", enrolled_at=now)
    row.device_class, row.certificate_serial = device_class or None, certificate_serial
    row.renewed_serial, row.revoked, row.enrolled_at = "", False, now
    session.add(row)
    session.flush()
    return row


def get_worker(session: Session, name: str) -> Worker:
    """Raises:
    NotFoundError: there is none of that name."""
    row = session.get(Worker, name)
    if row is None:
        raise NotFoundError(f"no worker {name!r}", hint="fleet worker list shows them")
    return row


def check(session: Session, name: str, certificate_serial: str) -> Worker:
    """The worker of a certificate.

    Raises:
        TrustError: there is none of that name, it was revoked, or it has another certificate by now.
    """
    row = session.get(Worker, name)
    if (
        row is None
        or row.revoked
        or not certificate_serial
        or certificate_serial not in (row.certificate_serial, *row.renewed_serial.split())
    ):
        raise TrustError(
            "worker",
            f"{name or 'this caller'} is no worker of this fleet",
            hint="fleet worker list shows them; one that was revoked comes back by another token",
        )
    return row


def renew(session: Session, name: str, shown_serial: str, renewed_serial: str) -> Worker:
    """Note the serial number of the certificate that a worker is given in place of the one that it has shown. That one counts on: the
    new one may get lost on its way. So do those that it was given before in its place: which one reaches it last is not said.

    Raises:
        TrustError: as :func:`check`.
    """
    session.get(Worker, name, with_for_update=True)  # of two at once one waits for the other
    row = check(session, name, shown_serial)
    given = row.renewed_serial.split() if shown_serial == row.certificate_serial else []
    row.certificate_serial, row.renewed_serial = shown_serial, " ".join([*given, renewed_serial][-RENEWED_KEPT:])
    session.add(row)
    return row


def seen(session: Session, name: str, edgefleet: str, now: float) -> None:
    """Note that a worker was heard of, and the version that it says it runs."""
    row = get_worker(session, name)
    row.last_seen, row.edgefleet = now, edgefleet
    session.add(row)


def list_workers(session: Session) -> list[Worker]:
    return list(session.exec(select(Worker).order_by(Worker.name)))


def compilers(session: Session, edgefleet: str, seen_since: float) -> list[Worker]:
    """Workers that compile by that version, and were heard of lately."""
    query = select(Worker).where(
        col(Worker.device_class).is_(None), col(Worker.revoked).is_(False),
        Worker.edgefleet == edgefleet, Worker.last_seen >= seen_since,
    )  # fmt: skip
    return list(session.exec(query))


def builders(session: Session, device_class: str, seen_since: float) -> list[Worker]:
    """Builder boards of a class that were heard of lately."""
    query = select(Worker).where(
        Worker.device_class == device_class, col(Worker.revoked).is_(False), Worker.last_seen >= seen_since
    )
    return list(session.exec(query))


def revoke(session: Session, name: str) -> Worker:
    """Take a worker's rights; what it holds a lease on is given to others once that ends."""
    row = get_worker(session, name)
    row.revoked = True
    session.add(row)
    return row
