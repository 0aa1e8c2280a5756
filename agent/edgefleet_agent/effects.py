"""Stages 5-8: receives an effect of the life cycle, does it at once when it is quick, else hands on the job that will do it.

Every effect may be carried out again from its start, after a crash or because the disk refused: each first looks at what is
already so. Which stage does what is readable off :meth:`Effects.carry_out`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.assignment import Assignment
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.exhaustive import assert_never
from edgefleet_shared.lifecycle import Effect, Event, State
from edgefleet_shared.messages import Ended

from edgefleet_agent import shadow, slots, swap, verify
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.journal import Journal
from edgefleet_agent.ports import Ports
from edgefleet_agent.slots import Slot, SlotStatus
from edgefleet_agent.upkeep import Upkeep

log = logging.getLogger(__name__)

INCONCLUSIVE_ATTEMPTS = 3
INCONCLUSIVE_PAUSE_S = 5.0


class Result(msgspec.Struct, frozen=True):
    """What came of a job. ``event`` None: nothing to tell, go on with the next one. ``about`` is the assignment that it is about, when
    that is not the one at work."""

    event: Event | None
    detail: str = ""
    acceptance: AcceptanceReport | None = None
    about: Assignment | None = None


Job = Callable[[threading.Event], Result]


class Effects:
    """Carries effects out.

    Args:
        threads: how many one inference may use.
        upkeep: of the plans.
        tell: has a result signed and told.
    """

    def __init__(
        self, state: Path, ports: Ports, fetcher: Fetcher, threads: int, upkeep: Upkeep, tell: Callable[[Ended], None]
    ) -> None:
        self._state, self._ports, self._fetcher = state, ports, fetcher
        self._threads, self._upkeep, self._tell = threads, upkeep, tell

    def carry_out(self, effect: Effect, journal: Journal) -> Job | None:
        """Do a quick effect at once, or return the job that does a slow one.

        Raises:
            EdgefleetError: a quick one could not be done; so may the job.
        """
        state, ports = self._state, self._ports
        match effect:
            case Effect.PERSIST:
                raise AssertionError("persisting comes before every effect, see the runner")
            case Effect.FETCH:
                self._fetch(at_work(journal))
            case Effect.STOP_FETCH:
                self._fetcher.stop()
            case Effect.DISCARD:
                with self._upkeep.at_work:  # a build that was told to stop may still be at the disk
                    swap.discard(state, ports)
            case Effect.REPORT:
                if journal.ended is not None:
                    self._tell(journal.ended)
            case Effect.VERIFY:
                return lambda stop: self._verify(at_work(journal))
            case Effect.BUILD:
                return lambda stop: Result(*self._upkeep.build(at_work(journal).manifest, stop))
            case Effect.REBUILD:
                return lambda stop: Result(*self._upkeep.rebuild(stop))
            case Effect.ACCEPT:
                return lambda stop: self._accept(at_work(journal), stop)
            case Effect.SHADOW:
                return lambda stop: self._shadow(journal, stop)
            case Effect.SWAP:
                return lambda stop: Result(*swap.swap(state, ports, at_work(journal), _report(journal), stop))
            case Effect.SOAK:
                return lambda stop: Result(*swap.soak(ports, at_work(journal), stop, journal.soaked_s))
            case Effect.COMMIT:
                return lambda stop: Result(*swap.commit(state, ports))
            case Effect.RETURN:
                return lambda stop: self._go_back(at_work(journal).manifest, stop)
            case Effect.SERVE:
                # On the way to a soak that, which follows, says what is wrong. At rest nothing follows.
                return self._serve if journal.life.state is State.IDLE else self._try_to_serve
            case _:
                assert_never(effect)
        return None

    def _fetch(self, assignment: Assignment) -> None:
        now = slots.read(self._state, files=self._ports.files)
        candidate = Slot(assignment.manifest, assignment.model, assignment.version, SlotStatus.BAD)
        if now.candidate != candidate:
            slots.write(self._state, msgspec.structs.replace(now, candidate=candidate), files=self._ports.files)
        self._fetcher.begin(assignment.manifest, assignment.size)

    def _verify(self, assignment: Assignment) -> Result:
        try:
            checked = self._ports.examiner.check(self._state, assignment)
        except verify.Refusal as exc:
            return Result(Event.NOT_VERIFIED, str(exc.error))
        return Result(Event.VERIFIED, f"{checked.blobs} blobs, {checked.checked_bytes} bytes")

    def _go_back(self, failed: str, stop: threading.Event) -> Result:
        event, detail = swap.go_back(self._state, self._ports, failed, stop)
        if event is Event.RETURN_FAILED and self._upkeep.mend(stop):
            event, detail = swap.go_back(self._state, self._ports, failed, stop)
        return Result(event, detail)

    def _accept(self, assignment: Assignment, stop: threading.Event) -> Result:
        attempt = 0
        while True:
            attempt += 1
            report = self._ports.examiner.accept(self._state, assignment.manifest, self._threads)
            if report.verdict is Verdict.PASSED:
                return Result(Event.ACCEPTED, "", report)
            # Inconclusive is the board's state now, and an error is ours: both deserve another try, a failed model does not.
            if report.verdict is Verdict.FAILED or attempt >= INCONCLUSIVE_ATTEMPTS or stop.wait(INCONCLUSIVE_PAUSE_S):
                return Result(Event.NOT_ACCEPTED, f"acceptance {report.verdict.value}: {report.reason}", report)

    def _shadow(self, journal: Journal, stop: threading.Event) -> Result:
        return Result(*shadow.shadow(self._state, self._ports, at_work(journal), _report(journal), stop))

    def _serve(self, stop: threading.Event) -> Result:
        try:
            try:
                swap.serve(self._state, self._ports, stop)
            except EdgefleetError:
                if not self._upkeep.mend(stop):
                    raise
                swap.serve(self._state, self._ports, stop)
        except EdgefleetError as exc:
            raise EnvironmentProblem(f"the runtime does not serve: {exc.message}", hint=exc.hint) from exc
        return Result(None)

    def _try_to_serve(self, stop: threading.Event) -> Result:
        try:
            return self._serve(stop)
        except EnvironmentProblem as exc:
            log.warning("runtime does not serve", extra={"reason": str(exc)})
        return Result(None)


def at_work(journal: Journal) -> Assignment:
    """The assignment that the effects are about."""
    assert journal.assignment is not None
    return journal.assignment


def _report(journal: Journal) -> AcceptanceReport:
    """Of its acceptance, which it has passed."""
    return journal.acceptance or AcceptanceReport(verdict=Verdict.PASSED)
