"""Stage 8, swap: the switch. Receives an accepted candidate, hands on the new model serving and the old one kept.

Order of a swap: the runtime loads and warms the candidate while the old one serves; the slots are flipped on disk; the runtime
switches; the soak watches; commit retires the old worker. Each function may be run again from the start after a crash
between any two of its lines, because each first looks at what is already so.

Blocking: these run on a job thread of the runner, never on its own. Not handled here: deciding (lifecycle.py).
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.contract import AcceptanceReport, doubted
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem, StarvedError, TransportError
from edgefleet_shared.lifecycle import Event

from edgefleet_agent import out_of_memory, slots
from edgefleet_agent.ports import Ports
from edgefleet_agent.runtime.control import StatusReport, SwapMode, VersionState, VersionStatus
from edgefleet_agent.slots import SlotStatus

log = logging.getLogger(__name__)

RUNTIME_WAIT_S = 60.0  # the runtime may be restarting; systemd brings it back within seconds
LOOK_S = 0.25
MAX_FAILED_SHARE = 0.01  # of the requests during the soak
# A process that the kernel ends for want of memory, within its own limit, had to go for what else is on the board. When it has to so often, the
# board does not hold it.
MAX_STARVED = 2


def _patiently(ports: Ports, stop: threading.Event) -> StatusReport:
    """The runtime's status, waiting for it to come (back) up."""
    deadline = ports.clock.monotonic() + RUNTIME_WAIT_S
    while True:
        try:
            return ports.runtime.status()
        except (EnvironmentProblem, TransportError):
            if ports.clock.monotonic() > deadline or stop.wait(LOOK_S):
                raise


def swap(
    state: Path, ports: Ports, assignment: Assignment, report: AcceptanceReport, stop: threading.Event
) -> tuple[Event, str, AcceptanceReport]:
    """Load the candidate, flip the slots, switch.

    Args:
        report: of its acceptance.

    Returns:
        the event, why, and the report: in doubt where the board had no memory to load what it had accepted.
    """
    now = slots.read(state, files=ports.files)
    flipped = now.active is not None and now.active.manifest == assignment.manifest
    if not flipped and (now.candidate is None or now.candidate.manifest != assignment.manifest):
        return Event.LOAD_FAILED, "the slots do not name it as candidate any more", report
    wanted = None if flipped else now.flipped()
    try:
        _patiently(ports, stop)
        how = out_of_memory.outlast(lambda: _swap(state, ports, assignment, wanted), stop)
        return Event.SWAPPED, how, report
    except EdgefleetError as exc:
        # A write that failed may have come through: what the disk says now decides whether there is something to undo.
        after = slots.read(state, files=ports.files).active
        if after is not None and after.manifest == assignment.manifest:
            return Event.SWAP_FAILED, str(exc), report
        return Event.LOAD_FAILED, str(exc), doubted(report, exc.message) if isinstance(exc, StarvedError) else report


def _swap(state: Path, ports: Ports, assignment: Assignment, flipped: slots.Slots | None) -> str:
    """One try of it; returns how it went. ``flipped`` None: the slots are already."""
    loaded = ports.runtime.load(assignment.manifest, cast(SwapMode, assignment.swap))
    if flipped is not None:
        slots.write(state, flipped, files=ports.files)
    switched = ports.runtime.switch(assignment.manifest)
    return f"{loaded.mode}: {loaded.why}; requests waited {switched.parked_ms:.0f} ms"


def soak(ports: Ports, assignment: Assignment, stop: threading.Event, soaked_s: float = 0.0) -> tuple[Event, str]:
    """Watch the new model serve for what is left of ``soak_s`` when it has soaked for ``soaked_s``.

    Unhealthy: its worker crashed, or found no memory too often, or does not come back; it does not serve any more, the runtime is gone, or more
    than a hundredth of the requests failed.
    """
    end = ports.clock.monotonic() + assignment.soak_s - soaked_s
    at_start: VersionStatus | None = None
    while True:
        try:
            status = _patiently(ports, stop)
        except EdgefleetError as exc:
            return Event.UNHEALTHY, str(exc)
        version = _version(status, assignment.manifest)
        if version is None or (status.serving != assignment.manifest):
            problem = version.last_problem if version is not None else "it is not loaded any more"
            return Event.UNHEALTHY, f"the runtime does not serve it: {problem or 'something else serves'}"
        if at_start is None:
            at_start = version
        elif version.requests < at_start.requests:  # the runtime started again, and counts from nothing
            at_start = msgspec.structs.replace(version, requests=0, failed=0)
        if version.crashes:
            return Event.UNHEALTHY, f"the engine's process ended {version.crashes} times: {version.last_problem}"
        if version.starved > MAX_STARVED:
            return (
                Event.UNHEALTHY,
                f"the board had no memory for the engine's process {version.starved} times: {version.last_problem}",
            )
        requests, failed = version.requests - at_start.requests, version.failed - at_start.failed
        if failed > requests * MAX_FAILED_SHARE:
            return Event.UNHEALTHY, f"{failed} of {requests} requests failed: {version.last_problem}"
        late_s = ports.clock.monotonic() - end
        if late_s >= 0 and version.state == VersionState.READY:
            return Event.HEALTHY, f"served {requests} requests, {failed} failed"
        if late_s >= RUNTIME_WAIT_S:
            return Event.UNHEALTHY, f"it does not come back: {version.last_problem}"
        if stop.wait(LOOK_S):
            return Event.UNHEALTHY, "superseded"


