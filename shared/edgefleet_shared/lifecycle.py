"""The board's life cycle: one table. Pure: receives a life and an event, hands on the new life and the effects.

Two rules. (1) A missing key *is* the illegal transition: there is no default. (2) Persist, then act: the first effect of every
transition is the journal write, and every state has a ``RESTARTED`` row here, so resuming has no logic of its own.

``ASSIGNED`` comes only after the assignment was verified and found to fit the board (:mod:`edgefleet_shared.trust`), whatever
the state: unverified bytes move nothing. The agent executes the effects, ``fleet simulate`` runs the same table on a
virtual clock, ``docs/generated/states.md`` is drawn from it. Modelled on h11's ``_state.py`` and Mender's state machine.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from edgefleet_shared.open_enum import OpenEnum
from edgefleet_shared.outcomes import Outcome


class State(OpenEnum):
    IDLE = "idle"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    BUILDING = "building"  # where the engine needs a plan that is made on the board itself
    ACCEPTING = "accepting"
    SHADOWING = "shadowing"
    SWAPPING = "swapping"
    SOAKING = "soaking"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling_back"
    REBUILDING = "rebuilding"  # no deployment: the engine changed under what serves, its plan is made anew


class Event(str, Enum):
    ASSIGNED = "assigned"  # a verified assignment that is not what is being done
    ALREADY_SERVED = "already_served"  # a verified assignment of what is active and good
    FETCHED = "fetched"
    FETCH_FAILED = "fetch_failed"
    TIMED_OUT = "timed_out"
    VERIFIED = "verified"
    NOT_VERIFIED = "not_verified"
    BUILT = "built"  # or the engine takes the model as it is
    NOT_BUILT = "not_built"
    ACCEPTED = "accepted"
    NOT_ACCEPTED = "not_accepted"
    AGREED = "agreed"  # on live requests with what serves, or nobody asked for that
    DISAGREED = "disagreed"
    SWAPPED = "swapped"
    LOAD_FAILED = "load_failed"  # the runtime could not start the candidate; the old artifact never stopped serving
    SWAP_FAILED = "swap_failed"  # the switch itself went wrong
    HEALTHY = "healthy"  # the soak ended and the runtime served well
    UNHEALTHY = "unhealthy"
    COMMITTED = "committed"
    RETURNED = "returned"
    RETURN_FAILED = "return_failed"
    OUTDATED = "outdated"  # a plan on the board is not what its engine takes now
    REBUILT = "rebuilt"
    RESTARTED = "restarted"  # the agent came up in this state
    BROKE = "broke"  # the board could not do its part, several times: no child started, the disk failed
    LOOPING = "looping"  # it came up in this state too often (made by step, never sent)


class Effect(str, Enum):
    PERSIST = "persist"
    FETCH = "fetch"
    VERIFY = "verify"
    BUILD = "build"
    ACCEPT = "accept"
    SHADOW = "shadow"  # let the candidate answer live requests too, unseen
    SWAP = "swap"
    SOAK = "soak"
    COMMIT = "commit"
    RETURN = "return"  # serve the previous artifact again
    DISCARD = "discard"  # forget the candidate
    STOP_FETCH = "stop_fetch"
    REBUILD = "rebuild"  # the plans of the active and the previous slot
    SERVE = "serve"  # make sure that the runtime serves the active slot
    REPORT = "report"  # tell the outcome


class Row(msgspec.Struct, frozen=True):
    """Where a transition leads. ``outcome`` is noted when it becomes known and told by the next ``REPORT``."""

    to: State
    effects: tuple[Effect, ...] = ()
    outcome: Outcome | None = None


S, E, F, O = State, Event, Effect, Outcome  # noqa: E741 - the table below must stay readable
P = F.PERSIST

TABLE: dict[tuple[State, Event], Row] = {
    (S.IDLE, E.ASSIGNED): Row(S.FETCHING, (P, F.FETCH)),
    (S.IDLE, E.ALREADY_SERVED): Row(S.IDLE, (P, F.REPORT), O.SUCCEEDED),
    (S.IDLE, E.UNHEALTHY): Row(S.ROLLING_BACK, (P, F.RETURN), O.LATE_REGRESSION),
    (S.IDLE, E.OUTDATED): Row(S.REBUILDING, (P, F.REBUILD)),
    (S.IDLE, E.RESTARTED): Row(S.IDLE, (P, F.DISCARD, F.SERVE)),
    (S.IDLE, E.LOOPING): Row(S.IDLE, (P, F.DISCARD, F.SERVE)),
    #
    (S.FETCHING, E.FETCHED): Row(S.VERIFYING, (P, F.VERIFY)),
    (S.FETCHING, E.FETCH_FAILED): Row(S.IDLE, (P, F.STOP_FETCH, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.FETCHING, E.TIMED_OUT): Row(S.IDLE, (P, F.STOP_FETCH, F.DISCARD, F.REPORT), O.TIMED_OUT),
    (S.FETCHING, E.ASSIGNED): Row(S.IDLE, (P, F.STOP_FETCH, F.DISCARD, F.REPORT), O.SUPERSEDED),
    (S.FETCHING, E.RESTARTED): Row(S.FETCHING, (P, F.FETCH)),
    (S.FETCHING, E.LOOPING): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    #
    (S.VERIFYING, E.VERIFIED): Row(S.BUILDING, (P, F.BUILD)),
    (S.VERIFYING, E.NOT_VERIFIED): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.REJECTED),
    (S.VERIFYING, E.BROKE): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.VERIFYING, E.RESTARTED): Row(S.VERIFYING, (P, F.VERIFY)),
    (S.VERIFYING, E.LOOPING): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    #
    (S.BUILDING, E.BUILT): Row(S.ACCEPTING, (P, F.ACCEPT)),
    (S.BUILDING, E.NOT_BUILT): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.BUILDING, E.TIMED_OUT): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.TIMED_OUT),
    (S.BUILDING, E.ASSIGNED): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.SUPERSEDED),
    (S.BUILDING, E.BROKE): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.BUILDING, E.RESTARTED): Row(S.BUILDING, (P, F.BUILD)),
    (S.BUILDING, E.LOOPING): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    #
    (S.ACCEPTING, E.ACCEPTED): Row(S.SHADOWING, (P, F.SHADOW)),
    (S.ACCEPTING, E.NOT_ACCEPTED): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.ACCEPTING, E.BROKE): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.ACCEPTING, E.RESTARTED): Row(S.ACCEPTING, (P, F.ACCEPT)),
    (S.ACCEPTING, E.LOOPING): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    #
    (S.SHADOWING, E.AGREED): Row(S.SWAPPING, (P, F.SWAP)),
    (S.SHADOWING, E.DISAGREED): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.SHADOWING, E.ASSIGNED): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.SUPERSEDED),
    (S.SHADOWING, E.BROKE): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.SHADOWING, E.RESTARTED): Row(S.SHADOWING, (P, F.SHADOW)),
    (S.SHADOWING, E.LOOPING): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    #
    (S.SWAPPING, E.SWAPPED): Row(S.SOAKING, (P, F.SOAK)),
    (S.SWAPPING, E.LOAD_FAILED): Row(S.IDLE, (P, F.DISCARD, F.REPORT), O.FAILED_NO_CHANGE),
    (S.SWAPPING, E.SWAP_FAILED): Row(S.ROLLING_BACK, (P, F.RETURN), O.FAILED_ROLLED_BACK),
    (S.SWAPPING, E.RESTARTED): Row(S.SWAPPING, (P, F.SWAP)),
    (S.SWAPPING, E.LOOPING): Row(S.ROLLING_BACK, (P, F.RETURN), O.FAILED_ROLLED_BACK),
    #
    (S.SOAKING, E.HEALTHY): Row(S.COMMITTING, (P, F.COMMIT)),
    (S.SOAKING, E.UNHEALTHY): Row(S.ROLLING_BACK, (P, F.RETURN), O.FAILED_ROLLED_BACK),
    (S.SOAKING, E.ASSIGNED): Row(S.ROLLING_BACK, (P, F.RETURN), O.SUPERSEDED),
    (S.SOAKING, E.RESTARTED): Row(S.SOAKING, (P, F.SERVE, F.SOAK)),
    (S.SOAKING, E.LOOPING): Row(S.ROLLING_BACK, (P, F.RETURN), O.FAILED_ROLLED_BACK),
    #
    (S.COMMITTING, E.COMMITTED): Row(S.IDLE, (P, F.REPORT), O.SUCCEEDED),
    (S.COMMITTING, E.UNHEALTHY): Row(S.ROLLING_BACK, (P, F.RETURN), O.FAILED_ROLLED_BACK),  # an agent that runs no more
    (S.COMMITTING, E.RESTARTED): Row(S.COMMITTING, (P, F.COMMIT)),
    (S.COMMITTING, E.LOOPING): Row(S.ROLLING_BACK, (P, F.RETURN), O.FAILED_ROLLED_BACK),
    #
    (S.ROLLING_BACK, E.RETURNED): Row(S.IDLE, (P, F.REPORT)),
    (S.ROLLING_BACK, E.RETURN_FAILED): Row(S.IDLE, (P, F.REPORT), O.FAILED_UNABLE_TO_ROLL_BACK),
    (S.ROLLING_BACK, E.RESTARTED): Row(S.ROLLING_BACK, (P, F.RETURN)),
    (S.ROLLING_BACK, E.LOOPING): Row(S.IDLE, (P, F.REPORT), O.FAILED_UNABLE_TO_ROLL_BACK),
    #
    (S.REBUILDING, E.REBUILT): Row(S.IDLE, (P, F.DISCARD, F.SERVE)),
    (S.REBUILDING, E.NOT_BUILT): Row(S.IDLE, (P, F.DISCARD, F.SERVE)),  # what can be served is
    (S.REBUILDING, E.BROKE): Row(S.IDLE, (P, F.DISCARD, F.SERVE)),
    (S.REBUILDING, E.RESTARTED): Row(S.REBUILDING, (P, F.REBUILD)),
    (S.REBUILDING, E.LOOPING): Row(S.IDLE, (P, F.DISCARD, F.SERVE)),
} | {
    # Not interrupted: what is wanted is looked at again in the next state (level-triggered).
    (state, E.ASSIGNED): Row(state, ())
    for state in (S.VERIFYING, S.ACCEPTING, S.SWAPPING, S.COMMITTING, S.ROLLING_BACK, S.REBUILDING)
}

# A state that is entered by restart more often than this in a row, without having got on, is left by its LOOPING row.
MAX_RESTARTS = 3
# They read, write and hash: it is not them that took the whole board down, however often it was switched off meanwhile.
HARMLESS = frozenset({S.FETCHING, S.VERIFYING})


class Life(msgspec.Struct, frozen=True):
    """Where a board stands: state, restarts in it so far, the outcome that is known but not yet told."""

    state: State = State.IDLE
    restarts: int = 0
    outcome: Outcome | None = None


class IllegalTransition(Exception):
    """An event that its state has no row for: our own bug, not a user's."""


