"""What clients of the gRPC face can take of it. Apart from it, because its protobuf messages and those of Triton's client can't be loaded into one
process: both are called ``inference.*``. The size of a message is the HTTP face's, :data:`.head.MAX_BODY_BYTES`."""

from __future__ import annotations

CALLS_AT_ONCE = 4  # one is computed, the others come meanwhile; each may hold a message twice while it comes
LARGE_BYTES = 1 << 20  # messages above are taken apart and handed on one at a time: that takes four times their size
MAX_CALLS = 1024  # of all clients, waiting ones too; as many as the runtime lets wait
MESSAGE_LIMIT_S = 10.0  # from a call's beginning to its message's last byte: meanwhile it has one of the few threads
IDLE_LIMIT_S = 15.0  # without a call, then a connection is taken leave of: programs forget theirs, and gRPC makes a new one for the next call
