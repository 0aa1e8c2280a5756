"""Stage 2, compile: who does what. Receives claims, progress and results of workers, hands on tasks; every change is a transaction.

The controller's own workers (:mod:`.jobs`) and those on other machines (over :mod:`edgefleet_controller.api.work`) claim from here alike. A
job has one lease at a time, so of two workers that did it only one is heard; a worker that is not heard of in time loses its lease, and
the job is given to the next, as is one that failed by its worker's own fault (:mod:`.rerouting`). What a result says of itself is held against
what was asked (:mod:`.checking`).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

import msgspec
from edgefleet_shared import __version__
from edgefleet_shared.artifact import Layout
from edgefleet_shared.clock import Clock
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import (
    ArtifactError,
    ConflictError,
    EdgefleetError,
    EnvironmentProblem,
    QualityError,
    TrustError,
)
from edgefleet_shared.work import Answer, CompileTask, MeasureTask, Progress, Task
from sqlmodel import Session

from edgefleet_controller import model_version
from edgefleet_controller.compile import checking, rerouting
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.store import catalog, devices, jobs, workers
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import CompileJob

MAX_VERSION_BYTES = 16 * 1024 * 1024
MAX_LOG_CHARACTERS = 256 * 1024
WISH_LIMIT_S = 900.0  # how long one is waited for


class Claimant(msgspec.Struct, frozen=True):
    """Who asks for work: a worker's name, a builder board's class, and the version of edgefleet that it runs. The controller's own workers have
    neither name nor class."""

    name: str = ""
    device_class: str = ""
    edgefleet: str = __version__


OWN = Claimant()


class Leases:
    """Gives out jobs and takes in what came of them.

    Args:
        layout: versions and artifacts; a result's blobs are here before it is.
        lease_s: a worker on another machine that is not heard of for so long loses its job.
        own: whether the controller has workers of its own.
    """

    def __init__(self, database: Database, layout: Layout, clock: Clock, lease_s: float, *, own: bool) -> None:
        self._database, self._layout, self._clock, self._lease_s = database, layout, clock, lease_s
        self._own = own
        self._taking = threading.Lock()
        self.new_work: Callable[[], None] = lambda: None  # called when a job may be there to be taken

    def take_back_own(self) -> int:
        """After a restart: what the controller's own workers had is queued again; what others have goes on. Returns how many."""
        with self._database.write() as session:
            rows = jobs.own_running(session)
            for row in rows:
                jobs.requeue(session, row)
                row.attempts = 0  # it was not the job that ended the worker
        return len(rows)

    def claim(self, claimant: Claimant) -> Task | None:
        """The oldest job that the claimant can do, leased to it; None when there is none.

        Raises:
            ConflictError: it compiles by another edgefleet, whose result would not be this one's.
        """
        if not claimant.device_class and claimant.edgefleet != __version__:
            raise another_version(claimant.name, claimant.edgefleet)
        now = self._clock.now()
        # One taker at a time: SQLite has no row locks to skip.
        with self._taking, self._database.write() as session:
            self._expire(session, now)
            row = self._next(session, claimant, now)
            if row is None:
                return None
            row.worker, row.lease = claimant.name, secrets.token_hex(16)
            row.lease_until = now + self._lease_s if claimant.name else None
            session.add(row)
            try:
                return self._task(session, row)
            except EdgefleetError as exc:
                # What it needs is not here any more. Left where it is, it would keep all others from their work.
                row.error = msgspec.json.encode(exc.as_dict()).decode()
                self._end(session, row, "failed")
                return None

    def renew(self, lease: str, claimant: Claimant, step: Progress) -> bool:
        """Note progress; whether to go on.

        Raises:
            ConflictError: the lease has ended. TrustError: it is another worker's.
        """
        share = min(1.0, max(0.0, step.done / step.total)) if step.total > 0 else 0.0
        with self._database.write() as session:
            row = self._held(session, lease, claimant)
            if row.state != "running":
                return False
            row.step, row.progress = step.doing[:200], share
            if claimant.name:
                row.lease_until = self._clock.now() + self._lease_s
            session.add(row)
        return True

    def log(self, lease: str, claimant: Claimant, text: str) -> None:
        """Keep what a job's toolchains printed; of too much, the end.

        Raises:
            ConflictError: the lease has ended. TrustError: it is another worker's.
        """
        with self._database.write() as session:
            row = self._held(session, lease, claimant)
            row.log = text[-MAX_LOG_CHARACTERS:]
            session.add(row)

    def blobs(self, lease: str, claimant: Claimant) -> tuple[str, ...]:
        """What the task of a lease needs."""
        with self._database.read() as session:
            return self._task(session, self._running(session, lease, claimant)).blobs

    def holds(self, lease: str, claimant: Claimant) -> None:
        """Raises ConflictError or TrustError unless the claimant has that lease and its job is wanted."""
        with self._database.read() as session:
            self._running(session, lease, claimant)

    def finish(self, lease: str, claimant: Claimant, result: CompileResult) -> None:
        """Take a compile's result in.

        Raises:
            ArtifactError, TrustError, NotFoundError: it is not what was asked for; the job is given to the next.
            ConflictError: the lease has ended, or another artifact was signed already.
        """
        with self._database.read() as session:
            row = self._running(session, lease, claimant, "compile")
            version = model_version.decode(catalog.get_version(session, row.model, row.version).spec.encode())
            manifest = devices.get_class(session, row.device_class).spec
        try:
            artifact = checking.checked(
                result,
                version,
                manifest,
                self._layout,
                self._clock.now(),
                despite_quality=row.ship_despite_quality,
                by=claimant.name,
            )
        except EdgefleetError as exc:
            self._put_back(lease, claimant, exc)
            raise
        try:
            with self._database.write() as session:
                row = self._running(session, lease, claimant, "compile")
                known = catalog.list_artifacts(session, artifact.model, artifact.version)
                same = next((a for a in known if a.manifest == artifact.manifest), None)
                if same is not None:  # compiling it again, to the same digest, does not unsign it
                    artifact.state = same.state
                catalog.put_artifact(session, artifact)
                self._end(session, row, "done")
                row.progress, row.step, row.manifest = 1.0, "done", artifact.manifest
        except ConflictError as exc:
            self.fail(lease, claimant, exc)
            raise

    def measured(self, lease: str, claimant: Claimant, report: AcceptanceReport) -> None:
        """Take in what a builder board measured. What one could not tell the next is asked, where there is one.

        Raises:
            ConflictError: the lease has ended. TrustError: it is no measuring job, or another board's.
        """
        with self._database.write() as session:
            row = self._running(session, lease, claimant, "measure")
            if report.verdict is Verdict.ERROR and rerouting.others(session, row, self._clock.now(), own=False) - {
                row.worker
            }:
                self._lost(session, row, EnvironmentProblem(report.reason))
                return
            row.report = msgspec.json.encode(report).decode()
            self._end(session, row, "done")

    def fail(self, lease: str, claimant: Claimant, error: EdgefleetError) -> None:
        """Note that a job failed, in the worker's own words. By that machine's fault: the next gets it, where there is one.

        Raises:
            ConflictError: the lease has ended. TrustError: it is another worker's.
        """
        with self._database.write() as session:
            row = self._held(session, lease, claimant)
            if row.state != "running":
                return
            if rerouting.is_of_the_machine(error):
                self._lost(session, row, error)
            else:
                row.error = msgspec.json.encode(self._with_its_report(error).as_dict()).decode()
                self._end(session, row, "failed")
        self.new_work()

    def give_back(self, lease: str, claimant: Claimant) -> None:
        """A worker that is told to stop gives its job to the next at once; that counts for no attempt.

        Raises:
            ConflictError: the lease has ended. TrustError: it is another worker's.
        """
        with self._database.write() as session:
            row = self._running(session, lease, claimant)
            for wished in jobs.wishes(session, row.id):
                self._end(session, wished, "cancelled")
            row.attempts -= 1
            jobs.requeue(session, row)
        self.new_work()

    def wish(self, lease: str, claimant: Claimant, manifest: str) -> str:
        """Have a candidate of a leased compile measured by a builder board of its class.

        Returns:
            the measuring job; empty where no such board was heard of lately.

        Raises:
            ArtifactError: no artifact of the job's class. ConflictError, TrustError: as :meth:`renew`.
        """
        now = self._clock.now()
        config = checking.whole(manifest, self._layout)
        with self._database.write() as session:
            row = self._running(session, lease, claimant, "compile")
            if config.device_class != row.device_class:
                raise TrustError("wish", f"an artifact for {config.device_class}, asked for {row.device_class}")
            if not workers.builders(session, row.device_class, now - rerouting.BUILDER_SEEN_S):
                return ""
            made = CompileJob(
                id=secrets.token_hex(6), kind="measure", parent=row.id, model=row.model, version=row.version,
                device_class=row.device_class, state="queued", manifest=manifest, created_at=now,
            )  # fmt: skip
            jobs.put_job(session, made)
            return made.id

    def answer(self, lease: str, claimant: Claimant, job: str) -> Answer:
        """What became of a wish. One that nobody took in time, or that failed for the board's own reasons, stays unmeasured."""
        with self._database.write() as session:
            row = self._running(session, lease, claimant, "compile")
            wished = jobs.get_job(session, job)
            if wished.parent != row.id:
                raise TrustError("wish", f"{job} was not wished by this job")
            if wished.state in jobs.UNFINISHED and self._clock.now() < wished.created_at + WISH_LIMIT_S:
                self._expire(session, self._clock.now())
                return Answer(state="waiting", by=wished.worker)
            if wished.state != "done":
                if wished.state in jobs.UNFINISHED:
                    self._end(session, wished, "cancelled")
                return Answer(state="unmeasured", by=wished.worker)
            report = msgspec.json.decode(wished.report, type=AcceptanceReport)
            return Answer(state="measured", report=report, by=wished.worker)

    def cancel(self, job: str) -> str:
        """End a job; returns the lease that it had.

        Raises:
            NotFoundError: no such job. ConflictError: it has ended.
        """
        with self._database.write() as session:
            row = jobs.get_job(session, job)
            if row.state not in jobs.UNFINISHED:
                raise ConflictError(f"compile job {job} has ended: {row.state}")
            self._end(session, row, "cancelled")
            return row.lease

    def waits_for(self, session: Session, row: CompileJob) -> str:
        """What a queued job waits for that nobody who is there could do; empty for any other."""
        if row.state != "queued" or row.step or rerouting.others(session, row, self._clock.now(), own=self._own):
            return ""
        return "waiting: no worker is there that could do it; fleet worker token makes one a way in"

    # -- one step each -------------------------------------------------------------------------------------------------

    def _next(self, session: Session, claimant: Claimant, now: float) -> CompileJob | None:
        """The oldest job for a claimant, marked running. One that it failed at is for the others, while there are any: then it is taken again if
        its worker had only gone silent, and has failed otherwise."""
        wanted = "measure" if claimant.device_class else "compile", claimant.device_class, claimant.name
        found = jobs.take_job(session, *wanted, now)
        if found is not None:
            return found
        for row, failure in jobs.failed_at(session, *wanted):
            if rerouting.others(session, row, now, own=self._own):
                continue
            if failure.silent:
                jobs.take(session, row, now)
                return row
            self._fail_for_all(session, row)
        return None

    def _task(self, session: Session, row: CompileJob) -> Task:
        if row.kind == "measure":
            found = self._layout.manifest(row.manifest)
            blobs = (row.manifest, *(blob.digest for blob in found.blobs()))
            return MeasureTask(lease=row.lease, lease_s=self._lease_s, job=row.id, manifest=row.manifest, blobs=blobs)
        digest = catalog.get_version(session, row.model, row.version).source_digest
        version = model_version.decode(self._layout.read(digest, MAX_VERSION_BYTES))
        return CompileTask(
            lease=row.lease, lease_s=self._lease_s, job=row.id, version=digest, device_class=devices.get_class(session, row.device_class).spec,
            ship_despite_quality=row.ship_despite_quality,
            builder=bool(workers.builders(session, row.device_class, self._clock.now() - rerouting.BUILDER_SEEN_S)),
            blobs=(digest, *model_version.blobs(version)),
        )  # fmt: skip

    def _with_its_report(self, error: EdgefleetError) -> EdgefleetError:
        """The error, with the report that it names only where that is here: nobody could be shown another."""
        if not isinstance(error, QualityError):
            return error
        try:
            here = all(map(self._layout.has, error.reports))
        except ArtifactError:  # no digest at all: a worker says what it likes
            here = False
        return error if here else QualityError(error.message, hint=error.hint)

    def _held(self, session: Session, lease: str, claimant: Claimant) -> CompileJob:
        row = jobs.leased(session, lease)
        if row is None:
            raise ConflictError("that lease has ended", hint="its job was given to another worker")
        if row.worker != claimant.name:
            raise TrustError("lease", "that lease is another worker's")
        return row

    def _running(self, session: Session, lease: str, claimant: Claimant, kind: str = "") -> CompileJob:
        row = self._held(session, lease, claimant)
        if row.state != "running":
            raise ConflictError(f"job {row.id} is not running: {row.state}")
        if kind and row.kind != kind:
            raise TrustError("lease", f"job {row.id} is to {row.kind}, not to {kind}")
        return row

    def _end(self, session: Session, row: CompileJob, state: str) -> None:
        row.state, row.ended_at, row.lease_until = state, self._clock.now(), None
        session.add(row)
        for wished in jobs.wishes(session, row.id):
            self._end(session, wished, "cancelled")

    def _expire(self, session: Session, now: float) -> None:
        for row in jobs.expired(session, now):
            self._lost(session, row, EnvironmentProblem(f"it was not heard of for {self._lease_s:.0f} s"), silent=True)

    def _put_back(self, lease: str, claimant: Claimant, error: EdgefleetError) -> None:
        with self._database.write() as session:
            self._lost(session, self._running(session, lease, claimant), error)
        self.new_work()

    def _lost(self, session: Session, row: CompileJob, error: EdgefleetError, *, silent: bool = False) -> None:
        """A job whose worker brought nothing of use: to the next, or failed when there is none or that went on for too long. A worker that only
        went silent may be started again, and counts as the next."""
        for wished in jobs.wishes(session, row.id):
            self._end(session, wished, "cancelled")
        now = self._clock.now()
        rerouting.note(session, row, error, now, silent=silent)
        if row.attempts < rerouting.MAX_ATTEMPTS and (silent or rerouting.others(session, row, now, own=self._own)):
            jobs.requeue(session, row, f"waiting for another worker; {rerouting.by(row.worker)}: {error.message}"[:200])
        else:
            self._fail_for_all(session, row)

    def _fail_for_all(self, session: Session, row: CompileJob) -> None:
        row.error = msgspec.json.encode(rerouting.told(session, row).as_dict()).decode()
        self._end(session, row, "failed")


def another_version(worker: str, edgefleet: str) -> ConflictError:
    """Why a worker of another version gets no work."""
    return ConflictError(
        f"worker {worker} runs edgefleet {edgefleet or 'of an unknown version'}, the controller {__version__}: what it made would be refused",
        hint=f"install edgefleet-controller {__version__} there, and start it again",
    )
