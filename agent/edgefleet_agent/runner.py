"""The agent's one loop: receives what arrives in the inbox, hands on effects. inbox -> step -> effects -> inbox.

Level-triggered: the board holds the newest verified assignment against what it does; nothing here is a command that could be
missed. One thread drains the inbox and owns everything; verifying, accepting and swapping run on a job thread whose result
comes back through the same inbox, tagged with the transition that started it, so a late answer of a superseded job is ignored.

Not handled here: which transitions exist (lifecycle.py), how a thing is done (fetch, verify, accept, swap).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import MAX_ASSIGNMENT_BYTES, Admission, Assignment, Incomplete, metadata_files
from edgefleet_shared.clock import Clock
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.exhaustive import assert_never
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import Effect, Event, State, step
from edgefleet_shared.messages import Ended, Health, OutcomeTold, Progress, Refused, Reported, SlotReport
from edgefleet_shared.outcomes import Outcome

from edgefleet_agent import __version__, accept, health, journal, notify, slots, swap, verify
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.runtime.control import RuntimeClient, StatusReport
from edgefleet_agent.settings import Settings
from edgefleet_agent.slots import Slot, SlotStatus
from edgefleet_agent.spool import Spool
from edgefleet_agent.transport import Acked, Arrival, Chunk, Desired, Down, MetadataFile, Up, Uplink

log = logging.getLogger(__name__)

TICK_S = 0.5
ASK_AGAIN_S = 5.0  # an admission that could not be decided
PROGRESS_EVERY_S = 1.0
INCONCLUSIVE_ATTEMPTS = 3
INCONCLUSIVE_PAUSE_S = 5.0
# After commit: this many crashes of the engine's process between two looks at its health mean that it regressed.
REGRESSION_CRASHES = 3


class JobDone(msgspec.Struct, frozen=True):
    """Inbox: a job ended with an event. ``transition`` says which one had started it."""

    transition: int
    event: Event
    detail: str
    acceptance: AcceptanceReport | None = None


class AdmissionDone(msgspec.Struct, frozen=True):
    """Inbox: what the verifying child said about a ``desired`` message."""

    digest: str
    result: Admission | verify.Refusal | EdgefleetError


class Measured(msgspec.Struct, frozen=True):
    """Inbox: a look at the board's health."""

    health: Health
    status: StatusReport | None


Item = Arrival | JobDone | AdmissionDone | Measured
Job = Callable[[threading.Event], tuple[Event, str] | tuple[Event, str, AcceptanceReport]]


