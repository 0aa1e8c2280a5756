"""What the board is at: receives the effects of a transition, does the quick ones, starts the slow ones on a thread, and tries again what failed.

What comes of a job is put into the inbox, tagged with the transition that started it; :meth:`Work.ended` makes the next event of it.
Not handled here: how a thing is done (effects.py and the stages behind it), and which transition comes of it (runner.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from edgefleet_shared.contract import AcceptanceReport, Verdict, doubted
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.lifecycle import TABLE, Effect, Event, State

from edgefleet_agent.effects import Effects, Job
from edgefleet_agent.inbox import Item, JobBroke, JobDone, JobFailed
from edgefleet_agent.journal import Journal, Keeper
from edgefleet_agent.line import Happened
from edgefleet_agent.ports import Ports
from edgefleet_agent.reporting import Teller

AGAIN_S = 5.0  # between two tries of what the disk, or the runtime, refused
AT_REST_AGAIN_S = 60.0  # when that failed several times: each try may cost the start of a worker
TRIES = 3  # of a job, in the states that are left when the board can't do its part


class Work:
    """The effects of the last transition, and what is left of them. For the loop's thread.

    Args:
        put: into the loop's inbox, from any thread.
        fetched, fetch_failed: what to do when there is nothing left to fetch, and when a fetch could not begin.

    ``transition`` counts them, since the agent's start.
    """

    def __init__(
        self, effects: Effects, keeper: Keeper, ports: Ports, teller: Teller, put: Callable[[Item], None],
        fetched: Callable[[], None], fetch_failed: Callable[[EdgefleetError], None],
    ) -> None:  # fmt: skip
        self._effects, self._keeper, self._ports, self._teller, self._put = effects, keeper, ports, teller, put
        self._fetched, self._fetch_failed = fetched, fetch_failed
        self.transition = 0
        self._stop_job = threading.Event()
        self._again: tuple[Effect, ...] = ()
        self._again_at = 0.0
        self._unserved = False
        self._tries = 0
        self._deadline: float | None = None  # of the assignment, while it is fetched and built
        self._soaking_since: float | None = None

    def next(self, state: State, effects: Sequence[Effect]) -> None:
        """The board is in ``state`` now: what it was at is over, and these are to be carried out."""
        self.transition += 1
        self.stop()
        self._stop_job = threading.Event()
        self._tries, self._again = 0, ()
        self._soaking_since = None
        self._teller.note("work")
        self._carry_out(effects)
        if self._unserved and state is State.IDLE and Effect.SERVE not in effects:
            self._again, self._again_at = (*self._again, Effect.SERVE), self._ports.clock.monotonic() + AGAIN_S

    def stop(self) -> None:
        """Whatever runs is to end."""
        self._stop_job.set()

    def try_again(self, now: float) -> None:
        """Carry out what could not be, when it is time to."""
        if self._again and now >= self._again_at:
            effects, self._again = self._again, ()
            self._carry_out(effects)

    def ran_out(self, now: float, state: State) -> bool:
        """Whether the assignment's time is over in a state that knows of it; told once."""
        if self._deadline is None or now <= self._deadline or (state, Event.TIMED_OUT) not in TABLE:
            return False
        self._deadline = None
        return True

    def soaked_s(self) -> float:
        """For how long what soaks has, since this agent's start."""
        return 0.0 if self._soaking_since is None else self._ports.clock.monotonic() - self._soaking_since

    def ended(self, item: JobDone | JobFailed) -> Happened | None:
        """What comes of it; None when nothing does, or when that is tried again."""
        if item.transition != self.transition:
            return None
        if isinstance(item, JobFailed):
            return self._failed(item)
        if item.event is None:
            self._tries, self._unserved = 0, False
            self._teller.note("serve")
            return None
        changes: dict[str, Any] = {} if item.acceptance is None else {"acceptance": item.acceptance}
        if item.about is not None:
            changes = {"assignment": item.about, "acceptance": None}
        return Happened(self.transition, item.event, item.detail, changes)

    def _failed(self, item: JobFailed) -> Happened | None:
        self._tries += 1
        serving = Effect.SERVE in item.effects
        self._unserved = self._unserved or serving  # whatever comes in between, it is tried again once the board rests
        self._teller.note("serve" if serving else "work", item.reason)
        state = self._keeper.now.life.state
        if self._tries >= TRIES and (state, Event.BROKE) in TABLE:
            return Happened(self.transition, Event.BROKE, item.reason, self._in_doubt(item.reason))
        self._again += tuple(effect for effect in item.effects if effect not in self._again)
        pause_s = AT_REST_AGAIN_S if state is State.IDLE and self._tries >= TRIES else AGAIN_S
        self._again_at = self._ports.clock.monotonic() + pause_s
        return None

    def _in_doubt(self, reason: str) -> dict[str, Any]:
        """What the journal tells of a board that could not do its part: nothing was learnt about what it was to take."""
        journal = self._keeper.now
        if journal.assignment is None or journal.life.state is State.REBUILDING:
            return {}
        return {"acceptance": doubted(journal.acceptance or AcceptanceReport(verdict=Verdict.INCONCLUSIVE), reason)}

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        """Do the quick effects, start the slow ones; what could not be done is left for another try."""
        journal, jobs, undone = self._keeper.now, list[tuple[Effect, Job]](), list[Effect]()
        for effect in effects:
            try:
                job = self._effects.carry_out(effect, journal)
            except EdgefleetError as exc:
                if effect is Effect.FETCH:
                    self._fetch_failed(exc)
                else:
                    undone.append(effect)
                    self._teller.note("work", str(exc))
                continue
            if job is not None:
                jobs.append((effect, job))
            elif effect is Effect.FETCH:
                self._deadline = None
                self._set_deadline(journal)
                self._fetched()
            if effect is Effect.BUILD:
                self._set_deadline(journal)
        if jobs:
            try:
                self._start(jobs)
            except EnvironmentProblem as exc:  # of the board alone: no job was tried
                undone += [effect for effect, _ in jobs]
                self._teller.note("room", str(exc))
            else:
                self._teller.note("room")
        if undone:
            self._again, self._again_at = tuple(undone), self._ports.clock.monotonic() + AGAIN_S
        elif not jobs:
            self._teller.note("work")

    def _set_deadline(self, journal: Journal) -> None:
        """The assignment's time runs, from now unless it does already: an agent that restarts does not know for how long it was at it."""
        timeout = journal.assignment.timeout_s if journal.assignment else 0
        if timeout > 0 and self._deadline is None:
            self._deadline = self._ports.clock.monotonic() + timeout

    def _start(self, jobs: list[tuple[Effect, Job]]) -> None:
        """Raises EnvironmentProblem: the board has no room for their thread."""
        transition, stop = self.transition, self._stop_job

        def run() -> None:
            for number, (effect, job) in enumerate(jobs):
                if effect is Effect.SOAK:
                    self._soaking_since = self._ports.clock.monotonic()
                try:
                    result = job(stop)
                except EdgefleetError as exc:
                    left = tuple(effect for effect, _ in jobs[number:])
                    self._put(JobFailed(transition, left, str(exc)))
                    return
                except Exception as exc:  # noqa: BLE001 - raised again by the loop
                    self._put(JobBroke(exc))
                    return
                if result.event is not None:
                    self._put(JobDone(transition, result.event, result.detail, result.acceptance, result.about))
                    return
            self._put(JobDone(transition, None, ""))

        self._ports.spawn(f"job-{self._keeper.now.life.state.value}", run)
