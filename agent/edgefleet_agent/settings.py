"""What the board was told at its enrolment: receives the state folder, hands on one frozen record.

::

    <state>/agent.json         this record; written once, by ``fleet-agent enroll``
    <state>/identity/          agent.key, agent.pem, ca.pem
    <state>/trust/             root.json and the doubled floors (verify.py)
    <state>/metadata/          the image repository's files as they arrived, unverified
    <state>/journal.json       where the life cycle stands (journal.py)
    <state>/slots.json         what serves (slots.py)
    <state>/artifacts/         OCI layout
    <state>/agent/             the agent's own line: journal, slots, artifacts, trial (launcher.py)
    <state>/spool/             events that the controller has not acknowledged (event_store.py)
    <state>/run/               sockets
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.mqtt import Endpoint


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The board's enrolment and its limits. ``api`` is host:port of the controller's HTTPS, empty for none. ``spool_bytes`` bounds what
    waits on the disk for the controller; health waits ``spool_flush_s`` in memory before it goes there (:mod:`edgefleet_agent.spool`). ``signing_key`` says where the
    certificate's private key is when it is not the file in ``identity/`` (:mod:`edgefleet_agent.results`)."""

    device: str
    device_class: str
    site: str
    broker_host: str
    broker_port: int
    api_host: str = ""
    api_port: int = 0
    health_period_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    spool_bytes: Annotated[int, msgspec.Meta(gt=0)] = 4 << 20
    spool_flush_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    threads: Annotated[int, msgspec.Meta(ge=1)] = 1
    signing_key: str = ""


def read(state: Path, *, files: FileSystem = DISK) -> Settings:
    """The record in a state folder.

    Raises:
        EnvironmentProblem: the board is not enrolled, or the record is damaged, or was changed by hand to what it can't be.
    """
    path = state / "agent.json"
    try:
        return msgspec.json.decode(atomic.read(path, files=files), type=Settings)
    except FileNotFoundError as exc:
        raise EnvironmentProblem(
            f"{state} is not enrolled", hint="run fleet-agent enroll with a token from the controller"
        ) from exc
    except msgspec.ValidationError as exc:
        raise EnvironmentProblem(f"{path} can't be followed: {exc}", hint="correct it there") from exc
    except MALFORMED as exc:
        raise EnvironmentProblem(
            f"{path} is damaged: {exc}", hint="fleet device revoke, then fleet-agent enroll with a new token"
        ) from exc


def write(state: Path, settings: Settings, *, files: FileSystem = DISK) -> None:
    """Keep the record, durably."""
    atomic.write(state / "agent.json", msgspec.json.encode(settings), 0o600, files=files)


def endpoint(state: Path, settings: Settings) -> Endpoint:
    """The broker as this board reaches it."""
    identity = state / "identity"
    return Endpoint(
        host=settings.broker_host,
        port=settings.broker_port,
        ca=identity / "ca.pem",
        certificate=identity / "agent.pem",
        key=identity / "agent.key",
    )