def got_on(life: Life) -> Life:
    """What the state does has got on, and stays so whatever is cut: restarts so far are no sign that it never ends."""
    return msgspec.structs.replace(life, restarts=0)


def step(life: Life, event: Event, *, counted: bool = True) -> tuple[Life, tuple[Effect, ...]]:
    """One transition.

    Args:
        counted: False for a restart that is known to be another's doing: it is no sign that what this state does ends the agent. So is
            one of the whole board, in the states that are :data:`HARMLESS`.

    Returns:
        the new life and the effects to carry out in order.

    Raises:
        IllegalTransition: the table has no such row.
    """
    restarts = 0
    if event is Event.RESTARTED and life.state is not State.IDLE:
        restarts = life.restarts + counted
        if restarts > MAX_RESTARTS:
            event, restarts = Event.LOOPING, 0
    row = TABLE.get((life.state, event))
    if row is None:
        raise IllegalTransition(f"{life.state.value} has no row for {event.value}")
    if not row.effects:
        return life, ()
    started_anew = life.state is State.IDLE and row.to is not State.IDLE
    outcome = row.outcome or (None if started_anew else life.outcome)
    if row.to is State.IDLE and event in (Event.RESTARTED, Event.LOOPING) and life.state is State.IDLE:
        outcome = life.outcome
    return Life(row.to, restarts, outcome), row.effects
