"""Stage 7, accept: which plans the board needs. Receives an artifact, or nothing but the slots, hands on that its plan is of the engine as it is.

A candidate's plan is made before it is accepted; those of the active and the previous artifact are made anew when their engine was upgraded or
a plan was lost. Not handled here: how a plan is made (:mod:`edgefleet_agent.build`), when (lifecycle.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from edgefleet_shared import atomic
from edgefleet_shared.errors import ArtifactError, NotFoundError
from edgefleet_shared.lifecycle import Event, State

from edgefleet_agent import build, plans, slots
from edgefleet_agent.ports import Ports
from edgefleet_agent.slots import Slot, SlotStatus


class Upkeep:
    """The plans of one board.

    Args:
        build_keys: of the board's fingerprint: engines that need plans, and what a plan depends on.
        told: hears in which state of the life cycle a build is how far: what it does, so many of so many steps.
    """

    def __init__(
        self, state: Path, ports: Ports, build_keys: dict[str, str], told: Callable[[State, str, int, int], None]
    ) -> None:
        self._state, self._ports, self._build_keys, self._told = state, ports, build_keys, told
        self._tried: set[str] = set()  # to build anew, in this start: what failed is not tried for ever
        self.at_work = threading.Lock()  # held while one is built; one that was told to stop may still be at the disk

    def build(self, manifest: str, stop: threading.Event, during: State = State.BUILDING) -> tuple[Event, str]:
        """See to it that the artifact has its plan, if its engine needs any.

        Returns:
            BUILT, NOT_BUILT or TIMED_OUT, and how or why.

        Raises:
            EdgefleetError: the board could not do its part; run it again.
        """
        if self._engine(manifest) not in self._build_keys:
            return Event.BUILT, "its engine takes it as it is"

        def tell(doing: str, done: int, total: int) -> None:
            self._told(during, doing, done, total)

        with self.at_work:
            return build.ensure(self._state, self._ports.files, self._ports.examiner, manifest, tell, stop)

    def outdated(self) -> str:
        """Which of the active and the previous artifact has no plan of its engine as that is now; empty when there is no such thing, or
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
            if key is not None and not right and slot.manifest not in self._tried:
                before = f"was made by {plan.key}" if plan is not None else "is not there"
                return f"the plan of {slot.model} {slot.version} {before}; the engine is now {key}"
        return ""

    def rebuild(self, stop: threading.Event) -> tuple[Event, str]:
        """Make the plans of the active and the previous artifact anew where they are not right: REBUILT, or NOT_BUILT and why.

        Raises:
            EdgefleetError: the board could not do its part; run it again.
        """
        undone = []
        for slot in self._kept():
            self._tried.add(slot.manifest)
            event, why = self.build(slot.manifest, stop, State.REBUILDING)
            if event is not Event.BUILT:
                undone.append(f"{slot.model} {slot.version}: {why}")
        return (Event.NOT_BUILT, "; ".join(undone)) if undone else (Event.REBUILT, "")

    def mend(self, stop: threading.Event) -> bool:
        """The runtime can't serve what it should: if that needs a plan, build it. Returns whether it has one now.

        Raises:
            EdgefleetError: the board could not do its part.
        """
        wanted = slots.read(self._state, files=self._ports.files).serving
        if wanted is None or self._engine(wanted.manifest) not in self._build_keys:
            return False
        return self.build(wanted.manifest, stop)[0] is Event.BUILT

    def _kept(self) -> list[Slot]:
        """What serves or may be returned to, the one that serves first."""
        now = slots.read(self._state, files=self._ports.files)
        kept = [slot for slot in (now.active, now.previous) if slot is not None and slot.status is not SlotStatus.BAD]
        return list(dict.fromkeys(kept))

    def _engine(self, manifest: str) -> str:
        """The engine of an artifact; empty when it is not whole, or can't be read any more, which others find out and tell."""
        layout = slots.artifacts(self._state, files=self._ports.files)
        try:
            return atomic.unless_lost(lambda: layout.config(layout.manifest(manifest)).engine) or ""
        except (NotFoundError, ArtifactError):
            return ""
