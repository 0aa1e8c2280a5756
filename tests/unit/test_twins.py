"""Boards of which there are two: a card that was copied after its enrolment, or an old copy that was put in while the board still runs."""

from __future__ import annotations

from edgefleet_controller.twins import RETURNS, WINDOW_S, Twins


def heard(*boots: str, every_s: float = 5.0) -> Twins:
    """The starts that came online as one board, one after the other."""
    twins = Twins()
    for number, boot in enumerate(boots):
        twins.online("b1", boot, number * every_s)
    return twins


def test_two_machines_that_take_turns_are_found() -> None:
    twins = heard(*("one", "other") * (RETURNS + 1))
    assert twins.are_there("b1", 60.0)
    assert not twins.are_there("b2", 60.0)


def test_a_card_that_was_copied_many_times_is_found() -> None:
    assert heard(*("one", "two", "three", "four") * 3).are_there("b1", 60.0)


def test_a_board_that_is_started_again_and_again_is_one() -> None:
    assert not heard(*(f"start {number}" for number in range(50))).are_there("b1", 250.0)


def test_a_board_that_loses_its_line_again_and_again_is_one() -> None:
    assert not heard(*("one",) * 50).are_there("b1", 250.0)


def test_what_a_broker_repeats_is_no_twin() -> None:
    assert not heard("one", "other", "one", "other").are_there("b1", 20.0)  # once more what was not acknowledged


def test_what_is_over_is_forgotten() -> None:
    twins = heard(*("one", "other") * (RETURNS + 1))
    assert not twins.are_there("b1", 60.0 + WINDOW_S)
