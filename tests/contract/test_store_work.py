"""What the store promises of compile jobs and workers, on every database it runs on."""

from __future__ import annotations

import threading

import pytest
from edgefleet_controller.store import jobs, workers
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import CompileJob, JobFailure
from edgefleet_shared.errors import (
    ConflictError,
    NotFoundError,
    TrustError,
)
from support.stores import enrol


def test_a_job_goes_to_one_worker_and_is_queued_again_after_a_restart(database: Database) -> None:
    enrol(database)
    with database.write() as session:
        for n in range(8):
            jobs.put_job(
                session,
                CompileJob(id=f"j{n}", model="m", version="1", device_class="x86", state="queued", created_at=float(n)),
            )
    taken: list[str] = []

    def work() -> None:
        while True:
            with database.write() as session:
                job = jobs.take_job(session, "compile", "", "", 5.0)
            if job is None:
                return
            taken.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(taken) == [f"j{n}" for n in range(8)]
    with database.write() as session:
        running = jobs.own_running(session)
        assert len(running) == 8
        for row in running:
            jobs.requeue(session, row)
    with database.read() as session:
        assert {row.state for row in jobs.list_jobs(session, unfinished=True)} == {"queued"}


def test_a_silent_workers_job_is_found_and_the_controllers_own_is_not(database: Database) -> None:
    enrol(database)
    with database.write() as session:
        for name, worker, until in (("far", "w1", 10.0), ("own", "", None)):
            job = CompileJob(
                id=name, model="m", version="1", device_class="x86", state="running", worker=worker, lease=name,
                lease_until=until, created_at=1.0,
            )  # fmt: skip
            jobs.put_job(session, job)
        assert jobs.expired(session, 9.9) == []
        assert [row.id for row in jobs.expired(session, 10.1)] == ["far"]
        assert [row.id for row in jobs.own_running(session)] == ["own"]
        for row in jobs.expired(session, 10.1):
            jobs.requeue(session, row)
        session.flush()
        assert jobs.leased(session, "far") is None
        assert jobs.leased(session, "") is None, "a job that nobody has is nobody's"


def test_a_measuring_job_goes_to_a_board_of_its_class_and_is_no_compile_job(database: Database) -> None:
    enrol(database)
    enrol(database, device_class="pi")
    with database.write() as session:
        for name, kind, of in (("c", "compile", "x86"), ("m", "measure", "pi")):
            made = CompileJob(
                id=name, kind=kind, model="m", version="1", device_class=of, state="queued", created_at=1.0
            )
            jobs.put_job(session, made)
        assert jobs.take_job(session, "measure", "x86", "", 2.0) is None
        taken = [jobs.take_job(session, "measure", "pi", "", 2.0), jobs.take_job(session, "compile", "", "", 2.0)]
        assert [row and row.id for row in taken] == ["m", "c"]
        assert [row.id for row in jobs.list_jobs(session)] == ["c"]


def test_a_worker_does_not_get_a_job_that_it_failed_at_and_the_next_does(database: Database) -> None:
    enrol(database)
    with database.write() as session:
        for name, at in (("old", 1.0), ("new", 2.0)):
            jobs.put_job(
                session, CompileJob(id=name, model="m", version="1", device_class="x86", state="queued", created_at=at)
            )
        for at, silent in ((3.0, True), (4.0, False)):
            jobs.note_failure(session, JobFailure(job="old", worker="full", silent=silent, error="{}", at=at))
        taken = jobs.take_job(session, "compile", "", "full", 5.0)
        assert taken is not None
        assert taken.id == "new"
        assert jobs.take_job(session, "compile", "", "full", 5.0) is None
        ((row, failure),) = jobs.failed_at(session, "compile", "", "full")
        assert (row.id, failure.at, failure.silent) == ("old", 4.0, False), "the last time counts"
        assert jobs.failed_at(session, "compile", "", "") == []
        other = jobs.take_job(session, "compile", "", "", 5.0)
        assert other is not None
        assert (other.id, other.attempts) == ("old", 1)


def test_a_worker_is_known_by_name_and_certificate_and_a_builder_board_by_when_it_was_heard_of(
    database: Database,
) -> None:
    enrol(database)
    with database.write() as session:
        workers.enrol(session, "w", "x86", certificate_serial="ab", now=1.0)
        with pytest.raises(ConflictError):
            workers.enrol(session, "w", "", certificate_serial="cd", now=1.0)
        with pytest.raises(NotFoundError):
            workers.enrol(session, "v", "no-class", certificate_serial="cd", now=1.0)
        assert workers.check(session, "w", "ab").device_class == "x86"
        for name, serial in (("w", "cd"), ("w", ""), ("", ""), ("x", "ab")):
            with pytest.raises(TrustError):
                workers.check(session, name, serial)
        assert workers.builders(session, "x86", 5.0) == []
        workers.seen(session, "w", "1.2", 6.0)
        assert [row.name for row in workers.builders(session, "x86", 5.0)] == ["w"]
        assert workers.builders(session, "pi", 5.0) == []
        workers.revoke(session, "w")
        assert workers.builders(session, "x86", 5.0) == []
        with pytest.raises(TrustError):
            workers.check(session, "w", "ab")
        workers.enrol(session, "w", "", certificate_serial="ef", now=9.0)
        assert workers.check(session, "w", "ef").device_class is None
