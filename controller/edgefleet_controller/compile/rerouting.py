"""Stage 2, compile: whose fault a failure is. Receives how a job ended on a worker, hands on who may try it next, or how it failed (ADR 0015).

A full disk, a toolchain that is broken there, a process that the kernel killed: that is the machine's, and another may do the job. What a
network, a manifest or a budget was refused for is the job's own, and would be refused anywhere.
"""

from __future__ import annotations

import msgspec
from edgefleet_shared import __version__
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem, ToolchainUnusable, from_dict
from sqlmodel import Session

from edgefleet_controller.compile.watching import ChildKilled
from edgefleet_controller.store import jobs, workers
from edgefleet_controller.store.tables import CompileJob, JobFailure

MAX_ATTEMPTS = 3  # a job that ends its workers is given to no fourth
WORKER_SEEN_S = 90.0  # a worker asks every other second, which is noted every 30 s: one that was not heard of for so long is not there
BUILDER_SEEN_S = 300.0  # a builder board that was not heard of for so long is not waited for
_OF_THE_MACHINE = (EnvironmentProblem, ToolchainUnusable, ChildKilled)


def is_of_the_machine(error: EdgefleetError) -> bool:
    """Whether another machine might do what failed so on this one."""
    return isinstance(error, _OF_THE_MACHINE)


def others(session: Session, row: CompileJob, now: float, *, own: bool) -> set[str]:
    """The workers that are there, could take a job, and did not fail at it yet; empty stands for the controller's own.

    Args:
        own: whether the controller has any.
    """
    if row.kind == "measure":
        able = {one.name for one in workers.builders(session, row.device_class, now - BUILDER_SEEN_S)}
    else:
        able = {one.name for one in workers.compilers(session, __version__, now - WORKER_SEEN_S)}
        able |= {""} if own else set()
    return able - {failure.worker for failure in jobs.failures_of(session, row.id)}


def note(session: Session, row: CompileJob, error: EdgefleetError, now: float, *, silent: bool) -> None:
    """Remember how a running job ended on its worker."""
    told = msgspec.json.encode(error.as_dict()).decode()
    jobs.note_failure(session, JobFailure(job=row.id, worker=row.worker, silent=silent, error=told, at=now))


def told(session: Session, row: CompileJob) -> EdgefleetError:
    """How a job failed that nobody is left to do: what each worker said, as an error of the last one's kind."""
    known = jobs.failures_of(session, row.id)
    fields = [msgspec.json.decode(failure.error, type=dict[str, str]) for failure in known]
    said = "; ".join(f"{by(f.worker)}: {told['message']}" for f, told in zip(known, fields, strict=True))
    if len(known) > 1:
        said = f"{len(known)} workers failed at it: {said}"
    elif row.attempts > 1:
        said = f"{row.attempts} times, {said}"
    elif not known[0].worker:
        said = fields[0]["message"]  # there is nobody whom it could be mistaken for
    return from_dict(fields[-1] | {"message": said})


def by(worker: str) -> str:
    """A worker's name, for people."""
    return worker or "the controller's own worker"
