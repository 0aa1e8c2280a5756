"""Stage 9, health: what the board says about itself. Receives the journal, the slots and what stands in the way, hands on messages.

:class:`Teller` says it, the functions below find the words. Not handled here: when it is said (:mod:`edgefleet_agent.runner`).
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ended, Progress, Reported, SignedResult, SlotReport
from edgefleet_shared.outcomes import Outcome

from edgefleet_agent import __version__, slots
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.journal import Journal, Keeper
from edgefleet_agent.ports import Ports
from edgefleet_agent.settings import Settings
from edgefleet_agent.slots import Slot, Slots
from edgefleet_agent.spool import Spool

log = logging.getLogger(__name__)

MAX_DETAIL = 500  # characters


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A result as it is told: signed, or without ``result`` when this board could not sign it."""

    ended: Ended
    result: SignedResult | None = None


class Teller:
    """Tells where the board is (``reported``, retained) and how it gets on (events)."""

    def __init__(
        self,
        state: Path,
        settings: Settings,
        board: Fingerprint,
        boot: str,
        keeper: Keeper,
        ports: Ports,
        spool: Spool,
        fetcher: Fetcher,
    ) -> None:
        self._state, self._settings, self._board, self._boot = state, settings, board, boot
        self._keeper, self._ports, self._spool, self._fetcher = keeper, ports, spool, fetcher
        self._problems: dict[str, str] = {}
        self._on_disk = Slots()
        self._told: Told | None = None
        self.progress_told_at = 0.0

    def note(self, what: str, problem: str = "") -> None:
        """Something stands in the way or, without ``problem``, does not any more; told when that is new."""
        if self._problems.get(what, "") == problem:
            return
        if problem:
            log.warning("problem", extra={"reason": problem})
            self._problems[what] = problem
        else:
            self._problems.pop(what, None)
        self.report()

    def report(self) -> None:
        """Where the board is, now."""
        problems = self._problems
        try:
            self._on_disk = slots.read(self._state, files=self._ports.files)
        except EdgefleetError as exc:
            problems = problems | {"slots": str(exc)}  # what was last known of them is told
        self._ports.uplink.report(
            reported(
                self._settings, self._board, self._boot, self._ports.clock.now(), self._keeper.now, self._on_disk,
                problem="; ".join(problems.values()), events_dropped=self._spool.dropped, told=self._told,
            )
        )  # fmt: skip

    def result(self, told: Told) -> None:
        """How the last assignment ended can be told."""
        self._told = told
        self.report()

    def progress(self, detail: str = "", done: int = 0, total: int = 0) -> None:
        """A step of the life cycle, or how far the fetch has come, or the build (``done`` of ``total`` steps)."""
        self.progress_told_at = self._ports.clock.monotonic()
        step = progress(self._keeper.now, self._fetcher, detail, done, total)
        if step is not None:
            self._spool.add(step)


def reported(
    settings: Settings, board: Fingerprint, boot: str, at: float, journal: Journal, on_disk: Slots, *, problem: str,
    events_dropped: dict[str, int], told: Told | None,
) -> Reported:  # fmt: skip
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
        ended=told.ended if told else None,
        result=told.result if told else None,
        desired_seen=journal.desired_seen,
        refusal=journal.refusal,
        problem=problem[:MAX_DETAIL],
        events_dropped=events_dropped,
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
        number=next_number(journal),
    )


def next_number(journal: Journal) -> int:
    """The number of the next result of this board."""
    return journal.ended.number + 1 if journal.ended else 1


def progress(journal: Journal, fetcher: Fetcher, detail: str, done: int, total: int) -> Progress | None:
    """A step of the life cycle; None when there never was an assignment."""
    if journal.assignment is None:
        return None
    fetching = journal.life.state is State.FETCHING
    return Progress(
        assignment=journal.assignment.id,
        state=journal.life.state,
        detail=detail[:MAX_DETAIL],
        done=fetcher.done_bytes if fetching else done,
        total=fetcher.total_bytes if fetching else total,
    )


def _told(slot: Slot | None) -> SlotReport | None:
    if slot is None:
        return None
    return SlotReport(manifest=slot.manifest, model=slot.model, version=slot.version, status=slot.status.value)
