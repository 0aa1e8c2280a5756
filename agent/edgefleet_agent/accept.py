"""Stage 7, accept: receives a candidate slot that is good to the byte, hands on a measured verdict on this very board.

The parent's half: it starts one sandboxed child (:mod:`edgefleet_agent.accept_child`), holds the child's figures against the signed
contract (:func:`edgefleet_shared.contract.judge`), and tells whose fault it was when there are none. A model that crashes,
hangs or eats memory has *failed*; measuring that broke is an *error*. Imports stay lean: this runs in the resident agent.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Literal

import msgspec
from edgefleet_shared.contract import (
    AcceptanceContract,
    AcceptanceFigures,
    AcceptanceReport,
    Verdict,
    is_busy,
    judge,
)
from edgefleet_shared.errors import ArtifactError, NotFoundError
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.results import MAX_REASON

from edgefleet_agent import power_profile, sandbox, sensors, slots
from edgefleet_agent.sandbox import Ended, Limits

# The child is stopped a little above the contract's peak, so that a small overrun is a measured figure, not a kill.
MEMORY_SLACK = 1.25
MEMORY_SLACK_BYTES = 64 * 1024 * 1024


class AcceptRequest(msgspec.Struct, frozen=True, kw_only=True):
    """parent -> child, on its stdin. ``memory_bytes`` is what it may hold, ``address_space_bytes`` what it may map beyond the engine's libraries,
    ``most_mhz`` the clock that the board may have now, 0 for no limit."""

    layout: str
    manifest: str
    engine: str
    threads: int
    memory_bytes: int
    address_space_bytes: int
    most_mhz: int = 0


class Stage(msgspec.Struct, frozen=True, tag="stage"):
    """child -> parent: what it does now; the last one is what it died of."""

    doing: str


class Confined(msgspec.Struct, frozen=True, tag="confined"):
    """child -> parent: which layers of the confinement this kernel lacks."""

    missing: tuple[str, ...]


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """child -> parent: the end of a complete run."""

    figures: AcceptanceFigures


class Broke(msgspec.Struct, frozen=True, tag="broke"):
    """child -> parent: an error, and what is to blame: the artifact, the measuring, or a board without the memory that the artifact may take."""

    blame: Literal["model", "measuring", "board"]
    message: str


ChildReport = Stage | Confined | Measured | Broke
_BLAMED = {"model": Verdict.FAILED, "measuring": Verdict.ERROR, "board": Verdict.INCONCLUSIVE}
_decode = msgspec.json.Decoder(ChildReport).decode


def accept(state: Path, manifest_digest: str, *, threads: int = 1) -> AcceptanceReport:
    """Run the candidate against its contract on this board.

    Args:
        state: the agent's state folder; the artifact lies in its layout.
        threads: how many threads one inference may use, as the runtime will.

    Returns:
        the report. ``unconfined`` names what this kernel could not enforce.

    Raises:
        EnvironmentProblem: a child could not be started at all.
    """
    layout = slots.artifacts(state)
    try:
        config = layout.config(layout.manifest(manifest_digest))
    except (ArtifactError, NotFoundError) as exc:
        return AcceptanceReport(verdict=Verdict.FAILED, reason=exc.message)
    contract = config.contract
    limits = Limits(
        memory_bytes=int(contract.peak_memory_bytes * MEMORY_SLACK) + MEMORY_SLACK_BYTES, time_s=contract.time_limit_s
    )
    request = AcceptRequest(
        layout=str(layout.root.resolve()),
        manifest=manifest_digest,
        engine=config.engine,
        threads=threads,
        memory_bytes=limits.memory_bytes,
        # Allocators reserve more than they touch; resident memory is watched by the parent, this only bounds a burst.
        address_space_bytes=limits.memory_bytes * 2 + (512 << 20),
        most_mhz=power_profile.asked_mhz(state),
    )
    ended = sandbox.run("edgefleet_agent.accept_child", msgspec.json.encode(request), limits)
    return report_on(contract, ended, throttled=sensors.throttled(most_mhz=request.most_mhz))


def report_on(contract: AcceptanceContract, ended: Ended, *, throttled: bool | None) -> AcceptanceReport:
    """The verdict on how a child ended, and on what it measured.

    Args:
        throttled: whether the board was, at the end.
    """
    report = _report_on(contract, ended, throttled)
    # The reason goes to the disk with each state, and into the log. Most of it is the child's word.
    return msgspec.structs.replace(report, reason=report.reason[:MAX_REASON])


def _report_on(contract: AcceptanceContract, ended: Ended, throttled: bool | None) -> AcceptanceReport:
    doing, missing = "starting", tuple[str, ...]()
    figures: AcceptanceFigures | None = None
    broke: Broke | None = None
    try:
        for line in ended.reports:
            match _decode(line):
                case Stage(doing):
                    pass
                case Confined(missing):
                    pass
                case Measured(figures):
                    pass
                case Broke() as broke:
                    pass
    except MALFORMED as exc:
        return AcceptanceReport(
            verdict=Verdict.ERROR, reason=f"the accepting child reported nonsense: {exc}", unconfined=missing
        )
    if broke is not None:
        return AcceptanceReport(
            verdict=_BLAMED[broke.blame], reason=f"{broke.message} (while {doing})", unconfined=missing
        )
    if ended.problem:
        verdict = _blame(ended, doing, throttled)
        busy = ""
        if verdict is Verdict.INCONCLUSIVE:
            busy = ": the board is out of memory" if ended.starved else ": the board was busy or throttling"
        return AcceptanceReport(
            verdict=verdict,
            reason=f"{ended.problem} while {doing}{busy}{ended.last_words()}",
            unconfined=missing,
        )
    if figures is None:
        return AcceptanceReport(
            verdict=Verdict.ERROR, reason="the accepting child ended without figures", unconfined=missing
        )
    # What the parent saw counts too: a child can't report less memory than the kernel measured.
    peak = max(figures.peak_memory_bytes, ended.peak_memory_bytes)
    report = judge(contract, msgspec.structs.replace(figures, peak_memory_bytes=peak))
    return msgspec.structs.replace(report, unconfined=missing)


def _blame(ended: Ended, doing: str, throttled: bool | None) -> Verdict:
    """Whose fault an early end is. Before the model was touched, killed from outside, out of the board's memory within its own limit, or too late
    on a busy board: not the model's."""
    if ended.starved:
        return Verdict.INCONCLUSIVE
    if doing == "starting":
        return Verdict.ERROR
    if ended.out_of_time and is_busy(throttled, ended.waited_share):
        return Verdict.INCONCLUSIVE
    if ended.over_limit or ended.signal not in (0, signal.SIGKILL, signal.SIGTERM):
        return Verdict.FAILED
    # SIGKILL that this parent did not send is a person's, or where the kernel does not tell its own; a plain exit status is our bug.
    return Verdict.ERROR
