"""Stage 8 for the agent itself: receives the effects of the life cycle when the candidate is an agent, hands on the other agent running.

The agent's own line is a second :class:`edgefleet_agent.runner.Runner` over ``<state>/agent``: the same table, journal, slots, fetch
and checks as for a model. What differs is here. To swap is to flip the slots and end, so that the launcher starts the other version;
to soak is to stand trial; what fails is left by flipping back and ending once more.

A version on trial must show, within the limit that it was given: the broker answers, the assignment passes the trust path, the runtime
answers. When it can't, it returns by itself; when it dies or hangs, the launcher does, and the version before it tells so.

Not handled here: which version is started (:mod:`edgefleet_agent.launcher`), whether a candidate starts at all (rehearse.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from edgefleet_shared.assignment import Assignment, Subject
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.lifecycle import Effect, Event, State
from edgefleet_shared.messages import AgentReport, Ended, Reported, Want

from edgefleet_agent import launcher, slots
from edgefleet_agent.effects import Effects, Job, Result, at_work
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.journal import Journal
from edgefleet_agent.launcher import Trial
from edgefleet_agent.ports import Ports
from edgefleet_agent.slots import Slots
from edgefleet_agent.transport import Arrival, Desired, Down, Up, Uplink
from edgefleet_agent.upkeep import Upkeep

log = logging.getLogger(__name__)

LOOK_S = 0.5
PROOF_LEAST_S = 20.0  # a slow board takes half of it to load its engines once, and the alarm counts from the very start
PROOF_LIMIT_S = 120.0  # for a version on trial to prove itself; a board that boots waits for its network meanwhile
MODELS_LIMIT_S = (
    600.0  # a model that is being swapped is let finish; one that never does must not keep out what may mend it
)
LIMIT_SHARE = 1 / 6  # of the whole deployment's time: three starts with their alarms fit into it


class Myself(NamedTuple):
    """What the running version knows of itself, and what it can do about it.

    Args:
        manifest: of what runs; empty for the package's version.
        launched: by the launcher, and not by hand.
        package: the package's version.
        home: the board's state folder.
        unproven: what it has not shown yet, in words; empty when nothing is left.
        models_rest: whether no model is being swapped, or may be on its way back.
        restart: end, to be started by the launcher again.
        proven: committed: nobody is to end it any more.
    """

    manifest: str
    launched: bool
    package: str
    home: Path
    unproven: Callable[[], str]
    models_rest: Callable[[], bool]
    restart: Callable[[], None]
    proven: Callable[[], None]


class AgentEffects(Effects):
    """Carries effects out on the agent's own line. Each may be carried out again from its start, by either version."""

    def __init__(
        self,
        state: Path,
        ports: Ports,
        fetcher: Fetcher,
        threads: int,
        upkeep: Upkeep,
        tell: Callable[[Ended], None],
        *,
        myself: Myself,
    ) -> None:
        super().__init__(state, ports, fetcher, threads, upkeep, tell)
        self._myself = myself

    def carry_out(self, effect: Effect, journal: Journal) -> Job | None:
        """As of :class:`edgefleet_agent.effects.Effects`."""
        match effect:
            case Effect.BUILD:
                return lambda stop: Result(Event.BUILT)
            case Effect.SHADOW:
                return lambda stop: Result(Event.AGREED)
            case Effect.SWAP:
                return lambda stop: self._swap_agent(at_work(journal), stop)
            case Effect.SOAK:
                return lambda stop: self._stand_trial(at_work(journal), stop)
            case Effect.COMMIT:
                return lambda stop: self._commit_agent(at_work(journal))
            case Effect.RETURN:
                return lambda stop: self._return(at_work(journal).manifest)
            case Effect.SERVE:
                return (lambda stop: self._look(journal)) if journal.life.state is State.IDLE else None
            case Effect.DISCARD:
                self._discard_agent()
                return None
        return super().carry_out(effect, journal)

    def _swap_agent(self, assignment: Assignment, stop: threading.Event) -> Result:
        """Flip the slots and end; once more, when this version was started although they are flipped."""
        wanted, running, files = assignment.manifest, self._myself.manifest, self._ports.files
        now = slots.read(self._state, files=files)
        if now.active is not None and now.active.manifest == wanted:
            if running == wanted:
                return Result(Event.SWAPPED, "it runs, on trial")
            return self._not_started(wanted, Event.SWAP_FAILED)
        if now.candidate is None or now.candidate.manifest != wanted:
            return Result(Event.LOAD_FAILED, "the slots do not name it as candidate any more")
        patience = self._ports.clock.monotonic() + MODELS_LIMIT_S
        while not self._myself.models_rest() and self._ports.clock.monotonic() < patience:
            if stop.wait(LOOK_S):
                return Result(None)
        share_s = assignment.timeout_s * LIMIT_SHARE if assignment.timeout_s else PROOF_LIMIT_S
        limit_s = min(PROOF_LIMIT_S, max(PROOF_LEAST_S, share_s))
        launcher.write_trial(self._myself.home, Trial(wanted, limit_s, self._myself.package), files=files)
        slots.write(self._state, now.flipped(), files=files)
        self._myself.restart()
        return Result(None)

    def _not_started(self, manifest: str, event: Event) -> Result:
        """Another version was started than the one on trial: have it started, or say why it is given up.

        It may be that the launcher could not read the disk, or not count. How often that is tried is bounded by the life cycle.
        """
        home, files = self._myself.home, self._ports.files
        trial = launcher.read_trial(home, files=files)
        if trial is None or trial.manifest != manifest:
            return Result(event, "the launcher knows of no trial of it")
        if trial.package != self._myself.package:
            return Result(event, f"the board's package became {self._myself.package} meanwhile")
        if trial.starts >= launcher.STARTS:
            return Result(event, f"it was started {trial.starts} times and ended, or hung, before it had proven itself")
        if not launcher.code_of(home, manifest, files=files):
            return Result(event, "its bytes on the disk are not what was signed")
        self._myself.restart()
        return Result(None)

    def _stand_trial(self, assignment: Assignment, stop: threading.Event) -> Result:
        """Show what has to be shown, and go on showing it for ``soak_s``."""
        if self._myself.manifest != assignment.manifest:
            return self._not_started(assignment.manifest, Event.UNHEALTHY)
        trial, clock = launcher.read_trial(self._myself.home, files=self._ports.files), self._ports.clock
        began = clock.monotonic()
        deadline = began + (trial.limit_s if trial is not None else PROOF_LIMIT_S)
        proven_at: float | None = None
        while True:
            unproven, now = self._myself.unproven(), clock.monotonic()
            proven_at = None if unproven else proven_at if proven_at is not None else now
            if proven_at is not None and (now - proven_at >= assignment.soak_s or now >= deadline):
                return Result(Event.HEALTHY, f"proven after {proven_at - began:.1f} s")
            if now >= deadline:
                return Result(Event.UNHEALTHY, f"not proven within {now - began:.0f} s: {unproven}")
            if stop.wait(LOOK_S):
                return Result(None)

    def _commit_agent(self, assignment: Assignment) -> Result:
        """Mark the version that runs good; another one than that has nothing to commit."""
        if self._myself.manifest != assignment.manifest:
            return self._not_started(assignment.manifest, Event.UNHEALTHY)
        files = self._ports.files
        now = slots.read(self._state, files=files)
        if now.active is not None:
            now = slots.commit(self._state, now, files=files)
        self._myself.proven()
        slots.collect_garbage(self._state, now, files=files)
        return Result(Event.COMMITTED)

    def _return(self, failed: str) -> Result:
        """Name the version before it active, and end unless that runs already. Nothing is collected under a version that runs."""
        running, files = self._myself.manifest, self._ports.files
        before = now = slots.read(self._state, files=files)
        if now.active is not None and now.active.manifest == failed:
            now = now.returned()
        now = msgspec.structs.replace(now, candidate=None)
        if now != before:
            slots.write(self._state, now, files=files)
        wanted = now.active.manifest if now.active else ""
        if running != wanted:
            if running == failed or self._would_start(wanted):
                self._myself.restart()
                return Result(None)
            now = self._as_it_runs(now)
            slots.write(self._state, now, files=files)
        slots.collect_garbage(self._state, now, files=files)
        return Result(
            Event.RETURNED, f"agent {now.active.version} runs again" if now.active else "the package's agent runs"
        )

    def _would_start(self, manifest: str) -> bool:
        """Whether the launcher, asked now, starts this version: then it could not read the disk when it started another one."""
        home, package = self._myself.home, self._myself.package
        return launcher.choose(home, package, counting=False, files=self._ports.files).manifest == manifest

    def _as_it_runs(self, now: Slots) -> Slots:
        """The slots with what runs as the active version, when the launcher had to pass over the one that was."""
        if now.previous is not None and now.previous.manifest == self._myself.manifest:
            return now.returned()
        return Slots()

    def _look(self, journal: Journal) -> Result:
        """At rest, after a start: is what runs what the slots say? If not, the launcher had a reason, and it is told.

        A start by hand says nothing about what the launcher would have done.
        """
        files, done = self._ports.files, journal.committed
        now = slots.read(self._state, files=files)
        active = now.active.manifest if now.active else ""
        if active == self._myself.manifest or not self._myself.launched:
            return Result(None)
        if self._would_start(active):
            self._myself.restart()
        elif done is not None and done.manifest == active:
            return Result(Event.UNHEALTHY, self._why_not(active), about=done)
        else:
            slots.write(self._state, self._as_it_runs(now), files=files)
        return Result(None)

    def _why_not(self, committed: str) -> str:
        """Why the launcher does not start a version that was committed."""
        home, files = self._myself.home, self._ports.files
        trial = launcher.read_trial(home, files=files)
        if trial is None:
            return "the record of its trial is lost"
        if trial.package != self._myself.package:
            return f"the board's package became {self._myself.package}, it was taken on {trial.package}"
        if trial.manifest == committed and trial.starts >= launcher.LATE_STARTS:
            return f"it was started {trial.starts} times and never ran for {launcher.SETTLED_S:.0f} s"
        return "its bytes on the disk are not what was signed"

    def _discard_agent(self) -> None:
        files = self._ports.files
        now = slots.read(self._state, files=files)
        kept = msgspec.structs.replace(now, candidate=None)
        if now.candidate is not None:
            slots.write(self._state, kept, files=files)
        slots.collect_garbage(self._state, kept, files=files)


