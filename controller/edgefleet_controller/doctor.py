"""``fleet doctor``: receives a home folder, hands on what is wrong with it and with the running controller. Read only."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography import x509
from edgefleet_shared.clock import SystemClock, iso
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from tuf.api.metadata import Metadata

from edgefleet_controller import settings as controller_settings
from edgefleet_controller.client import FleetClient
from edgefleet_controller.transport.broker import find_mosquitto

SPARE_BYTES = 2_000_000_000  # a toolchain and a few artifacts
WARN_BEFORE_S = 14 * 24 * 3600.0
_ONLINE = ("snapshot.json", "timestamp.json")  # the running controller renews them, each few days


class Finding(msgspec.Struct, frozen=True):
    """One check and what it found."""

    what: str
    ok: bool
    detail: str


def examine(home: Path) -> list[Finding]:
    """Every check, in the order in which a broken fleet is best looked at."""
    checks: list[tuple[str, Callable[[Path], str]]] = [
        ("settings", _settings),
        ("private keys", _keys),
        ("certificates", _certificates),
        ("signed metadata", _metadata),
        (
            "broker program",
            lambda h: find_mosquitto() if controller_settings.read(h).broker == "embedded" else "external",
        ),
        ("disk", _disk),
        ("toolchains", _toolchains),
        ("controller", _controller),
    ]
    findings = []
    for what, check in checks:
        try:
            findings.append(Finding(what, True, check(home)))
        except (EdgefleetError, OSError, ValueError) as exc:
            findings.append(Finding(what, False, str(exc)))
    return findings


def _settings(home: Path) -> str:
    settings = controller_settings.read(home)
    return f"API {settings.listen}, broker {':'.join(map(str, settings.broker_address))}"


def _keys(home: Path) -> str:
    paths = [*home.glob("keys/**/*.pem"), *home.glob("ca/*.key"), home / "operator.yaml"]
    loose = [str(p) for p in paths if p.exists() and stat.S_IMODE(p.stat().st_mode) & 0o077]
    if loose:
        raise EnvironmentProblem(f"readable by others: {', '.join(loose)}", hint="chmod 600")
    offline = len(list(home.glob("keys/offline/*.pem")))
    return f"{len(paths)} files, none readable by others" + (
        f"; {offline} offline keys still lie here" if offline else ""
    )


def _certificates(home: Path) -> str:
    soonest = min(
        (x509.load_pem_x509_certificate(p.read_bytes()).not_valid_after_utc, p.name) for p in home.glob("ca/*.pem")
    )
    if soonest[0].timestamp() - SystemClock().now() < WARN_BEFORE_S:
        hint = "" if soonest[1] == "ca.pem" else "start the controller anew: it renews its own"
        raise EnvironmentProblem(f"{soonest[1]} ends at {soonest[0]:%Y-%m-%d}", hint=hint)
    return f"the first to end is {soonest[1]}, {soonest[0]:%Y-%m-%d}"


def _metadata(home: Path) -> str:
    now = SystemClock().now()
    found = {path.name: Metadata.from_bytes(path.read_bytes()).signed for path in home.glob("repository/*.json")}
    if not found:
        raise EnvironmentProblem("there is none", hint="fleet init makes it")
    root = max((signed.version for name, signed in found.items() if name.endswith(".root.json")), default=0)
    # Boards that were away go through the roots before the newest, which may have ended.
    ends = {
        name: signed.expires.timestamp()
        for name, signed in found.items()
        if name == f"{root}.root.json" or not name.endswith(".root.json")
    }
    expired = [f"{name} at {iso(end)}" for name, end in ends.items() if end < now]
    soon = [
        f"{name} at {iso(end)}"
        for name, end in ends.items()
        if now <= end < now + WARN_BEFORE_S and name not in _ONLINE
    ]
    if expired or soon:
        told = [f"{what}: {', '.join(names)}" for what, names in (("expired", expired), ("ends soon", soon)) if names]
        raise EnvironmentProblem("; ".join(told), hint="fleet renew; timestamp and snapshot: start the controller")
    first = min(ends, key=lambda name: ends[name])
    return f"{len(ends)} files; the first to end is {first}, {iso(ends[first])}"


def _disk(home: Path) -> str:
    free = shutil.disk_usage(home).free
    if free < SPARE_BYTES:
        raise EnvironmentProblem(f"{free // 10**6} MB free in {home}, less than {SPARE_BYTES // 10**6}")
    return f"{free // 10**6} MB free"


def _toolchains(home: Path) -> str:
    folder = controller_settings.read(home).cache_folder / "toolchains"
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not os.access(folder if folder.is_dir() else folder.parent if folder.parent.is_dir() else Path.home(), os.W_OK):
        raise EnvironmentProblem(f"{folder} can't be written")
    return ", ".join(found) or "none yet; each is installed at its first use"


def _controller(home: Path) -> str:
    status = FleetClient(home).status()
    if not status["broker_connected"]:
        raise EnvironmentProblem("the controller runs, but has no connection to its broker")
    return f"runs, version {status['version']}, {status['sent_bytes']} bytes sent"