class Runner:
    """The agent of one board.

    Args:
        state: the state folder, locked by the caller.
        board: what the board is.
        boot: this start's name.
        inbox: shared with the uplink, which puts into it.
    """

    def __init__(
        self,
        state: Path,
        settings: Settings,
        board: Fingerprint,
        boot: str,
        inbox: queue.Queue[Item],
        uplink: Uplink,
        client: RuntimeClient,
        clock: Clock,
    ) -> None:
        self._state, self._settings, self._board, self._boot = state, settings, board, boot
        self._inbox, self._uplink, self._client, self._clock = inbox, uplink, client, clock
        self._journal = journal.read(state)
        self._spool = Spool(settings.device, boot, uplink.event, clock, settings.spool_events)
        self._fetcher = Fetcher(
            slots.artifacts(state),
            want=uplink.want,
            listen=uplink.listen,
            unlisten=uplink.unlisten,
            fallback=uplink.fetch if settings.api_host else None,
            clock=clock,
        )
        self._events: deque[tuple[Event, str]] = deque()
        self._transition = 0
        self._stop_job = threading.Event()
        self._ending = threading.Event()
        self._desired: bytes | None = None
        self._admitting = False
        self._ask_again_at: float | None = None
        self._told_at = 0.0
        self._fetch_deadline: float | None = None
        self._crashes: tuple[str, int] | None = None
        self._root_version = 0
        self._stopping = False

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until :meth:`stop`."""
        self._follow_metadata()
        self._feed(Event.RESTARTED, "the agent started")
        watcher = threading.Thread(target=self._watch_health, name="health", daemon=True)
        watcher.start()
        notify.ready(f"{self._settings.device}: {self._journal.life.state.value}")
        while not self._stopping:
            item: Item | None
            try:
                item = self._inbox.get(timeout=TICK_S)
            except queue.Empty:
                item = None
            if item is not None:
                self._take(item)
            self._tick()
            self._work_off()
            notify.alive()
        self._ending.set()
        self._stop_job.set()

    def stop(self) -> None:
        """End the loop at its next turn. Safe in a signal handler: it takes no lock."""
        self._stopping = True

    def _take(self, item: Item) -> None:
        match item:
            case Desired(content):
                self._desired = content
                self._consider()
            case MetadataFile(name, content):
                if verify.take_metadata(self._state, name, content):
                    self._consider()
            case Chunk(digest, number, piece):
                self._take_chunk(digest, number, piece)
            case Acked(ack):
                self._spool.acknowledge(ack)
            case Up():
                self._uplink.came_up()
                self._spool.came_up()
                self._report()
            case Down(reason):
                self._spool.up = False
                log.info("connection lost", extra={"reason": reason})
            case JobDone():
                self._job_done(item)
            case AdmissionDone(digest, result):
                self._admission_done(digest, result)
            case Measured(figures, status):
                self._spool.add(figures)
                self._look_for_regression(status)
            case _:
                assert_never(item)

    def _tick(self) -> None:
        now = self._clock.monotonic()
        if self._ask_again_at is not None and now >= self._ask_again_at:
            self._ask_again_at = None
            self._consider()
        if self._journal.life.state is State.FETCHING:
            if self._fetch_deadline is not None and now > self._fetch_deadline:
                self._events.append((Event.TIMED_OUT, f"{self._fetcher.done_bytes} of {self._fetcher.total_bytes} bytes came in time"))  # fmt: skip
                self._fetch_deadline = None
                return
            self._fetcher.tick()
            if now - self._told_at >= PROGRESS_EVERY_S:
                self._tell_progress()

    # -- what is wanted ------------------------------------------------------------------------------------------------

    def _follow_metadata(self) -> None:
        root = msgspec.json.decode(verify.read_root(self._state))
        version = root["signed"]["version"]
        if version != self._root_version:
            self._root_version = version
            self._uplink.follow_metadata(metadata_files(self._settings.device_class, version))

    def _consider(self) -> None:
        """Have the newest ``desired`` message verified, unless that was done."""
        desired = self._desired
        if desired is None or self._admitting or len(desired) > MAX_ASSIGNMENT_BYTES:
            return
        digest = digest_of(desired)
        if digest == self._journal.desired_seen:
            return
        self._admitting = True

        def ask() -> None:
            result: Admission | verify.Refusal | EdgefleetError
            try:
                result = verify.admit(self._state, self._settings, self._board, desired, self._clock.now())
            except (verify.Refusal, EdgefleetError) as exc:
                result = exc
            self._inbox.put(AdmissionDone(digest, result))

        threading.Thread(target=ask, name="admit", daemon=True).start()

    def _admission_done(self, digest: str, result: Admission | verify.Refusal | EdgefleetError) -> None:
        self._admitting = False
        match result:
            case Admission(assignment=assignment):
                self._journal = msgspec.structs.replace(
                    self._journal, desired_seen=digest, refusal="", pending=assignment
                )
                journal.write(self._state, self._journal)
                self._follow_metadata()
                self._take_up()
            case verify.Refusal():
                self._refuse(digest, result)
            case EdgefleetError():
                level = logging.INFO if isinstance(result, Incomplete) else logging.WARNING
                log.log(level, "admission waits", extra={"reason": str(result)})
                self._ask_again_at = self._clock.monotonic() + ASK_AGAIN_S
                return
            case _:
                assert_never(result)
        self._consider()  # a newer message may have come meanwhile

    def _refuse(self, digest: str, refusal: verify.Refusal) -> None:
        reason = str(refusal.error)
        ended = self._journal.ended
        if refusal.assignment:
            ended = Ended(
                assignment=refusal.assignment, manifest="", outcome=Outcome.REJECTED, reason=reason,
                at=self._clock.now(),
            )  # fmt: skip
        self._journal = msgspec.structs.replace(self._journal, desired_seen=digest, refusal=reason, ended=ended)
        journal.write(self._state, self._journal)
        log.warning("assignment refused", extra={"digest": digest, "reason": reason})
        check = getattr(refusal.error, "check", refusal.error.code)
        self._spool.add(Refused(desired=digest, check=check, reason=reason))
        if ended is not None and refusal.assignment:
            self._spool.add(OutcomeTold(ended=ended))
        self._report()

    def _take_up(self) -> None:
        """Hold the pending assignment against what is being done."""
        pending, current = self._journal.pending, self._journal
        if pending is None:
            return
        if current.life.state is not State.IDLE:
            if current.assignment is not None and pending.id == current.assignment.id:
                self._journal = msgspec.structs.replace(current, pending=None)
            else:
                self._events.append((Event.ASSIGNED, f"assignment {pending.id} took its place"))
            return
        if current.ended is not None and current.ended.assignment == pending.id:
            self._journal = msgspec.structs.replace(current, pending=None)
            return
        self._journal = msgspec.structs.replace(current, pending=None, assignment=pending, reason="", acceptance=None)
        active = slots.read(self._state).active
        served = active is not None and active.manifest == pending.manifest and active.status is SlotStatus.GOOD
        self._events.append((Event.ALREADY_SERVED if served else Event.ASSIGNED, ""))

    # -- the life cycle ------------------------------------------------------------------------------------------------

    def _work_off(self) -> None:
        while self._events:
            event, detail = self._events.popleft()
            self._feed(event, detail)
            if self._journal.life.state is State.IDLE and not self._events:
                self._take_up()

    def _feed(self, event: Event, detail: str) -> None:
        before = self._journal
        life, effects = step(before.life, event)
        if not effects:
            return
        reason = detail if life.outcome is not before.life.outcome and life.outcome is not None else before.reason
        if event is Event.RETURN_FAILED and before.reason:
            reason = f"{before.reason}; then {detail}"
        self._journal = msgspec.structs.replace(before, life=life, reason=reason)
        if Effect.REPORT in effects:
            self._journal = msgspec.structs.replace(self._journal, ended=self._ended())
        self._transition += 1
        self._stop_job.set()
        self._stop_job = threading.Event()
        log.info(
            "transition",
            extra={
                "from": before.life.state.value, "event": event.value, "to": life.state.value, "reason": detail,
                "assignment": self._journal.assignment.id if self._journal.assignment else "",
            },
        )  # fmt: skip
        jobs: list[Job] = []
        for effect in effects:
            job = self._execute(effect)
            if job is not None:
                jobs.append(job)
        if jobs:
            self._start(jobs)
        self._report()
        if life.state is not before.life.state:
            self._tell_progress(detail)
        notify.status(f"{self._settings.device}: {life.state.value}")

    def _execute(self, effect: Effect) -> Job | None:
        """Carry out a quick effect at once, or return the job that carries out a slow one."""
        assignment = self._journal.assignment
        match effect:
            case Effect.PERSIST:
                journal.write(self._state, self._journal)
            case Effect.FETCH:
                self._fetch()
            case Effect.STOP_FETCH:
                self._fetcher.stop()
            case Effect.DISCARD:
                swap.discard(self._state, self._client)
            case Effect.REPORT:
                if self._journal.ended is not None:
                    self._spool.add(OutcomeTold(ended=self._journal.ended))
            case Effect.VERIFY:
                return self._verify
            case Effect.ACCEPT:
                return self._accept
            case Effect.SWAP:
                return lambda stop: swap.swap(self._state, self._client, self._at_work(), stop, self._clock)
            case Effect.SOAK:
                return lambda stop: swap.soak(self._client, self._at_work(), stop, self._clock)
            case Effect.COMMIT:
                return lambda stop: swap.commit(self._state, self._client)
            case Effect.RETURN:
                late = self._journal.life.outcome is Outcome.LATE_REGRESSION
                failed = None if late else assignment
                return lambda stop: swap.go_back(self._state, self._client, failed, stop, self._clock)
            case Effect.SERVE:
                return self._serve
            case _:
                assert_never(effect)
        return None

    def _at_work(self) -> Assignment:
        assert self._journal.assignment is not None
        return self._journal.assignment

    def _start(self, jobs: list[Job]) -> None:
        transition, stop = self._transition, self._stop_job

        def run() -> None:
            for job in jobs:
                event, detail, *rest = job(stop)
                if event is not Event.RESTARTED:  # "nothing to tell": go on with the next one
                    self._inbox.put(JobDone(transition, event, detail, *rest))
                    return

        threading.Thread(target=run, name=f"job-{self._journal.life.state.value}", daemon=True).start()

    def _job_done(self, done: JobDone) -> None:
        if done.transition != self._transition:
            return
        if done.acceptance is not None:
            self._journal = msgspec.structs.replace(self._journal, acceptance=done.acceptance)
        self._events.append((done.event, done.detail))

    # -- slow effects, on a job thread ---------------------------------------------------------------------------------

    def _verify(self, stop: threading.Event) -> tuple[Event, str]:
        try:
            checked = verify.check_artifact(self._state, self._at_work())
        except verify.Refusal as exc:
            return Event.NOT_VERIFIED, str(exc.error)
        except EdgefleetError as exc:
            return Event.NOT_VERIFIED, str(exc)
        return Event.VERIFIED, f"{checked.blobs} blobs, {checked.checked_bytes} bytes"

    def _accept(self, stop: threading.Event) -> tuple[Event, str, AcceptanceReport]:
        attempt = 0
        while True:
            attempt += 1
            report = accept.accept(self._state, self._at_work().manifest, threads=self._settings.threads)
            if report.verdict is Verdict.PASSED:
                return Event.ACCEPTED, "", report
            # Inconclusive is the board's state now, and an error is ours: both deserve another try, a failed model does not.
            if report.verdict is Verdict.FAILED or attempt >= INCONCLUSIVE_ATTEMPTS or stop.wait(INCONCLUSIVE_PAUSE_S):
                return Event.NOT_ACCEPTED, f"acceptance {report.verdict.value}: {report.reason}", report

    def _serve(self, stop: threading.Event) -> tuple[Event, str]:
        try:
            swap.serve(self._state, self._client, stop, self._clock)
        except EdgefleetError as exc:
            log.warning("runtime does not serve", extra={"reason": str(exc)})
        return Event.RESTARTED, ""

    # -- fetching ------------------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        assignment = self._at_work()
        now = slots.read(self._state)
        candidate = Slot(assignment.manifest, assignment.model, assignment.version, SlotStatus.BAD)
        if now.candidate != candidate:
            slots.write(self._state, msgspec.structs.replace(now, candidate=candidate))
        timeout = assignment.timeout_s
        self._fetch_deadline = self._clock.monotonic() + timeout if timeout > 0 else None
        try:
            self._fetcher.begin(assignment.manifest, assignment.size)
        except EdgefleetError as exc:
            self._events.append((Event.FETCH_FAILED, str(exc)))
            return
        self._fetched()

    def _take_chunk(self, digest: str, number: int, piece: bytes) -> None:
        if self._journal.life.state is not State.FETCHING:
            return
        try:
            self._fetcher.chunk(digest, number, piece)
        except EdgefleetError as exc:
            self._events.append((Event.FETCH_FAILED, str(exc)))
            return
        self._fetched()

    def _fetched(self) -> None:
        if self._fetcher.finished:
            detail = f"{self._fetcher.total_bytes} bytes, {self._fetcher.bad_chunks} bad chunks"
            self._fetcher.stop()
            self._fetcher.finished = False
            self._events.append((Event.FETCHED, detail))

    # -- telling -------------------------------------------------------------------------------------------------------

    def _ended(self) -> Ended:
        current = self._journal
        assert current.life.outcome is not None
        return Ended(
            assignment=current.assignment.id if current.assignment else "",
            manifest=current.assignment.manifest if current.assignment else "",
            outcome=current.life.outcome,
            reason="" if current.life.outcome is Outcome.SUCCEEDED else current.reason,
            at=self._clock.now(),
            acceptance=current.acceptance,
        )

    def _tell_progress(self, detail: str = "") -> None:
        self._told_at = self._clock.monotonic()
        current = self._journal
        if current.assignment is not None:
            fetching = current.life.state is State.FETCHING
            self._spool.add(
                Progress(
                    assignment=current.assignment.id,
                    state=current.life.state,
                    detail=detail[:500],
                    done=self._fetcher.done_bytes if fetching else 0,
                    total=self._fetcher.total_bytes if fetching else 0,
                )
            )

    def _report(self) -> None:
        current, on_disk = self._journal, slots.read(self._state)
        self._uplink.report(
            Reported(
                device=self._settings.device,
                device_class=self._settings.device_class,
                boot=self._boot,
                at=self._clock.now(),
                state=current.life.state,
                agent_version=__version__,
                fingerprint=self._board,
                assignment=current.assignment.id if current.assignment else "",
                active=_told(on_disk.active),
                candidate=_told(on_disk.candidate),
                previous=_told(on_disk.previous),
                ended=current.ended,
                desired_seen=current.desired_seen,
                refusal=current.refusal,
            )
        )

    # -- health --------------------------------------------------------------------------------------------------------

    def _watch_health(self) -> None:
        meters = health.Meters()
        while not self._ending.wait(self._settings.health_period_s):
            self._inbox.put(Measured(*health.measure(self._state, self._client, meters)))

    def _look_for_regression(self, status: StatusReport | None) -> None:
        """A committed model whose engine keeps dying is a late regression: return to the previous one."""
        serving = next((v for v in status.versions if v.serving), None) if status else None
        if serving is None:
            return
        before = self._crashes
        self._crashes = (serving.manifest, serving.crashes)
        if before is None or before[0] != serving.manifest or self._journal.life.state is not State.IDLE:
            return
        crashed = serving.crashes - before[1]
        on_disk = slots.read(self._state)
        if (
            crashed >= REGRESSION_CRASHES
            and on_disk.previous
            and on_disk.active
            and on_disk.active.manifest == before[0]
        ):
            self._events.append(
                (Event.UNHEALTHY, f"the engine's process ended {crashed} times: {serving.last_problem}")
            )


def _told(slot: Slot | None) -> SlotReport | None:
    if slot is None:
        return None
    return SlotReport(manifest=slot.manifest, model=slot.model, version=slot.version, status=slot.status.value)
