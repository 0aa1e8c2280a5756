"""What the loop can find in its inbox: arrivals from the uplink, and what comes of work done beside the loop. Pure."""

from __future__ import annotations

import msgspec
from edgefleet_shared.assignment import Admission, Assignment
from edgefleet_shared.contract import AcceptanceReport
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.lifecycle import Effect, Event, State
from edgefleet_shared.messages import Ended, Health, SignedResult

from edgefleet_agent.runtime.control import StatusReport
from edgefleet_agent.transport import Arrival
from edgefleet_agent.verify import Refusal


class AdmissionDone(msgspec.Struct, frozen=True):
    """Inbox: what the verifying child said about a ``desired`` message."""

    digest: str
    result: Admission | Refusal | EdgefleetError


class JobDone(msgspec.Struct, frozen=True):
    """Inbox: a job ended, with an event where there is one. ``transition`` says which one had started it."""

    transition: int
    event: Event | None
    detail: str
    acceptance: AcceptanceReport | None = None
    about: Assignment | None = None


class JobFailed(msgspec.Struct, frozen=True):
    """Inbox: the board could not do its part of a job. ``effects`` are what is left to be done."""

    transition: int
    effects: tuple[Effect, ...]
    reason: str


class JobTold(msgspec.Struct, frozen=True):
    """Inbox: how far a job in ``state`` is: ``done`` of ``total`` steps of what it is doing; 0 of 0 when that is not known."""

    state: State
    detail: str
    done: int
    total: int


class JobBroke(msgspec.Struct, frozen=True):
    """Inbox: a bug of ours. It ends the loop; the next start counts against it (lifecycle.py)."""

    error: Exception


class SigningDone(msgspec.Struct, frozen=True):
    """Inbox: what the signing child made of a result."""

    ended: Ended
    result: SignedResult | EdgefleetError


class Measured(msgspec.Struct, frozen=True):
    """Inbox: a look at the board's health."""

    health: Health
    status: StatusReport | None


Item = Arrival | JobDone | JobFailed | JobTold | JobBroke | AdmissionDone | SigningDone | Measured
