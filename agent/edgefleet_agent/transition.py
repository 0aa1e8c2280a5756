"""One transition as the journal will tell it: receives what was and what happened, hands on what is to be persisted."""

from __future__ import annotations

import msgspec
from edgefleet_shared import results
from edgefleet_shared.assignment import Subject
from edgefleet_shared.lifecycle import Effect, Event, Life
from edgefleet_shared.outcomes import Outcome

from edgefleet_agent import reporting
from edgefleet_agent.journal import Journal
from edgefleet_agent.line import Happened


class Now(msgspec.Struct, frozen=True):
    """Who tells it, and when.

    Args:
        device, subject: whose result it would be.
        kernel_boot: see :class:`edgefleet_agent.journal.Journal`.
        at: seconds since 1970 by the board's clock.
    """

    device: str
    subject: Subject
    kernel_boot: str
    at: float


def journal_after(before: Journal, happened: Happened, life: Life, effects: tuple[Effect, ...], now: Now) -> Journal:
    """The journal with ``life``, and ``effects`` to carry out, in place of ``before``."""
    event, detail = happened.event, happened.detail
    planned = msgspec.structs.replace(
        before, **happened.changes, life=life, kernel_boot=now.kernel_boot, stopped=False,
        soaked_s=before.soaked_s if before.stopped and event is Event.RESTARTED else 0.0,
    )  # fmt: skip
    if life.outcome is not before.life.outcome and life.outcome is not None:
        planned = msgspec.structs.replace(planned, reason=detail)
    if event is Event.RETURN_FAILED and before.reason:
        planned = msgspec.structs.replace(planned, reason=f"{before.reason}; then {detail}")
    return _ended(planned, now) if Effect.REPORT in effects else planned


def _ended(planned: Journal, now: Now) -> Journal:
    """The same, with how the assignment ended; what waited for that and is the same one waits no longer."""
    ended = results.fitting(now.device, reporting.ended(planned, now.at), now.subject)
    planned = msgspec.structs.replace(planned, ended=ended)
    if planned.life.outcome is Outcome.SUCCEEDED:
        planned = msgspec.structs.replace(planned, committed=planned.assignment)
    waits, worked_on = planned.pending, planned.assignment
    if waits is not None and worked_on is not None and waits.id == worked_on.id:
        planned = msgspec.structs.replace(planned, pending=None)
    return planned
