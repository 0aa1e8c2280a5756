"""Compile and measuring jobs in the database: get, list, put, lease. Every function works in the caller's session."""

from __future__ import annotations

from edgefleet_shared.errors import NotFoundError
from sqlalchemy import Exists
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from edgefleet_controller.store.tables import CompileJob, JobFailure

UNFINISHED = ("queued", "running")


def put_job(session: Session, job: CompileJob) -> CompileJob:
    """Create or replace a job."""
    merged = session.merge(job)
    session.flush()
    return merged


def get_job(session: Session, job: str) -> CompileJob:
    """Raises:
    NotFoundError: no job has that id."""
    row = session.get(CompileJob, job)
    if row is None:
        raise NotFoundError(f"no compile job {job!r}", hint="fleet job list --all shows them")
    return row


def list_jobs(session: Session, model: str = "", version: str = "", unfinished: bool = False) -> list[CompileJob]:
    """Compile jobs; what a job wishes to have measured is part of it."""
    query = select(CompileJob).where(CompileJob.kind == "compile").order_by(col(CompileJob.created_at), CompileJob.id)
    if model:
        query = query.where(CompileJob.model == model)
    if version:
        query = query.where(CompileJob.version == version)
    if unfinished:
        query = query.where(col(CompileJob.state).in_(UNFINISHED))
    return list(session.exec(query))


def failures(session: Session, model: str = "", version: str = "") -> list[CompileJob]:
    """The last compile of each version for a class, where that failed; without what was printed, which is long."""
    long = (defer(col(CompileJob.log)), defer(col(CompileJob.report)))  # type: ignore[arg-type]  # col() hides what defer() wants
    query = select(CompileJob).options(*long)
    query = query.where(CompileJob.kind == "compile", col(CompileJob.state).in_(("done", "failed")))
    if model:
        query = query.where(CompileJob.model == model)
    if version:
        query = query.where(CompileJob.version == version)
    rows = session.exec(query.order_by(col(CompileJob.ended_at), CompileJob.id))
    last = {(row.model, row.version, row.device_class): row for row in rows}
    return [row for row in last.values() if row.state == "failed"]


def newest(session: Session, model: str, version: str, device_class: str) -> CompileJob:
    """The compile job that began last.

    Raises:
        NotFoundError: there was none.
    """
    found = [row for row in list_jobs(session, model, version) if row.device_class == device_class and row.started_at]
    if not found:
        raise NotFoundError(
            f"{model} {version} was never compiled for {device_class}", hint="fleet model compile does it"
        )
    return max(found, key=lambda row: row.started_at or 0.0)


def take_job(session: Session, kind: str, device_class: str, worker: str, now: float) -> CompileJob | None:
    """The oldest queued job that this worker did not fail at, marked running; None when there is none. Two workers never get the same one.

    Args:
        device_class: only jobs of this class; empty for any.
        worker: empty for the controller's own.
    """
    query = _queued(kind, device_class).where(~_failed(worker)).limit(1)
    row: CompileJob | None = session.exec(query.with_for_update(skip_locked=True)).first()
    if row is not None:
        take(session, row, now)
    return row


def failed_at(session: Session, kind: str, device_class: str, worker: str) -> list[tuple[CompileJob, JobFailure]]:
    """The queued jobs that this worker failed at, and how; oldest first. Arguments as :func:`take_job`."""
    rows = session.exec(_queued(kind, device_class).where(_failed(worker)).with_for_update(skip_locked=True))
    return [(row, session.get_one(JobFailure, (row.id, worker))) for row in rows]


def _queued(kind: str, device_class: str) -> SelectOfScalar[CompileJob]:
    query = select(CompileJob).where(CompileJob.state == "queued", CompileJob.kind == kind)
    if device_class:
        query = query.where(CompileJob.device_class == device_class)
    found: SelectOfScalar[CompileJob] = query.order_by(col(CompileJob.created_at))
    return found


def _failed(worker: str) -> Exists:
    found: Exists = select(JobFailure).where(JobFailure.job == CompileJob.id, JobFailure.worker == worker).exists()
    return found


def take(session: Session, row: CompileJob, now: float) -> None:
    """Mark a queued job running."""
    row.state, row.started_at = "running", now
    row.attempts += 1
    session.add(row)
    session.flush()


def note_failure(session: Session, failure: JobFailure) -> None:
    """Remember how a job ended on a worker."""
    session.merge(failure)
    session.flush()


def failures_of(session: Session, job: str) -> list[JobFailure]:
    """How a job ended on the workers that had it, the first first."""
    query = select(JobFailure).where(JobFailure.job == job).order_by(col(JobFailure.at), JobFailure.worker)
    return list(session.exec(query))


def leased(session: Session, lease: str) -> CompileJob | None:
    """The job of a lease, whatever has become of it since."""
    query = select(CompileJob).where(CompileJob.lease == lease)
    found: CompileJob | None = session.exec(query.with_for_update()).first() if lease else None
    return found


def expired(session: Session, now: float) -> list[CompileJob]:
    """Running jobs whose worker has not renewed its lease in time."""
    query = select(CompileJob).where(CompileJob.state == "running", col(CompileJob.lease_until) < now)
    return list(session.exec(query.with_for_update(skip_locked=True)))


def own_running(session: Session) -> list[CompileJob]:
    """Running jobs that the controller itself had taken: their processes ended with it."""
    return list(session.exec(select(CompileJob).where(CompileJob.state == "running", CompileJob.worker == "")))


def wishes(session: Session, parent: str) -> list[CompileJob]:
    """Unfinished measuring jobs that another job wishes."""
    query = select(CompileJob).where(CompileJob.parent == parent, col(CompileJob.state).in_(UNFINISHED))
    return list(session.exec(query))


def requeue(session: Session, row: CompileJob, why: str = "") -> None:
    """Give a job that was taken back to whoever asks next."""
    row.state, row.started_at, row.progress, row.step = "queued", None, 0.0, why
    row.worker, row.lease, row.lease_until = "", "", None
    session.add(row)
