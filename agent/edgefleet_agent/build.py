"""Stage 7, accept: building, for engines whose models become a plan on the board that runs them. Receives a candidate that is good to the
byte, hands on its plan, durable, or why there is none.

The parent's half. One sandboxed child (:mod:`edgefleet_agent.build_child`) loads the engine and says what a plan depends on here; when the
plan at hand is of that, nothing is done, else it builds and sends the plan through a pipe: it can write to no file, and how much it sends,
how long it takes and what memory it holds are bounded by the artifact's budget. What it sends is written by this side alone
(:mod:`edgefleet_agent.plans`). Imports stay lean: this runs in the resident agent.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import ArtifactError, EnvironmentProblem, NotFoundError
from edgefleet_shared.files import FileSystem
from edgefleet_shared.lifecycle import Event
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent import plans, sandbox, slots
from edgefleet_agent.ports import BuildOrder, BuildReport, Examiner
from edgefleet_agent.sandbox import Ended, Limits

TELL_EVERY_S = 1.0


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """parent -> child, on its stdin. ``have`` is what the plan at hand was made by, empty when there is none; ``memory_bytes`` the
    budget, ``address_space_bytes`` what the child may map beyond the engine's libraries."""

    layout: str
    manifest: str
    engine: str
    have: str
    memory_bytes: int
    address_space_bytes: int


class Step(msgspec.Struct, frozen=True, tag="step"):
    """child -> parent: what it does now, and how many of how many steps of that are done (0 of 0: not told)."""

    doing: str
    done: int = 0
    total: int = 0


class Confined(msgspec.Struct, frozen=True, tag="confined"):
    """child -> parent: which layers of the confinement this kernel lacks."""

    missing: tuple[str, ...]


class Made(msgspec.Struct, frozen=True, tag="made"):
    """child -> parent: the plan that was sent, or (``anew`` False) the one at hand, is right for ``key``."""

    key: str
    anew: bool


class Broke(msgspec.Struct, frozen=True, tag="broke"):
    """child -> parent: an error, and whether the model or the board is to blame."""

    blame: Literal["model", "board"]
    message: str


ChildReport = Step | Confined | Made | Broke
_decode = msgspec.json.Decoder(ChildReport).decode


def ensure(
    state: Path, files: FileSystem, examiner: Examiner, manifest: str, tell: Callable[[str, int, int], None],
    stop: threading.Event,
) -> tuple[Event, str]:  # fmt: skip
    """See to it that a plan of the artifact is on the disk that the engine takes as it is now.

    Args:
        tell: how far it is: what is done, so many of so many steps.
        stop: set when it is not wanted any more.

    Returns:
        BUILT, NOT_BUILT or TIMED_OUT, and how or why.

    Raises:
        EdgefleetError: the board could not do its part; run it again.
    """
    layout = slots.artifacts(state, files=files)
    plan = plans.read(layout).get(manifest)
    have = plan.key if plan is not None and plans.is_whole(layout, plan) else ""
    incoming = plans.Incoming(layout, manifest)
    began = time.monotonic()
    try:
        report = examiner.build(state, manifest, BuildOrder(have, incoming.take, tell, stop))
        if report.reason or stop.is_set():
            incoming.drop()
            return (Event.TIMED_OUT if report.out_of_time else Event.NOT_BUILT), report.reason or "not wanted any more"
        if not report.anew:
            plans.settle(layout)
            return Event.BUILT, f"the plan at hand is of {report.key}"
        if not incoming.size:
            return Event.NOT_BUILT, f"{report.key} made an empty plan"
        plans.keep(layout, incoming.adopt(report.key))
    except BaseException:
        incoming.drop()
        raise
    lacking = f"; not confined: {', '.join(report.unconfined)}" if report.unconfined else ""
    return Event.BUILT, f"{incoming.size} bytes in {time.monotonic() - began:.0f} s, by {report.key}{lacking}"


def build(state: Path, manifest: str, order: BuildOrder) -> BuildReport:
    """Have a sandboxed child make the plan: the real answer to :meth:`edgefleet_agent.ports.Examiner.build`.

    Raises:
        EnvironmentProblem: no child could be started, it was killed from outside, the engine does not load, or the disk refused.
    """
    layout = slots.artifacts(state)
    try:
        config = layout.config(layout.manifest(manifest))
    except (ArtifactError, NotFoundError) as exc:
        return BuildReport(reason=exc.message)
    budget = config.contract.build
    request = BuildRequest(
        layout=str(layout.root.resolve()),
        manifest=manifest,
        engine=config.engine,
        have=order.have,
        memory_bytes=budget.memory_bytes,
        # Allocators reserve more than they touch; resident memory is watched from here, this only bounds a burst.
        address_space_bytes=budget.memory_bytes * 2 + (512 << 20),
    )
    watch = _Watch(order)
    ended = sandbox.run(
        "edgefleet_agent.build_child",
        msgspec.json.encode(request),
        Limits(memory_bytes=budget.memory_bytes, time_s=budget.time_limit_s, piece_bytes=budget.disk_bytes),
        watch.hear,
        on_piece=order.take,
        stop=order.stop,
    )
    if order.stop.is_set():
        return BuildReport(reason="not wanted any more")
    return watch.report(ended, config)


class _Watch:
    """What a building child reports, and the verdict on its end."""

    def __init__(self, order: BuildOrder) -> None:
        self._tell, self._told_at = order.tell, 0.0
        self._doing = "starting"
        self._missing: tuple[str, ...] = ()
        self._made: Made | None = None
        self._broke: Broke | None = None
        self._nonsense = ""

    def hear(self, line: bytes) -> None:
        try:
            message = _decode(line)
        except MALFORMED as exc:
            self._nonsense = f"the building child reported nonsense: {exc}"
            return
        match message:
            case Step(doing, done, total):
                self._doing = doing
                now = time.monotonic()
                if now - self._told_at >= TELL_EVERY_S:
                    self._told_at = now
                    self._tell(doing, done, total)
            case Confined(missing):
                self._missing = missing
            case Made():
                self._made = message
            case Broke():
                self._broke = message

    def report(self, ended: Ended, config: ModelConfig) -> BuildReport:
        """The verdict.

        Raises:
            EnvironmentProblem: it is the board's fault.
        """
        doing = f"while {self._doing}"
        if self._broke is not None:
            if self._broke.blame == "board":
                raise EnvironmentProblem(f"{config.engine} can't build here: {self._broke.message} ({doing})")
            return BuildReport(reason=f"{self._broke.message} ({doing})")
        if ended.problem:
            reason = f"{ended.problem} {doing}{ended.last_words()}"
            # SIGKILL that this side did not send is the kernel's out-of-memory killer or a person.
            if not ended.over_limit and (self._doing == "starting" or ended.signal in (signal.SIGKILL, signal.SIGTERM)):
                raise EnvironmentProblem(f"building with {config.engine} ended early: {reason}")
            return BuildReport(reason=reason, out_of_time=ended.out_of_time)
        if self._nonsense or self._made is None:
            raise EnvironmentProblem(self._nonsense or f"the building child ended without a plan{ended.last_words()}")
        return BuildReport(key=self._made.key, anew=self._made.anew, unconfined=self._missing)
