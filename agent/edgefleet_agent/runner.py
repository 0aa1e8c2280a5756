"""The agent's one loop: receives what arrives in the inbox, hands on effects. inbox -> step -> effects -> inbox.

One thread drains the inbox and owns everything; verifying, accepting and swapping run on a job thread whose result comes back
through the same inbox, tagged with the transition that started it, so a late answer of a superseded job is ignored.

A disk that refuses does not end the loop. An event whose journal write fails has not happened: it waits, and what follows waits
behind it. An effect that fails is carried out again. What stands in the way is told in ``reported``.

Not handled here: which transitions exist (lifecycle.py), what is wanted of the board (admission.py), how a thing is done
(effects.py and the stages behind it), in which words it is told (reporting.py).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgefleet_shared.artifact import Layout
from edgefleet_shared.assignment import Subject
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.exhaustive import assert_never
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import HARMLESS, TABLE, Event, State, got_on, step

from edgefleet_agent import health, notify, reporting, slots, swap
from edgefleet_agent.admission import Admissions
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.inbox import AdmissionDone, Item, JobBroke, JobDone, JobFailed, JobTold, Measured, SigningDone
from edgefleet_agent.journal import Keeper
from edgefleet_agent.line import Happened, Line
from edgefleet_agent.ports import Ports
from edgefleet_agent.recall import Recall
from edgefleet_agent.results import Results
from edgefleet_agent.runtime.control import StatusReport
from edgefleet_agent.settings import Settings
from edgefleet_agent.slots import SlotStatus
from edgefleet_agent.spool import Spool
from edgefleet_agent.transition import Now, journal_after
from edgefleet_agent.transport import Acked, Chunk, Desired, Down, MetadataFile, Up
from edgefleet_agent.upkeep import Upkeep
from edgefleet_agent.work import AGAIN_S, Work

log = logging.getLogger(__name__)

TICK_S = 0.5
PROGRESS_EVERY_S = 1.0
CHANGING = frozenset({State.SWAPPING, State.SOAKING, State.COMMITTING, State.ROLLING_BACK})


class Runner:
    """The agent of one board.

    Args:
        state: the state folder, locked by the caller.
        board: what the board is.
        boot: this start's name.
        inbox: shared with the uplink, which puts into it.
        line: which of the board's lines this is, and how it stands to the others.
        kernel_boot: the board's start, see :class:`edgefleet_agent.journal.Journal`.
    """

    def __init__(
        self,
        state: Path,
        settings: Settings,
        board: Fingerprint,
        boot: str,
        inbox: queue.Queue[Item],
        ports: Ports,
        line: Line | None = None,
        kernel_boot: str = "",
    ) -> None:
        line = line or Line()
        self._kernel_boot = kernel_boot
        self._subject, self._may_begin, self._excused = line.subject, line.may_begin, line.excused
        self._state, self._settings = state, settings
        self._inbox, self._ports = inbox, ports
        uplink, clock = ports.uplink, ports.clock
        self._keeper = Keeper(state, ports.files)
        self._recall = Recall(state, self._keeper, ports.files)
        self._spool = Spool(
            state / "spool", settings.device, boot, uplink.event, clock, limit_bytes=settings.spool_bytes,
            flush_s=settings.spool_flush_s, files=ports.files, problem=lambda why: self._teller.note("spool", why),
        )  # fmt: skip
        self._fetcher = Fetcher(
            # Its folder is made when the disk lets it, see recall.py.
            Layout(state / "artifacts", read_only=True, files=ports.files),
            want=uplink.want,
            listen=uplink.listen,
            unlisten=uplink.unlisten,
            fallback=uplink.fetch if settings.api_host else None,
            clock=clock,
            alive=notify.alive,
            quiet_s=uplink.quiet_s,
        )
        self._teller = reporting.Teller(state, settings, board, boot, self._keeper, ports, self._spool, self._fetcher)
        self._results = Results(
            settings.device, line.subject, self._keeper, ports, tell=self._spool.add, put=inbox.put,
            problem=lambda why: self._teller.note("result", why), report=self._teller.result,
        )  # fmt: skip
        # What the agent itself is made of needs no engine.
        build_keys = board.build_keys if line.subject is Subject.MODEL else {}
        self._upkeep = Upkeep(state, ports, build_keys, self._job_told)
        self._admissions = Admissions(
            line.home or state, settings, board, self._keeper, ports,
            tell=self._spool.add, tell_result=self._results.sign, put=inbox.put, problem=self._teller.note,
            subject=line.subject, deciding=line.deciding or threading.Lock(),
        )  # fmt: skip
        self._crashes = health.CrashWatch()
        self._events: deque[Happened] = deque()
        self._work = Work(
            line.effects(state, ports, self._fetcher, settings.threads, self._upkeep, self._results.sign), self._keeper, ports,
            self._teller, inbox.put, self._fetched, self._fetch_failed,
        )  # fmt: skip
        self._ending = threading.Event()
        self._wake_at: float | None = 0.0  # None: awake
        self._held_until = 0.0
        self._look_at_pending = True
        self._look_at_plans = True
        self._stopping = False

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, beside: Callable[[], None] = lambda: None) -> None:
        """Until :meth:`stop`. ``beside`` is what else this thread turns, after each turn of its own."""
        self.turn(None)
        beside()
        notify.ready(f"{self._settings.device}: {self._keeper.now.life.state.value}")
        while not self._stopping:
            item: Item | None
            try:
                item = self._inbox.get(timeout=TICK_S)
            except queue.Empty:
                item = None
            self.turn(item)
            beside()
            notify.alive()
        self._ending.set()
        self.close()

    def close(self) -> None:
        """The agent ends in order, and its next start is to know that: who stops it says nothing against what it was at."""
        self._work.stop()
        current = self._keeper.now
        with suppress(EdgefleetError):  # then it comes again
            self._fetcher.make_safe()
        if self._wake_at is None and current.life.state is not State.IDLE:
            with suppress(EdgefleetError):  # then it counts, as when the power is cut
                self._keeper.keep(stopped=True, soaked_s=current.soaked_s + self._work.soaked_s())
        self._spool.close()

    def stop(self) -> None:
        """End the loop at its next turn. Safe in a signal handler: it takes no lock."""
        self._stopping = True

    @property
    def changes(self) -> bool:
        """Whether what it is about is being changed, or may be on its way back."""
        return self._wake_at is not None or self.is_changing

    @property
    def is_changing(self) -> bool:
        """The same as far as the disk has said: what is not read yet changes nothing."""
        return self._keeper.now.life.state in CHANGING

    def note(self, what: str, problem: str) -> None:
        """Something beside the line stands in the board's way or, without ``problem``, does not any more. For the loop's thread."""
        self._teller.note(what, problem)

    def unverified(self) -> str:
        """See :meth:`edgefleet_agent.admission.Admissions.unverified`."""
        return self._admissions.unverified()

    def turn(self, item: Item | None) -> None:
        """Take one item, or none, and do what is due."""
        now = self._ports.clock.monotonic()
        if self._wake_at is not None and now >= self._wake_at:
            self._wake(now)
        if item is not None:
            self._take(item)
        self._spool.tick()
        if self._wake_at is None:
            self._tick(now)
            self._work_off(now)

    def _wake(self, now: float) -> None:
        """Read what the disk remembers. A disk that can't be read is asked again."""
        try:
            self._recall.read()
            self._admissions.begin()
        except EdgefleetError as exc:
            self._wake_at = now + AGAIN_S
            self._teller.note("start", str(exc))
            return
        self._wake_at = None
        self._teller.note("start")
        self._results.begin()
        life = self._keeper.now.life
        again = f", {life.restarts + 1} times in a row while {life.state.value}" if life.state is not State.IDLE else ""
        self._happen(Event.RESTARTED, f"the agent started{again}")

    def _take(self, item: Item) -> None:
        match item:
            case Desired(content, _):
                self._admissions.desire(content)
            case MetadataFile(name, content):
                self._admissions.take_metadata(name, content)
            case Chunk(digest, number, piece):
                self._take_chunk(digest, number, piece)
            case Acked(ack):
                self._spool.acknowledge(ack)
            case Up():
                self._admissions.connected()
                self._ports.uplink.came_up()
                self._spool.came_up()
                self._teller.report()
            case Down(reason):
                self._spool.up = False
                log.info("connection lost", extra={"reason": reason})
            case JobDone() | JobFailed():
                came = self._work.ended(item)
                if came is not None:
                    self._events.append(came)
            case JobTold(state, detail, done, total):
                if state is self._keeper.now.life.state:
                    self._teller.progress(detail, done, total)
            case JobBroke(error):
                raise error
            case AdmissionDone():
                if self._admissions.done(item):
                    self._look_at_pending = True
                    self._teller.report()
            case SigningDone():
                self._results.done(item)
            case Measured(figures, status):
                self._spool.add(figures)
                self._look_for_regression(status)
            case _:
                assert_never(item)

    def _tick(self, now: float) -> None:
        self._admissions.tick()
        self._results.tick()
        self._work.try_again(now)
        state = self._keeper.now.life.state
        if self._work.ran_out(now, state):
            came = f"{self._fetcher.done_bytes} of {self._fetcher.total_bytes} bytes came in time"
            self._happen(Event.TIMED_OUT, came if state is State.FETCHING else "the plan was not built in time")
            return
        if state is not State.FETCHING:
            return
        try:
            self._fetcher.tick()
        except EdgefleetError as exc:
            self._fetch_failed(exc)
            return
        if self._fetcher.safe_bytes and self._keeper.now.life.restarts:
            with suppress(EdgefleetError):  # looked at again with the next turn
                self._keeper.keep(life=got_on(self._keeper.now.life))
        if now - self._teller.progress_told_at >= PROGRESS_EVERY_S:
            self._teller.progress()

    # -- the life cycle ------------------------------------------------------------------------------------------------

    def _happen(self, event: Event, detail: str = "", **changes: Any) -> None:
        self._events.append(Happened(self._work.transition, event, detail, changes))

    def _take_up(self) -> None:
        """Hold the pending assignment against what is being done."""
        current = self._keeper.now
        pending = current.pending
        if self._look_at_plans and current.life.state is State.IDLE:
            # Before anything new: what the board fell back to must be able to serve.
            outdated = self._upkeep.outdated()
            self._look_at_plans = False
            if outdated:
                self._happen(Event.OUTDATED, outdated)
                return
        if pending is None:
            return
        if current.life.state is not State.IDLE:
            if current.assignment is None or pending.id != current.assignment.id:
                self._happen(Event.ASSIGNED, f"assignment {pending.id} took its place")
            return
        if current.ended is not None and current.ended.assignment == pending.id:
            self._keeper.keep(pending=None)
            return
        if not self._may_begin():
            return
        active = slots.read(self._state, files=self._ports.files).active
        served = active is not None and active.manifest == pending.manifest and active.status is SlotStatus.GOOD
        self._happen(
            Event.ALREADY_SERVED if served else Event.ASSIGNED,
            pending=None, assignment=pending, reason="", acceptance=None,
        )  # fmt: skip

    def _work_off(self, now: float) -> None:
        """Feed the events that wait. When the disk refuses to remember one, it and what follows wait."""
        if now < self._held_until:
            return
        try:
            while True:
                if not self._events and (self._look_at_pending or self._keeper.now.life.state is State.IDLE):
                    self._take_up()
                    self._look_at_pending = False
                if not self._events:
                    break
                if self._events[0].transition == self._work.transition:
                    self._feed(self._events[0])
                self._events.popleft()
        except EdgefleetError as exc:
            self._held_until = now + AGAIN_S
            self._teller.note("journal", str(exc))
        else:
            self._teller.note("journal")

    def _feed(self, happened: Happened) -> None:
        """One transition: persist, then act.

        Raises:
            EnvironmentProblem: it could not be persisted, and has not happened.
        """
        event, before = happened.event, self._keeper.now
        switched_off = before.life.state in HARMLESS and before.kernel_boot != self._kernel_boot
        life, effects = step(before.life, event, counted=not (switched_off or before.stopped or self._excused()))
        if not effects:
            return
        at = Now(self._settings.device, self._subject, self._kernel_boot, self._ports.clock.now())
        self._keeper.replace(journal_after(before, happened, life, effects, at))
        self._look_at_plans = True
        # What came while it could not be heeded need not wait longer: who takes a version back does not want it to serve first.
        self._look_at_pending = self._look_at_pending or bool(TABLE[life.state, Event.ASSIGNED].effects)
        log.info(
            "transition",
            extra={
                "from": before.life.state.value, "event": event.value, "to": life.state.value, "reason": happened.detail,
                "assignment": self._keeper.now.assignment.id if self._keeper.now.assignment else "",
            },
        )  # fmt: skip
        self._work.next(life.state, effects[1:])  # the first one was to persist
        self._teller.report()
        if life.state is not before.life.state:
            self._teller.progress(happened.detail)
        notify.status(f"{self._settings.device}: {life.state.value}")

    def _job_told(self, state: State, detail: str, done: int, total: int) -> None:
        """On the job's thread, which must not wait for this loop: it may be waiting for the job. Progress can be missed."""
        with suppress(queue.Full):
            self._inbox.put_nowait(JobTold(state, detail, done, total))

    # -- fetching ------------------------------------------------------------------------------------------------------

    def _take_chunk(self, digest: str, number: int, piece: bytes) -> None:
        if self._keeper.now.life.state is not State.FETCHING:
            return
        try:
            self._fetcher.chunk(digest, number, piece)
        except EdgefleetError as exc:
            self._fetch_failed(exc)
            return
        self._fetched()

    def _fetched(self) -> None:
        if self._fetcher.finished:
            detail = f"{self._fetcher.total_bytes} bytes, {self._fetcher.bad_chunks} bad chunks"
            self._fetcher.stop()
            self._fetcher.finished = False
            self._happen(Event.FETCHED, detail)

    def _fetch_failed(self, error: EdgefleetError) -> None:
        self._fetcher.stop()
        if isinstance(error, EnvironmentProblem):
            # A full disk is emptied of what was fetched first: else the journal could not even say that the fetch failed.
            with suppress(EdgefleetError):
                swap.make_room(self._state, self._ports)
        self._happen(Event.FETCH_FAILED, str(error))

    # -- health --------------------------------------------------------------------------------------------------------

    def watch_health(self) -> None:
        """Look at it beside the loop from now on. Raises EnvironmentProblem: the board has no room for the thread."""
        self._ports.spawn("health", self._watch_health)

    def _watch_health(self) -> None:
        meters = health.Meters()
        while not self._ending.wait(self._settings.health_period_s):
            self._inbox.put(Measured(*health.measure(self._state, self._ports.runtime, meters)))

    def _look_for_regression(self, status: StatusReport | None) -> None:
        """A committed model whose engine keeps dying is a late regression: return to the previous one."""
        regressed = self._crashes.look(status)
        current = self._keeper.now
        if regressed is None or current.life.state is not State.IDLE or self._wake_at is not None:
            return
        manifest, reason = regressed
        with suppress(EdgefleetError):  # a disk that can't be read now is looked at again
            on_disk = slots.read(self._state, files=self._ports.files)
            done = current.committed
            if on_disk.previous and on_disk.active and done and on_disk.active.manifest == manifest == done.manifest:
                # The journal's own word for what failed: a second try must not take the one that was returned to for it.
                self._happen(Event.UNHEALTHY, reason, assignment=done, acceptance=None)
