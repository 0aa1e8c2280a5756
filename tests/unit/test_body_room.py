"""What the bodies of all connections may take together."""

from __future__ import annotations

import pytest
from edgefleet_agent.runtime.body_room import HEAP_BYTES, BodyRoom, announced
from edgefleet_agent.runtime.exchange import Request
from edgefleet_agent.runtime.head import Head, Refused
from edgefleet_agent.runtime.peer import Peer


def test_what_is_refused_takes_no_room() -> None:
    room = BodyRoom(100)
    room.take(60)
    with pytest.raises(Refused, match="too many large requests at once"):
        room.take(41)
    room.take(40)
    assert room.held_bytes == 100


def test_what_is_small_has_room_where_none_is_left() -> None:
    room = BodyRoom(100)
    room.take(100)
    room.take(5, is_small=True)
    room.give_back(105)
    assert room.held_bytes == 0


def test_an_unpacked_body_counts_as_what_it_is_until_it_is_answered() -> None:
    room = BodyRoom(100)
    room.take(10)
    request = Request(Head(), b"x" * 10, None, Peer(None), room)
    with pytest.raises(Refused):
        request.unpack(b"y" * 101)
    assert (request.body, room.held_bytes) == (b"x" * 10, 10)
    request.unpack(b"y" * 80)
    assert room.held_bytes == 80
    request.release()
    assert room.held_bytes == 0


@pytest.mark.parametrize("length", [0, 1, HEAP_BYTES, HEAP_BYTES + 1])
def test_a_body_gets_as_many_bytes_as_were_announced(length: int) -> None:
    target = announced(length)
    assert len(target) == length
    assert not target.readonly


def test_a_body_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(Refused, match="no memory"):
        announced(1 << 60)