def commit(state: Path, ports: Ports) -> tuple[Event, str]:
    """Mark the active slot good, stop the old worker, then collect what no slot names.

    Raises:
        EdgefleetError: not yet; run it again.
    """
    now = slots.read(state, files=ports.files)
    if now.active is None:
        return Event.COMMITTED, "nothing is active"
    try:
        good = slots.commit(state, now, files=ports.files)
    except EnvironmentProblem:
        # On a full disk it may be the artifact before the previous one that takes the space; no slot names it since the flip.
        slots.collect_garbage(state, now, files=ports.files)
        raise
    _retire_others(ports, now.active.manifest)
    slots.collect_garbage(state, good, files=ports.files)
    return Event.COMMITTED, ""


def go_back(state: Path, ports: Ports, failed: str, stop: threading.Event) -> tuple[Event, str]:
    """Serve the previous artifact again and forget the one whose manifest is ``failed``; once that is so, leave it so.

    Raises:
        EnvironmentProblem: the slots can't be written yet; run it again. The previous artifact serves already.
    """
    now = slots.read(state, files=ports.files)
    if now.active is not None and now.active.manifest == failed:
        if now.previous is None or now.previous.status is SlotStatus.BAD:
            bad = msgspec.structs.replace(now.active, status=SlotStatus.BAD)
            left = slots.Slots(active=bad)
            slots.write(state, left, files=ports.files)
            slots.collect_garbage(state, left, files=ports.files)
            return Event.RETURN_FAILED, "there is no previous artifact to return to"
        now = now.returned()
    now = msgspec.structs.replace(now, candidate=None)
    try:
        slots.write(state, now, files=ports.files)
    except EnvironmentProblem:
        # A disk that refuses is no reason to let requests go to what failed.
        with suppress(EdgefleetError):
            _make_serve(ports, now, stop)
        raise
    if now.active is None:
        return Event.RETURN_FAILED, "there is no previous artifact to return to"
    try:
        _make_serve(ports, now, stop)
    except EdgefleetError as exc:
        return Event.RETURN_FAILED, str(exc)
    slots.collect_garbage(state, now, files=ports.files)
    return Event.RETURNED, f"{now.active.model} {now.active.version} serves again"


def serve(state: Path, ports: Ports, stop: threading.Event) -> None:
    """Make the runtime serve what the slots say, and nothing else.

    Raises:
        EdgefleetError: it can't.
    """
    _make_serve(ports, slots.read(state, files=ports.files), stop)


def _make_serve(ports: Ports, now: slots.Slots, stop: threading.Event) -> None:
    wanted = now.serving
    if wanted is None:
        return
    status = _patiently(ports, stop)
    if status.serving != wanted.manifest:
        out_of_memory.outlast(lambda: _load_and_switch(ports, wanted.manifest), stop)
    _retire_others(ports, wanted.manifest)


def _load_and_switch(ports: Ports, manifest: str) -> None:
    ports.runtime.load(manifest)
    ports.runtime.switch(manifest)


def discard(state: Path, ports: Ports) -> None:
    """Forget the candidate: its slot, its worker if one was started, its blobs; and what an earlier start left to collect.

    Raises:
        EnvironmentProblem: the disk refused; run it again.
    """
    now = slots.read(state, files=ports.files)
    kept = msgspec.structs.replace(now, candidate=None)
    if now.candidate is not None:
        slots.write(state, kept, files=ports.files)
        _retire_candidate(ports, kept, now.candidate.manifest)
    slots.collect_garbage(state, kept, files=ports.files)


def _retire_candidate(ports: Ports, kept: slots.Slots, manifest: str) -> None:
    if kept.active is None or kept.active.manifest != manifest:
        try:
            ports.runtime.retire(manifest, timeout_s=5.0)
        except (EnvironmentProblem, TransportError) as exc:
            # No runtime, so no worker of the candidate either; one that hangs is retired with the next commit.
            log.info("candidate not retired", extra={"digest": manifest, "reason": str(exc)})


def make_room(state: Path, ports: Ports) -> None:
    """Collect what the active and the previous artifact do not need, the candidate's blobs too: a fetch that found the disk full.

    Raises:
        EnvironmentProblem: the disk can't even do that.
    """
    now = slots.read(state, files=ports.files)
    slots.collect_garbage(state, msgspec.structs.replace(now, candidate=None), files=ports.files)


def _retire_others(ports: Ports, manifest: str) -> None:
    for version in ports.runtime.status().versions:
        if version.manifest != manifest and not version.serving:
            ports.runtime.retire(version.manifest)


def _version(status: StatusReport, manifest: str) -> VersionStatus | None:
    return next((v for v in status.versions if v.manifest == manifest), None)
