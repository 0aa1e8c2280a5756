"""Device classes, boards and enrolment tokens in the database: get, list, put. Every function works in the caller's session."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

import msgspec
from edgefleet_shared.errors import ConflictError, InputError, NotFoundError, TrustError
from edgefleet_shared.topics import check_name
from sqlalchemy import bindparam, text
from sqlmodel import Session, col, select

from edgefleet_controller.store.tables import Device, DeviceClass, EnrolmentToken

MAX_LABELS, MAX_LABEL_CHARACTERS = 64, 63


class ReportedRow(msgspec.Struct, frozen=True):
    """A board's ``reported`` message as it is stored: ``content`` is its JSON, ``proof`` what is known about its result (JSON),
    ``signed`` whether that is signed: from then on the board must sign. ``agent_`` is the same about its agent's result."""

    device: str
    boot: str
    content: str
    at: float
    proof: str = ""
    signed: bool = False
    agent_proof: str = ""
    agent_signed: bool = False


class PresenceRow(msgspec.Struct, frozen=True):
    device: str
    boot: str
    online: bool
    at: float


# ---------------------------------------------------------------------------------------------------------- device classes


def put_class(session: Session, name: str, spec: str, now: float) -> DeviceClass:
    """Create or replace a device class; ``spec`` is JSON."""
    check_name(name, "device class")
    row = session.get(DeviceClass, name)
    if row is None:
        row = DeviceClass(name=name, spec=spec, created_at=now)
    row.spec = spec
    session.add(row)
    return row


def get_class(session: Session, name: str) -> DeviceClass:
    """Raises:
    NotFoundError: there is none of that name."""
    row = session.get(DeviceClass, name)
    if row is None:
        known = ", ".join(c.name for c in list_classes(session)) or "none"
        raise NotFoundError(f"no device class {name!r}", hint=f"known: {known}")
    return row


def list_classes(session: Session) -> list[DeviceClass]:
    return list(session.exec(select(DeviceClass).order_by(DeviceClass.name)))


# ------------------------------------------------------------------------------------------------------------------ boards


def enrol(
    session: Session,
    name: str,
    device_class: str,
    *,
    site: str = "",
    certificate_serial: str = "",
    must_sign: bool = True,
    now: float,
) -> Device:
    """Take a board into the fleet.

    Args:
        must_sign: whether a result without a signature is nobody's word.

    Raises:
        InputError: the name is not usable.
        NotFoundError: no such device class.
        ConflictError: a board of that name is enrolled already and was not revoked.
    """
    check_name(name, "device")
    get_class(session, device_class)
    row = session.get(Device, name)
    if row is not None and not row.revoked:
        raise ConflictError(
            f"device {name} is enrolled already",
            hint=f"revoke it first: fleet device revoke {name}; or choose another name",
        )
    if row is None:
        row = Device(name=name, device_class=device_class, enrolled_at=now)
    _say_again(session, row)
    if row.device_class != device_class:  # what the name was assigned is made for the class that it had
        row.assignment = row.agent_assignment = ""
        row.reported, row.reported_at, row.boot = "", 0.0, ""  # and another board's words
    # A board that comes back after it was revoked keeps its assignment counter: signed versions only rise.
    row.device_class, row.site, row.revoked, row.enrolled_at = device_class, site, False, now
    row.certificate_serial = certificate_serial
    # What was known of its results was said by another key.
    row.must_sign = row.agent_must_sign = must_sign
    row.proof = row.agent_proof = ""
    session.add(row)
    session.flush()
    return row


def get_device(session: Session, name: str) -> Device:
    """Raises:
    NotFoundError: there is none of that name."""
    row = session.get(Device, name)
    if row is None:
        raise NotFoundError(f"no device {name!r}", hint="fleet device list shows them")
    return row


def list_devices(session: Session, device_class: str = "", site: str = "") -> list[Device]:
    query = select(Device).order_by(Device.name)
    if device_class:
        query = query.where(Device.device_class == device_class)
    if site:
        query = query.where(Device.site == site)
    return list(session.exec(query))


def change_labels(session: Session, name: str, changes: dict[str, str | None]) -> dict[str, str]:
    """Set these labels of a board, or take them away (None); the others stay. They are its name's, also when that is enrolled anew.

    Returns:
        all that it has now, by key.

    Raises:
        NotFoundError: no such board. InputError: a label that can't be one, or too many.
    """
    for key, value in changes.items():
        check_name(key, "label")
        if value is not None and (len(value) > MAX_LABEL_CHARACTERS or not value.isprintable()):
            raise InputError(
                f"the value of label {key} is not usable",
                hint=f"up to {MAX_LABEL_CHARACTERS} characters that can be printed",
            )
    row = session.get(Device, name, with_for_update=True) or get_device(session, name)
    labels = msgspec.json.decode(row.labels, type=dict[str, str | None]) | changes
    kept = {key: value for key, value in sorted(labels.items()) if value is not None}
    if len(kept) > MAX_LABELS:
        raise InputError(f"device {name} would have {len(kept)} labels, {MAX_LABELS} are possible")
    row.labels = msgspec.json.encode(kept).decode()
    session.add(row)
    return kept


def renew(session: Session, name: str, certificate_serial: str) -> Device:
    """Note the serial number of a board's new certificate.

    Raises:
        NotFoundError: no such board.
        TrustError: it was revoked.
    """
    row = get_device(session, name)
    if row.revoked:
        raise TrustError("certificate", f"device {name} was revoked")
    row.certificate_serial = certificate_serial
    session.add(row)
    return row