class AgentUplink:
    """The line's way to the controller: the model's, but that its report becomes a part of the board's.

    Args:
        uplink: what both share.
        manifest: of the version that runs.
        tell: takes the report.
    """

    def __init__(self, uplink: Uplink, manifest: str, tell: Callable[[AgentReport], None]) -> None:
        self._uplink, self._manifest, self._tell = uplink, manifest, tell

    def start(self) -> None:
        """The model's line does that."""

    def stop(self) -> None:
        """The model's line does that."""

    def came_up(self) -> None:
        """The model's line does that."""

    def follow_metadata(self, files: tuple[str, ...]) -> None:
        self._uplink.follow_metadata(files)

    def listen(self, digest: str) -> None:
        self._uplink.listen(digest)

    def unlisten(self, digest: str) -> None:
        self._uplink.unlisten(digest)

    def want(self, want: Want) -> None:
        self._uplink.want(want)

    def quiet_s(self) -> float:
        return self._uplink.quiet_s()

    def report(self, reported: Reported) -> None:
        self._tell(
            AgentReport(
                running=self._manifest, state=reported.state, assignment=reported.assignment, active=reported.active,
                candidate=reported.candidate, previous=reported.previous, ended=reported.ended, result=reported.result,
                desired_seen=reported.desired_seen, refusal=reported.refusal, problem=reported.problem,
            )
        )  # fmt: skip

    def event(self, content: bytes) -> None:
        self._uplink.event(content)

    def fetch(self, digest: str, size: int, chunk_bytes: int, numbers: list[int]) -> None:
        self._uplink.fetch(digest, size, chunk_bytes, numbers)


