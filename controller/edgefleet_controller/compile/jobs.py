"""Stage 2, compile: the queue. Receives jobs from the database, hands on artifacts; several at once, each a process.

A job that was running when the controller died is queued again at the next start. Cancelling ends its process.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import Layout
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import ConflictError, EdgefleetError, EnvironmentProblem, ToolchainError, from_dict

from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.worker import Failed, Finished, JobRequest, Line, Step
from edgefleet_controller.store import catalog, devices
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import Artifact, CompileJob

log = logging.getLogger(__name__)

CANCEL_PATIENCE_S = 15.0
END_PATIENCE_S = 5.0
IDLE_S = 1.0


class CompileQueue:
    """Runs queued jobs.

    Args:
        layout: versions and artifacts.
        cache: toolchains and compiled models.
        workers: how many jobs run at once.
    """

    def __init__(self, database: Database, layout: Layout, cache: Path, clock: Clock, workers: int) -> None:
        self._database, self._layout, self._cache, self._clock = database, layout, cache, clock
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        self._threads = [threading.Thread(target=self._work, name=f"compile-{n}", daemon=True) for n in range(workers)]

    def start(self) -> None:
        with self._database.write() as session:
            again = catalog.requeue_running(session)
        if again:
            log.info("compile jobs queued again", extra={"count": again})
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        with self._lock:
            running = list(self._running.values())
        for child in running:
            child.send_signal(signal.SIGTERM)
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
            catalog.put_job(session, job)
        self._wake.set()
        return name

    def cancel(self, job: str) -> None:
        """End a job.

        Raises:
            NotFoundError: no such job. ConflictError: it has ended.
        """
        with self._database.write() as session:
            row = catalog.get_job(session, job)
            if row.state not in catalog.UNFINISHED:
                raise ConflictError(f"compile job {job} has ended: {row.state}")
            row.state, row.ended_at = "cancelled", self._clock.now()
            session.add(row)
        with self._lock:
            child = self._running.get(job)
        if child is not None:
            child.send_signal(signal.SIGTERM)

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                taken = self._take()
                if taken is None:
                    self._wake.wait(IDLE_S)
                    self._wake.clear()
                else:
                    self._carry_out(taken)
            except EnvironmentProblem as exc:
                # The database can't take it now. A job that ended meanwhile stays "running": the next start runs it again.
                log.error("compile queue held up", extra={"reason": str(exc)})
                self._stopping.wait(IDLE_S)

    def _take(self) -> CompileJob | None:
        # One taker at a time: SQLite has no row locks to skip.
        with self._taking, self._database.write() as session:
            row = catalog.take_job(session, self._clock.now())
            return CompileJob(**row.model_dump()) if row is not None else None

    def _carry_out(self, job: CompileJob) -> None:
        try:
            artifact = self._run(job)
        except EdgefleetError as exc:
            self._end(job.id, error=exc)
        else:
            self._end(job.id, artifact=artifact)

    def _run(self, job: CompileJob) -> Artifact:
        with self._database.read() as session:
            version = catalog.get_version(session, job.model, job.version)
            request = JobRequest(
                layout=str(self._layout.root.resolve()),
                cache=str(self._cache),
                version=version.source_digest,
                device_class=devices.get_class(session, job.device_class).spec,
                ship_despite_quality=job.ship_despite_quality,
            )
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "edgefleet_controller.compile.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as exc:
            raise ToolchainError(f"no compile worker could be started: {exc.strerror}") from exc
        with self._lock:
            self._running[job.id] = child
        try:
            if self._was_cancelled(job.id):
                raise ToolchainError("cancelled before it began")
            return self._artifact(self._converse(job.id, child, request))
        except (msgspec.DecodeError, BrokenPipeError) as exc:
            # A worker that was killed leaves half a line, or a pipe that nobody reads.
            raise ToolchainError(f"the compile worker died: {exc}", hint="was there enough memory?") from exc
        finally:
            with self._lock:
                del self._running[job.id]
            _finish(child)

    def _converse(self, job: str, child: subprocess.Popen[bytes], request: JobRequest) -> CompileResult:
        assert child.stdin is not None
        assert child.stdout is not None
        # The pipe stays open: its end tells the worker that this controller is gone.
        child.stdin.write(msgspec.json.encode(request) + b"\n")
        child.stdin.flush()
        for text in child.stdout:
            match msgspec.json.decode(text, type=Line):
                case Step(doing, done, total):
                    self._progress(job, doing, done / total if total else 0.0)
                case Finished(result):
                    return result
                case Failed(error):
                    raise from_dict(error)
        raise ToolchainError(f"the compile worker ended with status {child.wait()} and no result", hint="see the log")

    def _was_cancelled(self, job: str) -> bool:
        with self._database.read() as session:
            return catalog.get_job(session, job).state == "cancelled"

    def _artifact(self, result: CompileResult) -> Artifact:
        manifest = self._layout.manifest(result.artifact.digest)
        config = self._layout.config(manifest)
        figures = msgspec.to_builtins(result.figures)
        timings = {key: figures.pop(key) for key in list(figures) if key.endswith("_ms")}
        timings |= {"seconds": result.seconds, "cached": result.cached}
        quality = figures | {
            "verdict": result.quality, "misses": list(result.misses), "key": result.key, "recipe": result.recipe,
            "precision": result.precision, "why": result.why, "candidates": result.candidates, "report": result.report,
            "page": result.page,
        }  # fmt: skip
        return Artifact(
            manifest=result.artifact.digest,
            model=result.model,
            version=result.version,
            device_class=result.device_class,
            manifest_bytes=result.artifact.size,
            size_bytes=result.artifact.size + sum(blob.size for blob in manifest.blobs()),
            swap=config.swap,
            state="compiled",
            requirement=msgspec.json.encode(config.requires).decode(),
            quality=msgspec.json.encode(quality).decode(),
            timings=msgspec.json.encode(timings).decode(),
            created_at=self._clock.now(),
        )

    def _progress(self, job: str, doing: str, share: float) -> None:
        with self._database.write() as session:
            row = catalog.get_job(session, job)
            if row.state == "running" and (row.step != doing or share - row.progress >= 0.05 or share < row.progress):
                row.step, row.progress = doing, share
                session.add(row)

    def _end(self, job: str, *, artifact: Artifact | None = None, error: EdgefleetError | None = None) -> None:
        try:
            with self._database.write() as session:
                row = catalog.get_job(session, job)
                if row.state == "cancelled":
                    return
                if self._stopping.is_set() and error is not None:
                    return  # it stays "running" and is queued again at the next start
                row.ended_at = self._clock.now()
                if artifact is not None:
                    same = _signed(catalog.list_artifacts(session, artifact.model, artifact.version), artifact)
                    if same is not None:
                        artifact.state = same.state
                    catalog.put_artifact(session, artifact)
                    row.state, row.progress, row.step, row.manifest = "done", 1.0, "done", artifact.manifest
                elif error is not None:
                    row.state, row.error = "failed", msgspec.json.encode(error.as_dict()).decode()
                session.add(row)
        except ConflictError as exc:
            if artifact is None:
                raise
            self._end(job, error=exc)


def _finish(child: subprocess.Popen[bytes]) -> None:
    """Let a worker that has said its last word end; one that does not is killed."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(END_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _signed(known: list[Artifact], artifact: Artifact) -> Artifact | None:
    """The same artifact, if it is known: compiling it again, to the same digest, does not unsign it."""
    return next((a for a in known if a.manifest == artifact.manifest), None)
