"""Stage 4, rollout: what the rollout service needs of others. Fakes for both are in :mod:`edgefleet_controller.rollout.fakes`."""

from __future__ import annotations

from typing import Protocol

from edgefleet_shared.trust import Assignment

from edgefleet_controller.rollout.views import Figures


class Director(Protocol):
    """Signs one assignment per board (stage 3; :class:`edgefleet_controller.sign.DirectorSigner`)."""

    def sign(self, assignment: Assignment, version: int) -> bytes:
        """The bytes that travel as ``desired``. ``version`` is above every version that this board was ever sent.

        Raises:
            EdgefleetError: it can't be signed, with the reason.
        """
        ...

    def renew(self, payload: bytes, version: int) -> bytes:
        """The same assignment, good for a whole life again. ``version`` as for :meth:`sign`."""
        ...


class Publisher(Protocol):
    """Takes signed assignments to the boards (stage 5; :class:`edgefleet_controller.transport.gateway.Gateway`)."""

    def publish_desired(self, device: str, assignment: bytes) -> None:
        """Publish retained; publishing the same bytes again does no harm. No bytes: nothing is wanted of the board, and nothing retained.

        Raises:
            TransportError: not possible now; it is tried again.
        """
        ...

    def publish_desired_agent(self, device: str, assignment: bytes) -> None:
        """The same for an assignment about the agent itself, which has a topic of its own."""
        ...


class FiguresSource(Protocol):
    """Knows what boards measure (stage 9; :class:`edgefleet_controller.health.Intake`)."""

    def flush(self) -> None:
        """Write what was received and not stored yet."""
        ...

    def of(self, device: str) -> Figures | None:
        """What the board measured since it began to serve what it serves."""
        ...