def revoke(session: Session, name: str) -> Device:
    """Take a board out of the fleet; its name is free for another enrolment.

    Raises:
        NotFoundError: no such board.
    """
    row = get_device(session, name)
    row.revoked, row.online = True, False
    session.add(row)
    session.flush()
    _say_again(session, row)
    return row


def _say_again(session: Session, row: Device) -> None:
    """What the broker retains for the board is not what it is to find any more: of what it was assigned, all or nothing."""
    session.connection().execute(
        text("UPDATE assignment SET published = false WHERE id IN (:model, :agent)"),
        {"model": row.assignment, "agent": row.agent_assignment},
    )


# The next three take batches from the intake, as SQL: they run for every message of every board.


def put_reported(session: Session, rows: Iterable[ReportedRow]) -> None:
    """Store what boards report; a board that is not enrolled is passed over."""
    given = [msgspec.structs.asdict(row) for row in rows]
    if given:
        session.connection().execute(
            text(
                "UPDATE device SET reported = :content, reported_at = :at, boot = :boot, proof = :proof, "
                "must_sign = (must_sign OR :signed), agent_proof = :agent_proof, "
                "agent_must_sign = (agent_must_sign OR :agent_signed) WHERE name = :device"
            ),
            given,
        )


def holders(session: Session, names: Iterable[str]) -> dict[str, tuple[float, str, str]]:
    """(enrolled_at, proof, agent_proof) of boards that are enrolled and not revoked."""
    query = text("SELECT name, enrolled_at, proof, agent_proof FROM device WHERE NOT revoked AND name IN :names")
    found = session.connection().execute(query.bindparams(bindparam("names", expanding=True)), {"names": list(names)})
    return {name: (float(enrolled_at), proof, agent_proof) for name, enrolled_at, proof, agent_proof in found}


def put_presence(session: Session, rows: Iterable[PresenceRow]) -> None:
    """Store who is online. An ``offline`` of another boot than the board's present one is an old session's last will that
    came late, and is passed over."""
    given = [{"device": r.device, "boot": r.boot} for r in rows if r.online]
    gone = [{"device": r.device, "boot": r.boot} for r in rows if not r.online]
    if given:
        session.connection().execute(
            text("UPDATE device SET online = true, boot = :boot WHERE name = :device AND NOT revoked"), given
        )
    if gone:
        session.connection().execute(
            text("UPDATE device SET online = false WHERE name = :device AND (boot = :boot OR boot = '' OR :boot = '')"),
            gone,
        )


def put_seen(session: Session, seen: dict[str, float]) -> None:
    """Store when boards were last heard of, by device; never backwards."""
    given = [{"device": device, "at": at} for device, at in seen.items()]
    if given:
        session.connection().execute(
            text("UPDATE device SET last_seen = :at WHERE name = :device AND last_seen < :at"), given
        )


def put_figures(session: Session, figures: dict[str, str]) -> None:
    """Store the intake's health figures (JSON) by device."""
    given = [{"device": device, "figures": content} for device, content in figures.items()]
    if given:
        session.connection().execute(text("UPDATE device SET figures = :figures WHERE name = :device"), given)


def all_figures(session: Session) -> dict[str, str]:
    """The stored health figures (JSON) of every board that has any."""
    rows = session.connection().execute(text("SELECT name, figures FROM device WHERE figures <> ''"))
    return {str(row[0]): str(row[1]) for row in rows}


# ------------------------------------------------------------------------------------------------------- enrolment tokens


def new_token(
    session: Session, device_class: str, *, site: str = "", label: str = "", ttl_s: float = 3600.0, now: float,
    role: str = "device",
) -> str:  # fmt: skip
    """Make a one-time enrolment token. It is returned once; only its hash is stored.

    Args:
        device_class: of the board; of a worker only where it is a builder board.
        role: device or worker.

    Raises:
        NotFoundError: no such device class.
    """
    if device_class or role == "device":
        get_class(session, device_class)
    token = secrets.token_urlsafe(24)
    session.add(
        EnrolmentToken(
            sha256=_hash(token),
            role=role,
            device_class=device_class or None,
            site=site,
            label=label,
            created_at=now,
            expires_at=now + ttl_s,
        )
    )
    return token


def use_token(session: Session, token: str, device: str, now: float) -> EnrolmentToken:
    """Spend a token: it is valid once, even if two boards show it at the same time.

    Raises:
        TrustError: unknown, spent or expired. It does not say which to the board; the log has the row.
    """
    hashed = _hash(token)
    row = session.get(EnrolmentToken, hashed)
    if row is None or not hmac.compare_digest(row.sha256, hashed):
        raise TrustError("enrolment_token", "the enrolment token is not valid", hint="ask for a new one")
    spent = session.connection().execute(
        text(
            "UPDATE enrolment_token SET used_at = :now, used_by = :device "
            "WHERE sha256 = :hash AND used_at IS NULL AND expires_at > :now"
        ),
        {"now": now, "device": device, "hash": hashed},
    )
    if spent.rowcount != 1:
        raise TrustError("enrolment_token", "the enrolment token is not valid", hint="ask for a new one")
    session.refresh(row)
    return row


def spent_token(session: Session, token: str, now: float) -> EnrolmentToken | None:
    """A token that was spent and has not expired; None when there is no such."""
    row = session.get(EnrolmentToken, _hash(token))
    return row if row is not None and row.certificate and row.expires_at > now else None


def list_tokens(session: Session) -> list[EnrolmentToken]:
    return list(session.exec(select(EnrolmentToken).order_by(col(EnrolmentToken.created_at))))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
