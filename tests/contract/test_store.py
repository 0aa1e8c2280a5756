"""What the store promises of its schema, boards, events and the catalog, on every database it runs on."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import msgspec
import pytest
from edgefleet_controller.store import catalog, devices, events, jobs, rollouts, workers
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.devices import PresenceRow
from edgefleet_controller.store.tables import SCHEMA_VERSION, Artifact, CompileJob
from edgefleet_shared.errors import (
    ConflictError,
    EdgefleetError,
    EnvironmentProblem,
    InputError,
    NotFoundError,
    TrustError,
)
from edgefleet_shared.messages import Ack, Dropped, Event, Health, Refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect, text
from support.stores import assignment, enrol


def event(sequence: int, device: str = "b1", boot: str = "boot1", requests: int = 0) -> Event:
    return Event(device=device, boot=boot, sequence=sequence, at=float(sequence), body=Health(requests=requests))


def insert(database: Database, *given: Event) -> dict[str, list[Ack]]:
    with database.write() as session:
        return events.insert(session, given, received_at=100.0)


def stored(database: Database) -> int:
    with database.read() as session:
        return int(session.connection().execute(text("SELECT count(*) FROM event")).scalar_one())


# ------------------------------------------------------------------------------------------------------------- database


def test_migrating_twice_changes_nothing(database: Database) -> None:
    enrol(database, "b1")
    database.migrate()
    with database.read() as session:
        assert devices.get_device(session, "b1").site == "lab"


# What makes schema 1 of today's, on either database: the newer columns and tables taken away again.
SCHEMA_1 = (
    "DROP TABLE worker",
    "DROP TABLE job_failure",
    "DROP INDEX ix_compile_job_lease",
    "DROP INDEX ix_compile_job_parent",
    *(
        f"ALTER TABLE compile_job DROP COLUMN {name}"
        for name in ("kind", "parent", "worker", "lease", "lease_until", "attempts", "report", "log")
    ),
    "DROP TABLE enrolment_token",
    "CREATE TABLE enrolment_token (sha256 VARCHAR NOT NULL PRIMARY KEY, device_class VARCHAR NOT NULL REFERENCES device_class (name))",
    "ALTER TABLE device DROP COLUMN agent_assignment",
    "ALTER TABLE assignment DROP COLUMN subject",
    "ALTER TABLE device DROP COLUMN must_sign",
    "ALTER TABLE device DROP COLUMN proof",
    "ALTER TABLE device DROP COLUMN agent_must_sign",
    "ALTER TABLE device DROP COLUMN agent_proof",
    "UPDATE schema_version SET version = 1",
)


def test_a_database_of_schema_1_becomes_what_a_new_one_is_and_keeps_what_it_holds(database: Database) -> None:
    def columns() -> dict[str, set[str]]:
        found = inspect(database.engine)
        return {table: {c["name"] for c in found.get_columns(table)} for table in found.get_table_names()}

    fresh = columns()
    enrol(database, "b1")
    with database.write() as session:
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1)])
        for statement in SCHEMA_1:
            session.connection().execute(text(statement))
        session.connection().execute(
            text(
                "INSERT INTO compile_job (id, model, version, device_class, ship_despite_quality, state, step, progress, manifest, "
                "error, created_at) VALUES ('old', 'm', '1', 'x86', false, 'queued', '', 0.0, '', '', 1.0)"
            )
        )
    assert columns() != fresh
    database.migrate()
    assert columns() == fresh
    with database.read() as session:
        board = devices.get_device(session, "b1")
        assert (board.assignment, board.agent_assignment) == ("r1.b1.1", "")
        assert rollouts.get_assignment(session, "r1.b1.1").subject == "model"
        assert session.connection().execute(text("SELECT version FROM schema_version")).scalar_one() == SCHEMA_VERSION
    with database.write() as session:
        taken = jobs.take_job(session, "compile", "", "", 5.0)
        assert taken is not None
        assert (taken.id, taken.attempts) == ("old", 1)
        workers.enrol(session, "far", "", certificate_serial="1", now=1.0)
        devices.use_token(session, devices.new_token(session, "", role="worker", now=1.0), "far", 2.0)


def test_a_database_of_a_newer_program_is_refused(database: Database) -> None:
    with database.write() as session:
        session.connection().execute(text("UPDATE schema_version SET version = 99"))
    with pytest.raises(EnvironmentProblem, match="schema 99"):
        database.migrate()


def test_boards_from_before_signatures_are_brought_along_and_need_not_sign(database: Database) -> None:
    with database.write() as session:
        devices.put_class(session, "old", "{}", 1.0)
        devices.enrol(session, "old-board", "old", now=1.0)
        for statement in SCHEMA_1:
            session.connection().execute(text(statement))
    database.migrate()
    with database.write() as session:
        board = devices.get_device(session, "old-board")
        assert (board.must_sign, board.proof) == (False, "")
        assert (board.agent_must_sign, board.agent_proof) == (False, "")
        new = devices.enrol(session, "new-board", "old", now=2.0)
        assert (new.must_sign, new.agent_must_sign) == (True, True)
        session.connection().execute(text("DELETE FROM device WHERE device_class = 'old'"))


def test_two_programs_that_start_at_once_make_one_schema(url: str) -> None:
    found = [Database(url) for _ in range(4)]
    failed: list[EdgefleetError] = []

    def migrate(database: Database) -> None:
        try:
            database.migrate()
        except EdgefleetError as exc:
            failed.append(exc)

    threads = [threading.Thread(target=migrate, args=(database,)) for database in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    with found[0].read() as session:
        assert session.connection().execute(text("SELECT count(*) FROM schema_version")).scalar_one() == 1
    for database in found:
        database.close()


def test_a_block_that_raises_leaves_nothing_behind(database: Database) -> None:
    def half() -> None:
        with database.write() as session:
            devices.put_class(session, "x86", "{}", 1.0)
            session.flush()
            devices.get_device(session, "b1")

    with pytest.raises(NotFoundError):
        half()
    with database.read() as session:
        assert devices.list_classes(session) == []


def test_a_row_that_refers_to_nothing_is_refused(database: Database) -> None:
    with pytest.raises(ConflictError), database.write() as session:
        session.add(CompileJob(id="j", model="m", version="1", device_class="nowhere", state="queued", created_at=1.0))


def test_writers_wait_for_each_other_and_lose_no_count(database: Database) -> None:
    enrol(database, "b1")
    seen: list[int] = []

    def count() -> None:
        for _ in range(10):
            with database.write() as session:
                seen.append(rollouts.next_version(session, "b1", 0.0))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(seen) == list(range(1, 41))


@pytest.mark.parametrize("wrong", ["mysql://x/y", "nonsense", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_is_no_database_of_ours_is_refused(wrong: str) -> None:
    with pytest.raises(InputError):
        Database(wrong)


def test_a_folder_that_does_not_exist_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="folder"):
        Database(f"sqlite:///{tmp_path}/nowhere/fleet.db").migrate()


# --------------------------------------------------------------------------------------------------------------- boards


def test_a_board_is_enrolled_once_and_again_only_after_it_was_revoked(database: Database) -> None:
    enrol(database, "b1")
    with database.write() as session:
        assert rollouts.next_version(session, "b1", 0.0) == 1
    with pytest.raises(ConflictError, match="enrolled already"):
        enrol(database, "b1")
    with database.write() as session:
        devices.revoke(session, "b1")
    enrol(database, "b1")
    with database.write() as session:
        assert rollouts.next_version(session, "b1", 0.0) == 2, "signed versions only rise"


def test_an_assignments_version_is_above_those_that_a_database_from_a_backup_has_lost(database: Database) -> None:
    enrol(database, "b1")
    with database.write() as session:
        lost = [rollouts.next_version(session, "b1", now) for now in (1.8e9, 1.8e9, 1.8e9 + 60.0)]
        assert lost == sorted(set(lost))
        session.connection().execute(text("UPDATE device SET assignment_version = 0 WHERE name = 'b1'"))
        restored = rollouts.next_version(session, "b1", 1.8e9 + 3600.0)
        assert restored > lost[-1]
        assert rollouts.next_version(session, "b1", 1.8e9) > restored, "a clock that was set back lowers none"


@pytest.mark.parametrize(("anew", "kept"), [("x86", True), ("arm", False)])
def test_what_a_name_was_assigned_is_its_successors_if_that_is_of_the_same_class(
    database: Database, anew: str, kept: bool
) -> None:
    enrol(database, "b1")
    with database.write() as session:
        devices.put_class(session, "arm", "{}", 1.0)
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1)])
        devices.revoke(session, "b1")
        devices.enrol(session, "b1", anew, now=2.0)
    with database.read() as session:
        assert devices.get_device(session, "b1").assignment == ("r1.b1.1" if kept else "")
        found = rollouts.signed_before(session, 1e12, heard_since=0.0, beyond=(0.0, ""))
        assert [row.id for row, _ in found] == (["r1.b1.1"] if kept else [])


def test_labels_are_changed_one_by_one_and_stay_with_the_name(database: Database) -> None:
    enrol(database, "b1")
    with database.write() as session:
        assert devices.change_labels(session, "b1", {"line": "3", "hall": "north"}) == {"hall": "north", "line": "3"}
    with database.write() as session:
        assert devices.change_labels(session, "b1", {"line": "4", "hall": None, "never": None}) == {"line": "4"}
        devices.revoke(session, "b1")
        devices.enrol(session, "b1", "x86", now=2.0)
    with database.read() as session:
        assert devices.get_device(session, "b1").labels == '{"line":"4"}'


@pytest.mark.parametrize(
    "wrong", [{"": "x"}, {"Line 3": "x"}, {"line": "x" * 64}, {"line": "a\nb"}, {f"l{n}": "" for n in range(65)}]
)
def test_labels_that_can_not_be_are_refused_and_change_nothing(database: Database, wrong: dict[str, str]) -> None:
    enrol(database, "b1")
    with pytest.raises(InputError), database.write() as session:
        devices.change_labels(session, "b1", {"good": "1", **wrong})
    with database.read() as session:
        assert devices.get_device(session, "b1").labels == "{}"


def test_an_unknown_class_is_told_with_the_known_ones(database: Database) -> None:
    enrol(database, "b1")
    with pytest.raises(NotFoundError, match="known: x86"), database.write() as session:
        devices.enrol(session, "b2", "arm", now=1.0)


def test_a_token_is_valid_once_for_its_time_and_not_stored_as_such(database: Database) -> None:
    enrol(database)
    with database.write() as session:
        token = devices.new_token(session, "x86", site="lab", ttl_s=60, now=1000.0)
    with database.read() as session:
        assert token not in str([t.model_dump() for t in devices.list_tokens(session)])
    with pytest.raises(TrustError), database.write() as session:
        devices.use_token(session, token, "b1", now=1061.0)
    with database.write() as session:
        assert devices.use_token(session, token, "b1", now=1059.0).site == "lab"
    for wrong in (token, token[:-1], "", "x"):
        with pytest.raises(TrustError), database.write() as session:
            devices.use_token(session, wrong, "b2", now=1059.0)


def test_of_two_boards_with_one_token_one_is_enrolled(database: Database) -> None:
    enrol(database)
    with database.write() as session:
        token = devices.new_token(session, "x86", now=1000.0)
    results: list[str] = []

    def spend(device: str) -> None:
        try:
            with database.write() as session:
                devices.use_token(session, token, device, now=1001.0)
            results.append("in")
        except TrustError:
            results.append("out")

    threads = [threading.Thread(target=spend, args=(f"b{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == ["in", "out", "out", "out"]


def test_the_last_will_of_an_earlier_session_does_not_take_a_board_offline(database: Database) -> None:
    enrol(database, "b1")

    def tell(boot: str, online: bool) -> bool:
        with database.write() as session:
            devices.put_presence(session, [PresenceRow("b1", boot, online, 1.0)])
        with database.read() as session:
            return devices.get_device(session, "b1").online

    assert tell("boot1", True)
    assert tell("boot2", True)
    assert tell("boot1", False), "boot1 is over since boot2 began"
    assert not tell("boot2", False)


def test_last_seen_never_goes_backwards(database: Database) -> None:
    enrol(database, "b1")
    for at in (50.0, 40.0):
        with database.write() as session:
            devices.put_seen(session, {"b1": at, "stranger": at})
    with database.read() as session:
        assert devices.get_device(session, "b1").last_seen == 50.0


# --------------------------------------------------------------------------------------------------------------- events


def test_an_event_is_counted_once_however_often_it_comes(database: Database) -> None:
    batch = [event(n) for n in (1, 2, 3)]
    assert insert(database, *batch) == {"b1": [Ack("boot1", 3)]}
    assert insert(database, *batch, event(4), event(4)) == {"b1": [Ack("boot1", 4)]}
    assert stored(database) == 4


def test_a_gap_is_not_acknowledged_and_closes_when_the_missing_one_comes(database: Database) -> None:
    assert insert(database, event(1), event(3), event(4)) == {"b1": [Ack("boot1", 1)]}
    assert insert(database, event(6)) == {"b1": [Ack("boot1", 1)]}
    assert insert(database, event(2)) == {"b1": [Ack("boot1", 4)]}
    assert insert(database, event(5)) == {"b1": [Ack("boot1", 6)]}


def test_events_that_the_agent_gave_up_are_no_gap(database: Database) -> None:
    insert(database, event(1), event(5))
    told = Event(device="b1", boot="boot1", sequence=6, at=6.0, body=Dropped(count=3, up_to=4))
    assert insert(database, told) == {"b1": [Ack("boot1", 6)]}


def test_a_start_of_the_agent_speaks_for_what_an_earlier_one_lost(database: Database) -> None:
    insert(database, event(1), event(5))
    told = Event(device="b1", boot="boot2", sequence=1, at=6.0, body=Dropped(count=3, up_to=0, earlier=("boot1", 4)))
    assert insert(database, told) == {"b1": [Ack("boot1", 5), Ack("boot2", 1)]}


def test_each_boot_and_each_board_counts_for_itself(database: Database) -> None:
    acks = insert(database, event(1), event(2), event(1, boot="boot2"), event(2, device="b2"))
    assert acks == {"b1": [Ack("boot1", 2), Ack("boot2", 1)], "b2": [Ack("boot1", 0)]}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 10**9))
def test_whatever_order_the_network_makes_the_floor_is_right(database: Database, seed: int) -> None:
    rng = random.Random(seed)
    boot = f"boot{seed}"
    sent = [n for n in range(1, 40) for _ in range(rng.choice([1, 1, 2]))]
    rng.shuffle(sent)
    have: set[int] = set()
    while sent:
        batch, sent = sent[: rng.randint(1, 8)], sent[8:]
        have |= set(batch)
        acks = insert(database, *(event(n, boot=boot) for n in batch))
        expected = next(n for n in range(1, 41) if n not in have) - 1
        assert acks["b1"] == [Ack(boot, expected)]


def test_what_comes_back_is_what_was_put_in_and_old_ones_can_be_purged(database: Database) -> None:
    insert(database, event(1, requests=7), event(2, device="b2"))
    with database.read() as session:
        row = events.recent(session, device="b1", kind="health")[0]
        assert msgspec.json.decode(row.body, type=Health).requests == 7
        assert len(events.recent(session)) == 2
    with database.write() as session:
        assert events.purge(session, before=101.0) == 2
    assert insert(database, event(2)) == {"b1": [Ack("boot1", 2)]}, "the floor outlives the events"


def test_text_that_a_board_made_up_comes_back_as_it_was(database: Database) -> None:
    body = Refused(desired="x", check="\x00", reason='a\x00b \u2028 "quoted" \\u0000')
    insert(database, Event(device="b1", boot="boot1", sequence=1, at=1.0, body=body))
    with database.read() as session:
        row = events.recent(session)[0]
    assert (row.kind, msgspec.json.decode(row.body, type=Refused)) == ("refused", body)


# -------------------------------------------------------------------------------------------------------------- catalog


def artifact(manifest: str, version: str = "1", state: str = "compiled") -> Artifact:
    return Artifact(
        manifest=manifest, model="m", version=version, device_class="x86", manifest_bytes=700, size_bytes=5 << 32,
        state=state, requirement="{}", created_at=1.0,
    )  # fmt: skip


def test_a_version_is_immutable_and_adding_it_again_is_no_error(database: Database) -> None:
    with database.write() as session:
        catalog.add_version(session, "m", "1", "sha256:a", "{}", 1.0)
        catalog.add_version(session, "m", "1", "sha256:a", "{}", 2.0)
    with pytest.raises(ConflictError, match="new version"), database.write() as session:
        catalog.add_version(session, "m", "1", "sha256:b", "{}", 3.0)
    with pytest.raises(NotFoundError, match="known: 1"), database.read() as session:
        catalog.get_version(session, "m", "2")


def test_what_was_signed_is_not_replaced_by_another_build(database: Database) -> None:
    enrol(database)
    with database.write() as session:
        catalog.put_artifact(session, artifact("sha256:a"))
        catalog.put_artifact(session, artifact("sha256:b"))
        assert [a.manifest for a in catalog.list_artifacts(session, "m")] == ["sha256:b"]
        catalog.mark_signed(session, "sha256:b")
    with pytest.raises(ConflictError, match="signed"), database.write() as session:
        catalog.put_artifact(session, artifact("sha256:c"))
    with database.read() as session:
        assert catalog.get_artifact(session, "sha256:b").size_bytes == 5 << 32
