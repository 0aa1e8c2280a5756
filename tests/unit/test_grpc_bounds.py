"""How many gRPC calls may have their message here at once, and how long it may be."""

from __future__ import annotations

import pytest
from edgefleet_agent.runtime import grpc_bounds

MIB = 1 << 20


@pytest.mark.parametrize(
    ("room", "calls", "each"),
    [(64, 2, 64 / 3), (96, 2, 32), (128, 2, 128 / 3), (192, 2, 64), (256, 3, 64), (1024, 3, 64)],
)
def test_messages_that_are_here_at_once_fit_the_room_and_one_never_keeps_all_others_waiting(
    room: int, calls: int, each: float
) -> None:
    assert grpc_bounds.messages(room * MIB) == (calls, int(each * MIB))
