"""Identity: the board's enrolment. Receives a one-time token, hands on a certificate and the first trusted root.

How the certificate is asked for is :mod:`edgefleet_shared.enrolling`. The private key is made here and never leaves the board. One-shot:
cryptography is imported here.
"""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_shared import atomic, enrolling
from edgefleet_shared.errors import ConflictError, EnvironmentProblem
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.messages import Enrolled

from edgefleet_agent import settings as board_settings
from edgefleet_agent.settings import Settings

ROOM_BYTES = 256 * 1024  # for all that the controller gives, however large the fleet's root is


def enroll(
    state: Path, url: str, token: str, device: str = "", *, threads: int = 1, health_period_s: float = 10.0,
    again: bool = False,
) -> Settings:  # fmt: skip
    """Enrol this board and keep what it was given.

    Args:
        again: a board that is enrolled, as the one that it is: models, floors and limits stay.
        url: the controller, ``https://host:port``.
        token: ``efe.<sha256 of the CA>.<secret>``, from ``fleet device token``.
        device: the wished name; empty when the token fixes it.

    Raises:
        InputError: the token or the URL can't be one. ConflictError: already enrolled, as another board, or in another fleet; the agent runs.
        TrustError: the controller is not the one that the token names. TransportError: not reachable.
        EdgefleetError: the controller refuses, in its own words.
    """
    atomic.make_folder(state, 0o700)
    with atomic.lock(state, "fleet-agent enroll"):
        before = _enrolled(state)
        if before is not None and not again:
            raise ConflictError(
                f"{state} is enrolled already, as {before.device}",
                hint="to enrol that board again, with what it serves: --again; for another one choose another --state",
            )
        if before is not None and device not in ("", before.device):
            raise ConflictError(
                f"the board in {state} is {before.device}, not {device}",
                hint="choose another --state for another board",
            )
        if before is not None and not _may_be_of(state, enrolling.named_ca(token)):
            raise ConflictError(
                f"{before.device} is of another fleet than the token; what it trusts and may not fall behind is that one's",
                hint="to take it into this fleet choose another --state",
            )
        enrolled, ca = enrolling.ask(url, token, before.device if before else device, lambda: prepare(state))
        return keep(state, enrolled, ca, threads=threads, health_period_s=health_period_s, before=before)


def _enrolled(state: Path) -> Settings | None:
    """What an enrolment left here; None when there is none, or a damaged one, whose place another may take.

    Raises:
        EnvironmentProblem: it can't be read, or was changed by hand to what it can't be.
    """
    try:
        return board_settings.read(state)
    except EnvironmentProblem as exc:
        if isinstance(exc.__cause__, msgspec.ValidationError):
            raise
        if isinstance(exc.__cause__, (FileNotFoundError, *MALFORMED)):
            return None
        raise


def _may_be_of(state: Path, fingerprint: str) -> bool:
    """Whether the board's fleet has the CA of this sha256 (hex); so it may be where what the board kept of it is lost or damaged."""
    try:
        der = ssl.PEM_cert_to_DER_cert(atomic.read(state / "identity" / "ca.pem").decode())
    except (FileNotFoundError, EnvironmentProblem, ValueError):
        return True
    return hashlib.sha256(der).hexdigest() == fingerprint


def prepare(state: Path, *, files: FileSystem = DISK) -> ec.EllipticCurvePrivateKey:
    """Make the folders and the key, durably, before the token is used up: a disk that is full, or can't hold what the controller will give,
    fails here, where nothing is lost.

    Raises:
        EnvironmentProblem: the disk refused.
    """
    for folder in ("identity", "trust", "metadata", "run"):
        atomic.make_folder(state / folder, 0o700, files=files)
    key = enrolling.kept_key(state / "identity" / "agent.key", files=files)
    with atomic.disk_errors(state, "measure"):
        free = files.free_bytes(state)
    if free < ROOM_BYTES:
        raise EnvironmentProblem(
            f"an enrolment needs {ROOM_BYTES} bytes, {free} are free on the disk",
            hint="free some space, then try again; the token was not used",
        )
    return key


def keep(
    state: Path, enrolled: Enrolled, ca: str, *, threads: int, health_period_s: float, before: Settings | None = None,
    files: FileSystem = DISK,
) -> Settings:  # fmt: skip
    """Keep what the controller gave: a board that is cut off on the way is not enrolled yet, one that returns is. The limits are those of
    ``before`` where there was an enrolment.

    Raises:
        EnvironmentProblem: the disk refused.
    """
    given = {
        name: getattr(enrolled, name)
        for name in ("device", "device_class", "site", "broker_host", "broker_port", "api_host", "api_port")
    }
    if before is None:
        settings = Settings(**given, threads=threads, health_period_s=health_period_s)
    else:
        settings = msgspec.structs.replace(before, **given)
    atomic.write(state / "identity" / "agent.pem", enrolled.certificate.encode(), files=files)
    atomic.write(state / "identity" / "ca.pem", ca.encode(), files=files)
    atomic.write(state / "trust" / "root.json", enrolled.root.encode(), files=files)
    # Last: this file says that the rest is there.
    board_settings.write(state, settings, files=files)
    return settings
