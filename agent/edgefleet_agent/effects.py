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
from edgefleet_shared.errors import ArtifactError, EdgefleetError, NotFoundError
from edgefleet_shared.exhaustive import assert_never
from edgefleet_shared.lifecycle import Effect, Event, State
from edgefleet_shared.messages import Body, OutcomeTold

from edgefleet_agent import build, plans, shadow, slots, swap, verify
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.journal import Journal
from edgefleet_agent.ports import Ports
from edgefleet_agent.slots import Slot, SlotStatus

log = logging.getLogger(__name__)

INCONCLUSIVE_ATTEMPTS = 3
INCONCLUSIVE_PAUSE_S = 5.0


class Result(msgspec.Struct, frozen=True):
    """What came of a job. ``event`` None: nothing to tell, go on with the next one."""

    event: Event | None
    detail: str = ""
    acceptance: AcceptanceReport | None = None


Job = Callable[[threading.Event], Result]


class Effects:
    """Carries effects out.

    Args:
        threads: how many one inference may use.
        build_keys: of the board's fingerprint: engines that need plans, and what a plan depends on.
        tell: puts an event into the spool.
        told: hears in which state a job is how far: what it does, so many of so many steps.
    """

    def __init__(
        self, state: Path, ports: Ports, fetcher: Fetcher, threads: int, build_keys: dict[str, str],
        tell: Callable[[Body], None], told: Callable[[State, str, int, int], None],
    ) -> None:  # fmt: skip
        self._state, self._ports, self._fetcher = state, ports, fetcher
        self._threads, self._build_keys = threads, build_keys
        self._tell, self._told = tell, told
        self._rebuilt: set[str] = set()  # tried in this start: what failed is not tried for ever

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
                self._fetch(_at_work(journal))
            case Effect.STOP_FETCH:
                self._fetcher.stop()
            case Effect.DISCARD:
                swap.discard(state, ports)
            case Effect.REPORT:
                if journal.ended is not None:
                    self._tell(OutcomeTold(ended=journal.ended))
            case Effect.VERIFY:
                return lambda stop: self._verify(_at_work(journal))
            case Effect.BUILD:
                return lambda stop: self._build(_at_work(journal).manifest, stop)
            case Effect.REBUILD:
                return self._rebuild
            case Effect.ACCEPT:
                return lambda stop: self._accept(_at_work(journal), stop)
            case Effect.SHADOW:
                return lambda stop: self._shadow(journal, stop)
            case Effect.SWAP:
                return lambda stop: Result(*swap.swap(state, ports, _at_work(journal), stop))
            case Effect.SOAK:
                return lambda stop: Result(*swap.soak(ports, _at_work(journal), stop))
            case Effect.COMMIT:
                return lambda stop: Result(*swap.commit(state, ports))
            case Effect.RETURN:
                return lambda stop: self._go_back(_at_work(journal).manifest, stop)
            case Effect.SERVE:
                return self._serve
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

    def _build(self, manifest: str, stop: threading.Event, during: State = State.BUILDING) -> Result:
        if self._engine(manifest) not in self._build_keys:
            return Result(Event.BUILT, "its engine takes it as it is")

        def tell(doing: str, done: int, total: int) -> None:
            self._told(during, doing, done, total)

        return Result(*build.ensure(self._state, self._ports.files, self._ports.examiner, manifest, tell, stop))

    def outdated(self) -> str:
        """What of the active and the previous artifact has no plan for its engine as that is now; empty when there is no such thing, or
        it was tried already.

        Raises:
            EnvironmentProblem: the disk can't be read.
        """
        if not self._build_keys:
            return ""
        layout = slots.artifacts(self._state, files=self._ports.files)
        made = plans.read(layout)
        for slot in self._kept():
            key = self._build_keys.get(self._engine(slot.manifest))
            plan = made.get(slot.manifest)
            right = plan is not None and plan.key == key and layout.has(plan.digest)
            if key is not None and not right and slot.manifest not in self._rebuilt:
                before = f", was made by {plan.key}" if plan is not None else " is not there"
                return f"the plan of {slot.model} {slot.version}{before}; the engine is now {key}"
        return ""

    def _kept(self) -> list[Slot]:
        """What serves or may be returned to, the one that serves first."""
        now = slots.read(self._state, files=self._ports.files)
        kept = [slot for slot in (now.active, now.previous) if slot is not None and slot.status is not SlotStatus.BAD]
        return list(dict.fromkeys(kept))

    def _engine(self, manifest: str) -> str:
        """The engine of an artifact; empty when it is not whole, which others find out and tell."""
        layout = slots.artifacts(self._state, files=self._ports.files)
        try:
            return layout.config(layout.manifest(manifest)).engine
        except (NotFoundError, ArtifactError):
            return ""

    def _rebuild(self, stop: threading.Event) -> Result:
        undone = []
        for slot in self._kept():
            self._rebuilt.add(slot.manifest)
            result = self._build(slot.manifest, stop, State.REBUILDING)
            if result.event is not Event.BUILT:
                undone.append(f"{slot.model} {slot.version}: {result.detail}")
        return Result(Event.NOT_BUILT, "; ".join(undone)) if undone else Result(Event.REBUILT, "")

    def _built_again(self, stop: threading.Event) -> bool:
        """The runtime can't serve what it should. Where a plan was lost or its engine changed, that is mended; returns whether it was."""
        wanted = slots.read(self._state, files=self._ports.files).serving
        if wanted is None or self._engine(wanted.manifest) not in self._build_keys:
            return False
        return self._build(wanted.manifest, stop).event is Event.BUILT

    def _go_back(self, failed: str, stop: threading.Event) -> Result:
        event, detail = swap.go_back(self._state, self._ports, failed, stop)
        if event is Event.RETURN_FAILED and self._built_again(stop):
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
        report = journal.acceptance or AcceptanceReport(verdict=Verdict.PASSED)
        return Result(*shadow.shadow(self._state, self._ports, _at_work(journal), report, stop))

    def _serve(self, stop: threading.Event) -> Result:
        try:
            try:
                swap.serve(self._state, self._ports, stop)
            except EdgefleetError:
                if not self._built_again(stop):
                    raise
                swap.serve(self._state, self._ports, stop)
        except EdgefleetError as exc:
            log.warning("runtime does not serve", extra={"reason": str(exc)})
        return Result(None)


def _at_work(journal: Journal) -> Assignment:
    assert journal.assignment is not None
    return journal.assignment
