"""Fakes of the rollout service's ports, for tests and simulation: a director that signs nothing, and a broker that retains."""

from __future__ import annotations

import msgspec
from edgefleet_shared.trust import Assignment

from edgefleet_controller.rollout.views import Figures


class UnsignedDirector:
    """Writes assignments down without signing them. No agent accepts what it makes."""

    def sign(self, assignment: Assignment, version: int) -> bytes:
        return msgspec.json.encode({"assignment": assignment, "version": version})

    def renew(self, payload: bytes, version: int) -> bytes:
        return self.sign(read_unsigned(payload)[0], version)


def read_unsigned(payload: bytes) -> tuple[Assignment, int]:
    """What an :class:`UnsignedDirector` wrote, and its version."""
    content = msgspec.json.decode(payload, type=_Written)
    return content.assignment, content.version


class _Written(msgspec.Struct, frozen=True):
    assignment: Assignment
    version: int


class RetainingPublisher:
    """Keeps the last bytes per device, as a broker does with retained messages, and counts what was published."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.retained_agent: dict[str, bytes] = {}
        self.count = 0

    def publish_desired(self, device: str, assignment: bytes) -> None:
        self.retained[device] = assignment
        self.count += 1

    def publish_desired_agent(self, device: str, assignment: bytes) -> None:
        self.retained_agent[device] = assignment
        self.count += 1


class NoFigures:
    """A fleet that measures nothing."""

    def flush(self) -> None:
        return

    def of(self, device: str) -> Figures | None:
        return None
