"""The board's life cycle as a table: its two rules, and the paths that matter."""

from __future__ import annotations

import pytest
from edgefleet_shared.lifecycle import (
    MAX_RESTARTS,
    TABLE,
    Effect,
    Event,
    IllegalTransition,
    Life,
    State,
    step,
)
from edgefleet_shared.open_enum import is_known
from edgefleet_shared.outcomes import Outcome
from hypothesis import given
from hypothesis import strategies as st


def walk(*events: Event, life: Life | None = None) -> Life:
    life = life or Life()
    for event in events:
        life, _ = step(life, event)
    return life


def test_every_transition_that_acts_persists_first() -> None:
    for (state, event), row in TABLE.items():
        if row.effects:
            assert row.effects[0] is Effect.PERSIST, (state, event)
        else:
            assert row.to is state, "only staying as it is needs no journal"


@pytest.mark.parametrize("state", list(State))
def test_every_state_has_a_row_for_a_restart_and_for_looping(state: State) -> None:
    assert (state, Event.RESTARTED) in TABLE
    assert (state, Event.LOOPING) in TABLE


@pytest.mark.parametrize("state", list(State))
def test_every_state_answers_a_new_assignment(state: State) -> None:
    assert (state, Event.ASSIGNED) in TABLE


def test_a_good_candidate_is_committed_and_told() -> None:
    life = walk(
        Event.ASSIGNED,
        Event.FETCHED,
        Event.VERIFIED,
        Event.BUILT,
        Event.ACCEPTED,
        Event.AGREED,
        Event.SWAPPED,
        Event.HEALTHY,
        Event.COMMITTED,
    )
    assert life == Life(State.IDLE, 0, Outcome.SUCCEEDED)


def test_a_candidate_that_disagrees_on_live_requests_never_serves() -> None:
    life, effects = step(Life(State.SHADOWING), Event.DISAGREED)
    assert life == Life(State.IDLE, 0, Outcome.FAILED_NO_CHANGE)
    assert Effect.DISCARD in effects
    assert Effect.SWAP not in effects


def test_a_candidate_that_is_not_accepted_changes_nothing() -> None:
    life, effects = step(Life(State.ACCEPTING), Event.NOT_ACCEPTED)
    assert life.outcome is Outcome.FAILED_NO_CHANGE
    assert Effect.SWAP not in effects
    assert Effect.RETURN not in effects


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (Event.NOT_BUILT, Outcome.FAILED_NO_CHANGE),
        (Event.TIMED_OUT, Outcome.TIMED_OUT),
        (Event.BROKE, Outcome.FAILED_NO_CHANGE),
        (Event.ASSIGNED, Outcome.SUPERSEDED),
    ],
)
def test_a_candidate_without_a_plan_changes_nothing(event: Event, outcome: Outcome) -> None:
    life, effects = step(Life(State.BUILDING), event)
    assert life == Life(State.IDLE, 0, outcome)
    assert Effect.DISCARD in effects
    assert Effect.SWAP not in effects


@pytest.mark.parametrize("event", [Event.REBUILT, Event.NOT_BUILT, Event.BROKE])
def test_after_rebuilding_the_board_serves_what_it_can(event: Event) -> None:
    life = walk(Event.OUTDATED, life=Life(State.IDLE, 0, Outcome.SUCCEEDED))
    assert life == Life(State.REBUILDING)
    after, effects = step(life, event)
    assert after == Life(State.IDLE)
    assert effects == (Effect.PERSIST, Effect.DISCARD, Effect.SERVE)


def test_what_a_newer_board_calls_its_state_is_kept_and_is_none_of_ours() -> None:
    told = State("dreaming")
    assert told.value == "dreaming"
    assert not is_known(told)
    assert all(told is not state and told != state for state in State)
    assert all(is_known(state) for state in State)
    assert "dreaming" not in [state.value for state in State]
    with pytest.raises(IllegalTransition, match="dreaming"):
        step(Life(told), Event.RESTARTED)
    with pytest.raises(ValueError, match="7"):
        State(7)


def test_an_unhealthy_soak_returns_and_says_so() -> None:
    life = walk(Event.UNHEALTHY, life=Life(State.SOAKING))
    assert life.state is State.ROLLING_BACK
    assert walk(Event.RETURNED, life=life) == Life(State.IDLE, 0, Outcome.FAILED_ROLLED_BACK)
    assert walk(Event.RETURN_FAILED, life=life).outcome is Outcome.FAILED_UNABLE_TO_ROLL_BACK


def test_a_regression_after_commit_is_told_as_late() -> None:
    assert walk(Event.UNHEALTHY, Event.RETURNED).outcome is Outcome.LATE_REGRESSION


def test_a_new_assignment_begins_without_the_old_outcome() -> None:
    life = walk(Event.ASSIGNED, life=Life(State.IDLE, 0, Outcome.FAILED_NO_CHANGE))
    assert life == Life(State.FETCHING, 0, None)


def test_an_event_without_a_row_is_illegal() -> None:
    with pytest.raises(IllegalTransition):
        step(Life(State.IDLE), Event.SWAPPED)


@pytest.mark.parametrize("state", [s for s in State if s is not State.IDLE])
def test_restarting_in_one_state_for_ever_ends(state: State) -> None:
    life = Life(state)
    for _ in range(MAX_RESTARTS):
        life, _ = step(life, Event.RESTARTED)
        assert life.state is state
    life, _ = step(life, Event.RESTARTED)
    assert life.state in (State.IDLE, State.ROLLING_BACK)
    # Rebuilding is no deployment: there is nothing to tell the outcome of.
    assert (life.outcome is not None) == (state is not State.REBUILDING)


@pytest.mark.parametrize("state", [s for s in State if s is not State.IDLE])
def test_a_restart_that_is_anothers_doing_is_not_counted(state: State) -> None:
    life = Life(state, restarts=1)
    for _ in range(2 * MAX_RESTARTS):
        life, effects = step(life, Event.RESTARTED, counted=False)
        assert effects[0] is Effect.PERSIST
    assert life == Life(state, restarts=1)


@given(st.lists(st.sampled_from(list(Event)), max_size=60))
def test_whatever_happens_a_finished_deployment_has_an_outcome(events: list[Event]) -> None:
    life = Life()
    for event in events:
        before = life
        try:
            life, effects = step(life, event)
        except IllegalTransition:
            continue
        if Effect.REPORT in effects:
            assert life.state is State.IDLE
            assert life.outcome is not None, (before, event)
