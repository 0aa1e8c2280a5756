"""What a store holds before a test begins."""

from __future__ import annotations

from edgefleet_controller.store import devices
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import Assignment


def enrol(database: Database, *names: str, device_class: str = "x86") -> None:
    with database.write() as session:
        devices.put_class(session, device_class, "{}", 1.0)
        for name in names:
            devices.enrol(session, name, device_class, site="lab", now=2.0)


def assignment(name: str, device: str, version: int) -> Assignment:
    return Assignment(
        id=name, device=device, version=version, manifest="sha256:a", payload=b"\x00signed\xff", payload_digest="sha256:p",
        created_at=float(version),
    )  # fmt: skip