class Fork:
    """Hands what arrives to the lines that it concerns; each has an inbox of its own. Runs on the uplink's threads.

    Args:
        models, agent: put into the inbox of that line; may block.
    """

    def __init__(self, models: Callable[[Arrival], None], agent: Callable[[Arrival], None]) -> None:
        self._models, self._agent = models, agent
        self.up = False

    def put(self, item: Arrival) -> None:
        if isinstance(item, Up | Down):
            self.up = isinstance(item, Up)
        if not isinstance(item, Desired) or item.subject is Subject.MODEL:
            self._models(item)
        if not isinstance(item, Desired) or item.subject is Subject.AGENT:
            self._agent(item)


class Proof:
    """What a version on trial has to show, called for what is still missing.

    Args:
        line_is_up: whether the broker is connected.
        unverified: takes the assignment in force through the trust path; what was in the way, or empty.
    """

    def __init__(self, line_is_up: Callable[[], bool], unverified: Callable[[], str], ports: Ports) -> None:
        self._line_is_up, self._unverified, self._ports = line_is_up, unverified, ports
        self._verified = False

    def __call__(self) -> str:
        """In words; empty when nothing is missing. Verifying is shown once, the others each time."""
        if not self._line_is_up():
            return "the broker was not reached"
        if not self._verified:
            if missing := self._unverified():
                return missing
            self._verified = True
        try:
            self._ports.runtime.status()
        except EdgefleetError as exc:
            return f"the runtime does not answer: {exc}"
        return ""
