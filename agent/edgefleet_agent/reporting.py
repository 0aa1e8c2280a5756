"""Stage 9, health: what the board says about itself. Receives the journal and the slots, hands on messages. Pure."""

from __future__ import annotations

from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ended, Progress, Reported, SlotReport
from edgefleet_shared.outcomes import Outcome

from edgefleet_agent import __version__
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.journal import Journal
from edgefleet_agent.settings import Settings
from edgefleet_agent.slots import Slot, Slots

MAX_DETAIL = 500  # characters


def reported(
    settings: Settings, board: Fingerprint, boot: str, at: float, journal: Journal, on_disk: Slots, problem: str
) -> Reported:
    """Where the board is: the whole of it, to be retained. ``problem`` is what keeps it from going on, if anything does."""
    return Reported(
        device=settings.device,
        device_class=settings.device_class,
        boot=boot,
        at=at,
        state=journal.life.state,
        agent_version=__version__,
        fingerprint=board,
        assignment=journal.assignment.id if journal.assignment else "",
        active=_told(on_disk.active),
        candidate=_told(on_disk.candidate),
        previous=_told(on_disk.previous),
        ended=journal.ended,
        desired_seen=journal.desired_seen,
        refusal=journal.refusal,
        problem=problem[:MAX_DETAIL],
    )


def ended(journal: Journal, at: float) -> Ended:
    """How the assignment at work ended: the outcome that the life cycle noted, and why."""
    assert journal.life.outcome is not None
    return Ended(
        assignment=journal.assignment.id if journal.assignment else "",
        manifest=journal.assignment.manifest if journal.assignment else "",
        outcome=journal.life.outcome,
        reason="" if journal.life.outcome is Outcome.SUCCEEDED else journal.reason,
        at=at,
        acceptance=journal.acceptance,
    )


def progress(journal: Journal, fetcher: Fetcher, detail: str) -> Progress | None:
    """A step of the life cycle; None when there never was an assignment."""
    if journal.assignment is None:
        return None
    fetching = journal.life.state is State.FETCHING
    return Progress(
        assignment=journal.assignment.id,
        state=journal.life.state,
        detail=detail[:MAX_DETAIL],
        done=fetcher.done_bytes if fetching else 0,
        total=fetcher.total_bytes if fetching else 0,
    )


def _told(slot: Slot | None) -> SlotReport | None:
    if slot is None:
        return None
    return SlotReport(manifest=slot.manifest, model=slot.model, version=slot.version, status=slot.status.value)
