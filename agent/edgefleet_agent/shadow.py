"""Stage 7, accept: the second half of acceptance, for classes that ask for it. Receives an accepted candidate, hands on its verdict on
live requests: the runtime lets it answer what the serving model is asked, unseen, and counts.

Golden pictures are chosen; what a camera sees is not. Blocking: runs on a job thread of the runner. Not handled here: the counting
(:mod:`edgefleet_agent.runtime.shadow`), the verdict (:func:`edgefleet_shared.contract.judge_shadow`).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import msgspec
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.contract import AcceptanceReport, ShadowFigures, Verdict, doubted, judge_shadow
from edgefleet_shared.errors import EdgefleetError, StarvedError
from edgefleet_shared.lifecycle import Event

from edgefleet_agent import out_of_memory, slots
from edgefleet_agent.ports import Ports
from edgefleet_agent.runtime.control import SwapMode

LOOK_S = 0.25


def shadow(
    state: Path, ports: Ports, assignment: Assignment, report: AcceptanceReport, stop: threading.Event
) -> tuple[Event, str, AcceptanceReport]:
    """Compare the candidate with what serves, on live requests.

    Args:
        report: of its acceptance.

    Returns:
        the event, why, and the report with what was seen.

    Raises:
        EdgefleetError: the runtime did not do its part; run it again.
    """
    layout = slots.artifacts(state, files=ports.files)
    plan = layout.config(layout.manifest(assignment.manifest)).contract.shadow
    if not plan.requests:
        return Event.AGREED, "the class asks for no shadow", report
    if ports.runtime.status().serving is None:
        return _without(report, "nothing serves that it could be compared with")
    mode = cast(SwapMode, assignment.swap)
    try:
        loaded = out_of_memory.outlast(lambda: ports.runtime.load(assignment.manifest, mode), stop)
    except StarvedError as exc:
        return Event.DISAGREED, str(exc), doubted(report, exc.message)
    except EdgefleetError as exc:
        return Event.DISAGREED, str(exc), report
    if loaded.mode != "blue-green":
        return _without(report, f"memory does not hold both ({loaded.why})")
    ports.runtime.shadow(assignment.manifest)
    end = ports.clock.monotonic() + plan.time_limit_s
    while True:
        status = ports.runtime.status()
        figures = status.shadow
        if figures is None or figures.manifest != assignment.manifest:
            # The runtime was restarted, and has forgotten both.
            ports.runtime.load(assignment.manifest, mode)
            ports.runtime.shadow(assignment.manifest)
            figures = ShadowFigures(manifest=assignment.manifest)
        version = next((v for v in status.versions if v.manifest == assignment.manifest), None)
        if version is not None and version.crashes:
            return (
                Event.DISAGREED,
                f"its process ended {version.crashes} times on live requests: {version.last_problem}",
                report,
            )
        late = ports.clock.monotonic() >= end
        if figures.compared + figures.failed >= plan.requests or late:
            judged = judge_shadow(plan, figures, report)
            if judged.verdict is Verdict.PASSED:
                return Event.AGREED, f"{figures.alike:.4g} of {figures.compared} live requests answered alike", judged
            return Event.DISAGREED, f"shadow {judged.verdict.value}: {judged.reason}", judged
        if stop.wait(LOOK_S):
            return Event.DISAGREED, "superseded", report


def _without(report: AcceptanceReport, why: str) -> tuple[Event, str, AcceptanceReport]:
    """Asked for, but not to be had on this board now: the update goes on, and the report says so."""
    told = f"shadow: {why}"
    return Event.AGREED, told, msgspec.structs.replace(report, unmeasured=(*report.unmeasured, told))
