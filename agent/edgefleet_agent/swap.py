"""Stage 8, swap: the switch. Receives an accepted candidate, hands on the new model serving and the old one kept.

Order of a swap: the runtime loads and warms the candidate while the old one serves; the slots are flipped on disk; the runtime
switches; the soak watches; commit retires the old worker. Each function may be run again from the start after a crash
between any two of its lines, because each first looks at what is already so.

Blocking: these run on a job thread of the runner, never on its own. Not handled here: deciding (lifecycle.py).
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import cast

import msgspec
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem, TransportError
from edgefleet_shared.lifecycle import Event

from edgefleet_agent import slots
from edgefleet_agent.runtime.control import RuntimeClient, StatusReport, SwapMode, VersionStatus
from edgefleet_agent.slots import SlotStatus

log = logging.getLogger(__name__)

RUNTIME_WAIT_S = 60.0  # the runtime may be restarting; systemd brings it back within seconds
LOOK_S = 0.25
MAX_FAILED_SHARE = 0.01  # of the requests during the soak


def _patiently(client: RuntimeClient, stop: threading.Event, clock: Clock) -> StatusReport:
    """The runtime's status, waiting for it to come (back) up."""
    deadline = clock.monotonic() + RUNTIME_WAIT_S
    while True:
        try:
            return client.status()
        except (EnvironmentProblem, TransportError):
            if clock.monotonic() > deadline or stop.wait(LOOK_S):
                raise


def swap(
    state: Path, client: RuntimeClient, assignment: Assignment, stop: threading.Event, clock: Clock
) -> tuple[Event, str]:
    """Load the candidate, flip the slots, switch."""
    now = slots.read(state)
    try:
        _patiently(client, stop, clock)
        loaded = client.load(assignment.manifest, cast(SwapMode, assignment.swap))
    except EdgefleetError as exc:
        if now.active is not None and now.active.manifest == assignment.manifest:
            return Event.SWAP_FAILED, str(exc)
        return Event.LOAD_FAILED, str(exc)
    if now.active is None or now.active.manifest != assignment.manifest:
        slots.write(state, now.flipped())
    try:
        switched = client.switch(assignment.manifest)
    except EdgefleetError as exc:
        return Event.SWAP_FAILED, str(exc)
    return Event.SWAPPED, f"{loaded.mode}: {loaded.why}; requests waited {switched.parked_ms:.0f} ms"


def soak(client: RuntimeClient, assignment: Assignment, stop: threading.Event, clock: Clock) -> tuple[Event, str]:
    """Watch the new model serve for ``soak_s``.

    Unhealthy: its worker crashed, it does not serve any more, the runtime is gone, or more than a hundredth of the
    requests failed.
    """
    end = clock.monotonic() + assignment.soak_s
    at_start: VersionStatus | None = None
    while True:
        try:
            status = _patiently(client, stop, clock)
        except EdgefleetError as exc:
            return Event.UNHEALTHY, str(exc)
        version = _version(status, assignment.manifest)
        if version is None or (status.serving != assignment.manifest):
            problem = version.last_problem if version is not None else "it is not loaded any more"
            return Event.UNHEALTHY, f"the runtime does not serve it: {problem or 'something else serves'}"
        at_start = at_start or version
        if version.crashes:
            return Event.UNHEALTHY, f"the engine's process ended {version.crashes} times: {version.last_problem}"
        requests, failed = version.requests - at_start.requests, version.failed - at_start.failed
        if failed > requests * MAX_FAILED_SHARE:
            return Event.UNHEALTHY, f"{failed} of {requests} requests failed: {version.last_problem}"
        if clock.monotonic() >= end:
            return Event.HEALTHY, f"served {requests} requests, {failed} failed"
        if stop.wait(LOOK_S):
            return Event.UNHEALTHY, "superseded"


def commit(state: Path, client: RuntimeClient) -> tuple[Event, str]:
    """Mark the active slot good, stop the old worker, then collect what no slot names."""
    now = slots.read(state)
    if now.active is None:
        return Event.COMMITTED, "nothing is active"
    good = msgspec.structs.replace(
        now, active=msgspec.structs.replace(now.active, status=SlotStatus.GOOD), candidate=None
    )
    slots.write(state, good)
    _retire_others(client, now.active.manifest)
    slots.collect_garbage(state, good)
    return Event.COMMITTED, ""


def go_back(
    state: Path, client: RuntimeClient, assignment: Assignment | None, stop: threading.Event, clock: Clock
) -> tuple[Event, str]:
    """Serve the previous artifact again and forget the failed one. ``assignment`` None: the active one itself regressed."""
    now = slots.read(state)
    failed = assignment.manifest if assignment is not None else (now.active.manifest if now.active else "")
    if now.active is not None and now.active.manifest == failed:
        if now.previous is None or now.previous.status is SlotStatus.BAD:
            bad = msgspec.structs.replace(now.active, status=SlotStatus.BAD)
            slots.write(state, slots.Slots(active=bad))
            return Event.RETURN_FAILED, "there is no previous artifact to return to"
        now = now.returned()
    now = msgspec.structs.replace(now, candidate=None)
    slots.write(state, now)
    if now.active is None:
        return Event.RETURN_FAILED, "there is no previous artifact to return to"
    try:
        serve(state, client, stop, clock)
    except EdgefleetError as exc:
        return Event.RETURN_FAILED, str(exc)
    slots.collect_garbage(state, now)
    return Event.RETURNED, f"{now.active.model} {now.active.version} serves again"


def serve(state: Path, client: RuntimeClient, stop: threading.Event, clock: Clock) -> None:
    """Make the runtime serve what the slots say, and nothing else.

    Raises:
        EdgefleetError: it can't.
    """
    wanted = slots.read(state).serving
    if wanted is None:
        return
    status = _patiently(client, stop, clock)
    if status.serving != wanted.manifest:
        client.load(wanted.manifest)
        client.switch(wanted.manifest)
    _retire_others(client, wanted.manifest)


def discard(state: Path, client: RuntimeClient) -> None:
    """Forget the candidate: its slot, its worker if one was started, its blobs."""
    now = slots.read(state)
    if now.candidate is not None:
        kept = msgspec.structs.replace(now, candidate=None)
        slots.write(state, kept)
        if kept.active is None or kept.active.manifest != now.candidate.manifest:
            try:
                client.retire(now.candidate.manifest, timeout_s=5.0)
            except (EnvironmentProblem, TransportError) as exc:
                # No runtime, so no worker of the candidate either; one that hangs is retired with the next commit.
                log.info("candidate not retired", extra={"digest": now.candidate.manifest, "reason": str(exc)})
        slots.collect_garbage(state, kept)


def _retire_others(client: RuntimeClient, manifest: str) -> None:
    for version in client.status().versions:
        if version.manifest != manifest and not version.serving:
            client.retire(version.manifest)


def _version(status: StatusReport, manifest: str) -> VersionStatus | None:
    return next((v for v in status.versions if v.manifest == manifest), None)
