"""Stage 2, compile: the queue. Receives wishes to compile, hands on artifacts; the controller's own workers do several at once, each a process.

Who does which job, and what came of it, is :mod:`.leases`; workers on other machines claim from there too (ADR 0015). A job that one of the
controller's own workers had when the controller died is queued again at the next start. Cancelling ends its process.
"""

from __future__ import annotations

import logging
import secrets
import threading
from pathlib import Path

from edgefleet_shared.artifact import Layout
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import ConflictError, EdgefleetError, EnvironmentProblem
from edgefleet_shared.work import POLL_S, Answer, CompileTask, Progress

from edgefleet_controller.compile.attempt import Attempt
from edgefleet_controller.compile.leases import OWN, Leases
from edgefleet_controller.compile.watching import Cancelled
from edgefleet_controller.compile.worker import JobRequest
from edgefleet_controller.store import catalog, devices, jobs
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import CompileJob

log = logging.getLogger(__name__)

CANCEL_PATIENCE_S = 15.0
IDLE_S = 1.0


class CompileQueue:
    """Takes jobs in, and runs them by workers of its own.

    Args:
        layout: versions and artifacts.
        cache: toolchains and compiled models, of which it keeps ``cache_limit_bytes`` at most (:mod:`.cache_limit`).
        workers: how many jobs run at once here; 0 leaves all to workers on other machines.
        lease_s: how long one of those may be silent.
    """

    def __init__(
        self, database: Database, layout: Layout, cache: Path, cache_limit_bytes: int, clock: Clock, workers: int,
        lease_s: float,
    ) -> None:  # fmt: skip
        self._database, self._layout, self._clock = database, layout, clock
        self._cache, self._cache_limit_bytes = cache, cache_limit_bytes
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._running: dict[str, Attempt] = {}
        self._lock = threading.Lock()
        self.leases = Leases(database, layout, clock, lease_s, own=workers > 0)
        self.leases.new_work = self._wake.set
        self._threads = [threading.Thread(target=self._work, name=f"compile-{n}", daemon=True) for n in range(workers)]

    def start(self) -> None:
        again = self.leases.take_back_own()
        if again:
            log.info("compile jobs queued again", extra={"count": again})
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        with self._lock:
            running = list(self._running.values())
        for attempt in running:
            attempt.cancel()
        for thread in self._threads:
            thread.join(CANCEL_PATIENCE_S)

    def submit(self, model: str, version: str, device_class: str, *, ship_despite_quality: bool) -> str:
        """Queue a job; its id comes back.

        Raises:
            NotFoundError: no such version or class.
        """
        job = CompileJob(
            id=secrets.token_hex(6), model=model, version=version, device_class=device_class, state="queued",
            ship_despite_quality=ship_despite_quality, created_at=self._clock.now(),
        )  # fmt: skip
        name = job.id
        with self._database.write() as session:
            catalog.get_version(session, model, version)
            devices.get_class(session, device_class)
            jobs.put_job(session, job)
        self._wake.set()
        return name

    def cancel(self, job: str) -> None:
        """End a job.

        Raises:
            NotFoundError: no such job. ConflictError: it has ended.
        """
        lease = self.leases.cancel(job)
        with self._lock:
            attempt = self._running.get(lease)
        if attempt is not None:
            attempt.cancel()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                task = self.leases.claim(OWN)
                if task is None:
                    self._wake.wait(IDLE_S)
                    self._wake.clear()
                else:
                    assert isinstance(task, CompileTask)
                    self._carry_out(task)
            except EnvironmentProblem as exc:
                # The database can't take it now. A job that ended meanwhile stays "running": the next start runs it again.
                log.error("compile queue held up", extra={"reason": str(exc)})
                self._stopping.wait(IDLE_S)

    def _carry_out(self, task: CompileTask) -> None:
        try:
            self._attempt(task)
        except EdgefleetError as exc:
            if self._stopping.is_set():
                return  # it stays "running" and is queued again at the next start
            log.warning("compile job failed", extra={"job": task.job, "code": exc.code, "reason": str(exc)})
            self._fail(task, exc)

    def _attempt(self, task: CompileTask) -> None:
        request = JobRequest(
            layout=str(self._layout.root.resolve()), cache=str(self._cache), cache_limit_bytes=self._cache_limit_bytes,
            version=task.version, device_class=task.device_class, ship_despite_quality=task.ship_despite_quality, builder=task.builder,
        )  # fmt: skip
        with Attempt(request) as attempt:
            with self._lock:
                self._running[task.lease] = attempt
            try:
                # Cancelled before it was known here: nobody else would end it.
                self.leases.holds(task.lease, OWN)
                result = attempt.run(_Listener(self.leases, task.lease, self._stopping))
            finally:
                with self._lock:
                    del self._running[task.lease]
        self.leases.finish(task.lease, OWN, result)

    def _fail(self, task: CompileTask, error: EdgefleetError) -> None:
        try:
            self.leases.fail(task.lease, OWN, error)
        except ConflictError:
            log.info("compile job was another's by then", extra={"job": task.job})


class _Listener:
    """What the controller's own worker does with its process's words."""

    def __init__(self, leases: Leases, lease: str, stopping: threading.Event) -> None:
        self._leases, self._lease, self._stopping = leases, lease, stopping
        self._told = Progress("", 0, 1)

    def progress(self, step: Progress) -> None:
        if step.doing == self._told.doing and 0 <= step.done - self._told.done < 0.05 * step.total:
            return
        self._told = step
        if not self._leases.renew(self._lease, OWN, step):
            raise Cancelled("cancelled")

    def log(self, text: str) -> None:
        self._leases.log(self._lease, OWN, text)

    def measure(self, manifest: str) -> Answer:
        job = self._leases.wish(self._lease, OWN, manifest)
        if not job:
            return Answer(state="unmeasured")
        while True:
            answer = self._leases.answer(self._lease, OWN, job)
            if answer.state != "waiting":
                return answer
            if self._stopping.wait(POLL_S):
                raise Cancelled("the controller stops")
