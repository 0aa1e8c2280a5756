"""Which connections are given up for answers that nobody reads."""

from __future__ import annotations

from edgefleet_agent.runtime.body_room import ROOM_BYTES
from edgefleet_agent.runtime.untaken import SMALL_BYTES, STALLED_S, TAKE_LIMIT_S, Untaken


def test_a_client_that_reads_on_is_waited_for_however_slow_it_is() -> None:
    untaken = Untaken[str](ROOM_BYTES)
    untaken.add("slow", 1000, 900, 0.0)
    for step in range(1, 100):
        assert not untaken.is_overdue("slow", 900 - step, step * TAKE_LIMIT_S)
    assert untaken.is_overdue("slow", 801, 100 * TAKE_LIMIT_S + 1)


def test_there_is_room_for_one_answer_of_any_size_and_for_small_ones_always() -> None:
    untaken = Untaken[str](ROOM_BYTES)
    assert untaken.fits(2 * ROOM_BYTES)
    untaken.add("one", 2 * ROOM_BYTES, 1, 0.0)
    assert not untaken.fits(SMALL_BYTES + 1)
    assert untaken.fits(SMALL_BYTES)
    untaken.remove("one")
    untaken.remove("one")
    assert untaken.held_bytes == 0
    assert untaken.fits(ROOM_BYTES)


def test_those_that_have_read_nothing_for_the_longest_make_room_first() -> None:
    untaken = Untaken[str](ROOM_BYTES)
    for name, began in (("second", 1.0), ("first", 0.0), ("reading", 0.0)):
        untaken.add(name, 10, 10, began)
    now = 1.5 + STALLED_S
    assert not untaken.is_overdue("reading", 5, now)
    assert untaken.stalled(now) == ["first", "second"]


def test_several_answers_to_one_client_count_together() -> None:
    untaken = Untaken[str](ROOM_BYTES)
    untaken.add("one", 100, 50, 0.0)
    untaken.add("one", 100, 150, 1.0)
    assert untaken.held_bytes == 200
    untaken.remove("one")
    assert untaken.held_bytes == 0


def test_where_nobody_tells_what_is_left_the_time_since_the_answer_counts() -> None:
    untaken = Untaken[str](ROOM_BYTES)
    untaken.add("first", 10, 10, 0.0)
    untaken.add("second", 10, 10, 1.0)
    assert untaken.overdue(TAKE_LIMIT_S) == []
    assert untaken.overdue(TAKE_LIMIT_S + 0.5) == ["first"]
