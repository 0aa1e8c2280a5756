"""gRPC's own question whether somebody is well, as Kubernetes' probes ask it: receives a service's name, hands on whether it is served.

Its messages have one field each, number 1, a string and a small number: on the wire they are protobuf's own wrappers of these.
Not served, and refused with a reason: ``Watch``, a stream. Source: GRPC Health Checking Protocol, ``grpc.health.v1``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from edgefleet_agent.runtime.grpc_messages import CallError

SERVICE = "grpc.health.v1.Health"
REFUSED = {"Watch": "streams are not served; ask by Check"}
SERVING, NOT_SERVING = 1, 2

parse = StringValue.FromString


def check(request: Any, services: Collection[str], is_ready: Callable[[], bool]) -> UInt32Value:
    """Whether the model would be answered for. Every service here is as well as the runtime is, and so is the server, which has no name.

    Raises:
        CallError: there is no such service.
    """
    if request.value and request.value not in services:
        raise CallError("NOT_FOUND", f"there is no service {request.value[:200]!r} here")
    try:
        ready = is_ready()
    except CallError as exc:
        if exc.code != "UNAVAILABLE":
            raise
        ready = False
    return UInt32Value(value=SERVING if ready else NOT_SERVING)
