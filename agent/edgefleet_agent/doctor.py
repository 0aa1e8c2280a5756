"""``fleet-agent status`` and ``doctor``: receive a state folder, hand on what it says and what is wrong with it. Read only."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from edgefleet_shared.certificates import validity
from edgefleet_shared.clock import SystemClock, iso
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.files import DISK

from edgefleet_agent import __version__, board, journal, launcher, slots, verify
from edgefleet_agent import settings as board_settings
from edgefleet_agent.fetch import SPARE_BYTES
from edgefleet_agent.runtime.control import RuntimeClient, socket_path
from edgefleet_agent.slots import Slot

CONNECT_TIMEOUT_S = 5.0
SPARE_FILES = 256  # an update makes some dozens: blobs, metadata, the spool
CERTIFICATE_SPARE_S = 14 * 24 * 3600.0


class Finding(msgspec.Struct, frozen=True):
    """One check and what it found."""

    what: str
    ok: bool
    detail: str


def describe(state: Path) -> dict[str, Any]:
    """What the board serves and does, from its files and its runtime.

    Raises:
        EnvironmentProblem: not enrolled. ArtifactError: a damaged file.
    """
    settings, current, on_disk = board_settings.read(state), journal.read(state), slots.read(state)
    try:
        runtime = RuntimeClient(socket_path(state)).status()
        serving = next((f"{v.model} {v.version}" for v in runtime.versions if v.serving), "nothing")
    except EdgefleetError as exc:
        serving = f"unknown: {exc.message}"
    ended = current.ended
    own = launcher.folder(state)
    own_journal, own_slots = journal.read(own), slots.read(own)
    own_ended = own_journal.ended
    return {
        "device": settings.device,
        "class": settings.device_class,
        "site": settings.site,
        "state": current.life.state.value,
        "serving": serving,
        "active": _words(on_disk.active),
        "candidate": _words(on_disk.candidate),
        "previous": _words(on_disk.previous),
        "last_outcome": ended.outcome.value if ended else "",
        "last_reason": ended.reason if ended else "",
        "last_ended_at": iso(ended.at) if ended else "",
        "refusal": current.refusal,
        "agent": _words(own_slots.active) or f"the package's, {__version__}",
        "agent_state": own_journal.life.state.value,
        "agent_outcome": f"{own_ended.outcome.value} {own_ended.reason}".rstrip() if own_ended else "",
    }


def _words(slot: Slot | None) -> str:
    return f"{slot.model} {slot.version} ({slot.status.value}) {slot.manifest[:19]}" if slot else ""


def examine(state: Path) -> list[Finding]:
    """Every check, in the order in which a broken board is best looked at."""
    checks: list[tuple[str, Callable[[Path], str]]] = [
        ("enrolment", lambda s: f"{board_settings.read(s).device}, class {board_settings.read(s).device_class}"),
        ("trust", _trust),
        ("journal", lambda s: journal.read(s).life.state.value),
        ("active artifact", _active),
        ("agent's versions", _versions),
        ("certificate", _certificate),
        ("disk", _disk),
        ("engines", _engines),
        ("runtime", _runtime),
        ("broker", _broker),
    ]
    findings = []
    for what, check in checks:
        try:
            findings.append(Finding(what, True, check(state)))
        except (EdgefleetError, OSError) as exc:
            findings.append(Finding(what, False, str(exc)))
    return findings


def _trust(state: Path) -> str:
    root, floors = verify.root_version(state), verify.read_floors(state)
    return f"root {root}, assignments from {floors.assignment_version} on"


def _active(state: Path) -> str:
    slot = slots.read(state).serving
    if slot is None:
        return "none yet"
    layout = slots.artifacts(state)
    for blob in layout.manifest(slot.manifest).blobs():
        layout.check(blob)
    return f"{slot.model} {slot.version}, every byte as signed"


def _versions(state: Path) -> str:
    own = launcher.folder(state)
    life, active = journal.read(own).life, slots.read(own).active
    return f"{life.state.value}, {_words(active) or 'the package runs'}"


def _certificate(state: Path) -> str:
    endpoint = board_settings.endpoint(state, board_settings.read(state))
    endpoint.tls()
    _, ends = validity(endpoint.certificate)
    left_s = ends - SystemClock().now()
    if left_s < 0:
        raise OSError(f"it ended at {iso(ends)}: revoke the board at the controller, then enrol it by --again")
    if left_s < CERTIFICATE_SPARE_S:
        raise OSError(
            f"it ends at {iso(ends)} and was not renewed: the agent must reach the controller before, see its log"
        )
    return f"valid until {iso(ends)}"


def _disk(state: Path) -> str:
    free = DISK.free_bytes(state)
    if free < SPARE_BYTES:
        raise OSError(f"{free} bytes are free, less than the {SPARE_BYTES} that an update leaves untouched")
    found = os.statvfs(state)
    if found.f_files and found.f_favail < SPARE_FILES:  # some file systems have no such limit, and say 0
        raise OSError(f"{found.f_favail} more files can be made, however many bytes are free: see df -i")
    return f"{free // 10**6} MB free"


def _engines(state: Path) -> str:
    probes = board.probe_engines()
    loaded = [f"{p.name} {p.version}" for p in probes if p.version is not None]
    if not loaded:
        raise OSError("; ".join(f"{p.name}: {p.missing}" for p in probes) or "no engine is installed")
    lacking = [f"{p.name} ({p.missing})" for p in probes if p.version is None]
    return ", ".join(loaded) + (f"; not here: {', '.join(lacking)}" if lacking else "")


def _runtime(state: Path) -> str:
    status = RuntimeClient(socket_path(state)).status()
    return f"pid {status.pid}, {status.requests} requests, {status.failed} failed"


def _broker(state: Path) -> str:
    endpoint = board_settings.endpoint(state, board_settings.read(state))
    where = f"{endpoint.host}:{endpoint.port}"
    try:
        with (
            socket.create_connection((endpoint.host, endpoint.port), CONNECT_TIMEOUT_S) as plain,
            endpoint.tls().wrap_socket(plain, server_hostname=endpoint.host) as secured,
        ):
            return f"{where}, {secured.version()}"
    except OSError as exc:
        raise OSError(f"can't reach {where}: {exc}") from exc
