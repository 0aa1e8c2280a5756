"""What clients of the gRPC face can take of it. Apart from it, because its protobuf messages and those of Triton's client can't be loaded into one
process: both are called ``inference.*``. The messages that are here at once fit the room that the HTTP face has for bodies."""

from __future__ import annotations

from edgefleet_agent.runtime.head import MAX_BODY_BYTES

LEAST_CALLS_AT_ONCE, CALLS_AT_ONCE = 2, 3  # one is computed, the others come meanwhile
LARGE_BYTES = 1 << 20  # messages above are taken apart and handed on one at a time: that takes four times their size
# Of a message that come before there is a thread for it: a picture costs no waiting for the rest.
LOOKAHEAD_BYTES = 256 * 1024
MAX_CALLS = 1024  # of all clients, waiting ones too; as many as the runtime lets wait
MESSAGE_LIMIT_S = 10.0  # from a call's beginning to its message's last byte: meanwhile it has one of the few threads
IDLE_LIMIT_S = 15.0  # without a call, then a connection is taken leave of: programs forget theirs, and gRPC makes a new one for the next call


def messages(room_bytes: int) -> tuple[int, int]:
    """How many calls may have their message here at once, and how long it may be.

    How long one is nobody is told before all of it is there, so each may be of the largest size; and the one that is taken apart is there twice.
    Where the room does not hold as many of what the HTTP face takes, they are smaller: one that comes slowly must not keep all others waiting.

    Args:
        room_bytes: see :func:`.body_room.room`.
    """
    calls = max(LEAST_CALLS_AT_ONCE, min(CALLS_AT_ONCE, room_bytes // MAX_BODY_BYTES - 1))
    return calls, min(MAX_BODY_BYTES, room_bytes // (calls + 1))
