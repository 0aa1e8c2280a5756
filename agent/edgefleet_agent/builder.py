"""Stage 2, compile: a builder board. Receives candidates of its class, hands on what accepting them here measured. Nothing is installed.

The acceptance is the one that every board of the class runs before a swap (:mod:`edgefleet_agent.accept`), so that the compiler decides by
what the boards will say. The board should have nothing else to do meanwhile. Its identity is a worker's (``fleet worker token --class``),
in a state folder of its own.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from edgefleet_shared import atomic
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import InputError
from edgefleet_shared.files import DISK
from edgefleet_shared.lifecycle import Event
from edgefleet_shared.work import MeasureTask, Progress, Task
from edgefleet_shared.work_client import WorkClient
from edgefleet_shared.work_loop import Held, run_until_signalled

from edgefleet_agent import board, build, slots
from edgefleet_agent import settings as board_settings
from edgefleet_agent.accept import accept
from edgefleet_agent.examiner import SandboxedExaminer
from edgefleet_agent.renewal import ChildRenewer

log = logging.getLogger(__name__)


def run(state: Path) -> None:
    """Measure until SIGTERM or SIGINT.

    Raises:
        EnvironmentProblem: not enrolled. ConflictError: another process owns the state folder.
        TrustError: the certificate can't be used, or the controller knows it no more.
    """
    settings, identity = board_settings.read(state), state / "identity"
    client = WorkClient(
        settings.api_host, settings.api_port,
        ca=identity / "ca.pem", certificate=identity / "agent.pem", key=identity / "agent.key",
    )  # fmt: skip
    log.info("builder board", extra={"device": settings.device, "class": settings.device_class})
    with atomic.lock(state, "fleet-agent"):
        builder = Builder(client, state, settings.threads, board.read_fingerprint().build_keys)
        renewer = ChildRenewer(state, settings)
        run_until_signalled(client, builder.carry_out, at_once=1, end=lambda: None, renew=renewer.renew)


class Builder:
    """Does measuring tasks.

    Args:
        build_keys: of the board's fingerprint: engines whose models become a plan before they can run here.

    Raises:
        EnvironmentProblem: the disk can't be read or written.
    """

    def __init__(self, client: WorkClient, state: Path, threads: int, build_keys: dict[str, str]) -> None:
        self._client, self._state, self._threads, self._build_keys = client, state, threads, build_keys
        self._layout: Layout = slots.artifacts(state)
        self._forget()  # what an earlier start was killed over

    def carry_out(self, task: Task, held: Held) -> None:
        """Fetch, build where that is needed, accept, report, forget.

        Raises:
            EdgefleetError: what it failed by.
        """
        if not isinstance(task, MeasureTask):
            raise InputError("this board measures; it compiles nothing")
        try:
            for digest in task.blobs:
                held.persistently(partial(self._client.fetch, held.lease, digest, self._layout))
            report = self._measured(task.manifest, held)
            held.persistently(lambda: self._client.finish(held.lease, report))
        finally:
            self._forget()

    def _measured(self, manifest: str, held: Held) -> AcceptanceReport:
        if self._layout.config(self._layout.manifest(manifest)).engine in self._build_keys:

            def tell(doing: str, done: int, total: int) -> None:
                held.step = Progress(doing, done, total)

            event, why = build.ensure(self._state, DISK, SandboxedExaminer(), manifest, tell, held.ended)
            if event is not Event.BUILT:
                return AcceptanceReport(verdict=Verdict.FAILED, reason=f"it has no plan: {why}")
        held.step = Progress("accepting", 0, 1)
        return accept(self._state, manifest, threads=self._threads)

    def _forget(self) -> None:
        """Nothing that a task brought is needed twice. Slots are of an agent whose folder this was; what they name stays."""
        slots.collect_garbage(self._state, slots.read(self._state))
