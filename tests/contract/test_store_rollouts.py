"""What the store promises of rollouts and their assignments, on every database it runs on."""

from __future__ import annotations

import msgspec
import pytest
from edgefleet_controller.rollout import engine
from edgefleet_controller.rollout.plan import create
from edgefleet_controller.rollout.views import Assign, IntentKind, Phase
from edgefleet_controller.store import devices, rollouts
from edgefleet_controller.store.database import Database
from edgefleet_shared.assignment import AGENT, Subject
from edgefleet_shared.errors import (
    ConflictError,
)
from support.simulated_boards import artifacts, fleet_of, spec
from support.stores import assignment, enrol


def test_a_rollout_comes_back_as_it_was_put_in_at_every_step(database: Database) -> None:
    fleet = fleet_of({"x86": 4})
    rollout = create("r2", spec(), artifacts(["x86"]), fleet, 1000.5)
    with database.write() as session:
        rollouts.add(session, rollout)
    with database.read() as session:
        assert rollouts.load(session, "r2") == (rollout, 0)
    decisions = engine.decide(rollout, fleet, 1_750_000_000.0)
    after = engine.apply(rollout, decisions, 1001.25)
    with database.write() as session:
        rollouts.save(session, after, 0, [d.progress for d in decisions if isinstance(d, Assign)])
    with database.read() as session:
        assert rollouts.load(session, "r2") == (after, 1)
        assert rollouts.holders(session) == dict.fromkeys(fleet, "r2")
        assert rollouts.to_work_on(session) == ["r2"]


def test_of_two_controllers_that_decided_on_the_same_state_one_is_heard(database: Database) -> None:
    rollout = create("r2", spec(), artifacts(["x86"]), fleet_of({"x86": 2}), 1000.0)
    with database.write() as session:
        rollouts.add(session, rollout)
    with database.write() as session:
        rollouts.save(session, rollout, 0, [])
    with pytest.raises(ConflictError, match="another controller"), database.write() as session:
        rollouts.save(session, rollout, 0, [])
    with pytest.raises(ConflictError, match="already"), database.write() as session:
        rollouts.add(session, rollout)


def test_the_operators_word_survives_what_the_engine_writes(database: Database) -> None:
    rollout = create("r2", spec(), artifacts(["x86"]), fleet_of({"x86": 2}), 1000.0)
    with database.write() as session:
        rollouts.add(session, rollout)
    with database.write() as session:
        assert rollouts.intend(session, "r2", IntentKind.PAUSE, "ann").number == 1
    with database.write() as session:
        rollouts.save(session, rollout, 0, [])  # decided before the word came
    with database.read() as session:
        loaded, _ = rollouts.load(session, "r2")
    assert (loaded.intent.kind, loaded.intent.number, loaded.intent_seen) == (IntentKind.PAUSE, 1, 0)


@pytest.mark.parametrize("kind", [IntentKind.PAUSE, IntentKind.RESUME])
@pytest.mark.parametrize("stop", [IntentKind.ABORT, IntentKind.ROLLBACK])
def test_one_operators_stop_is_not_undone_by_anothers_word_that_comes_before_the_engine_heard_it(
    database: Database, stop: IntentKind, kind: IntentKind
) -> None:
    with database.write() as session:
        rollouts.add(session, create("r2", spec(), artifacts(["x86"]), fleet_of({"x86": 2}), 1000.0))
    with database.write() as session:
        rollouts.intend(session, "r2", stop, "ann")
    with pytest.raises(ConflictError, match=f"r2: {stop.value} by ann was asked for"), database.write() as session:
        rollouts.intend(session, "r2", kind, "bob")
    with database.read() as session:
        assert rollouts.load(session, "r2")[0].intent.kind is stop
    with database.write() as session:
        rollouts.intend(session, "r2", IntentKind.ROLLBACK, "bob")


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.ROLLING_BACK])
def test_a_rollout_that_is_stopping_is_neither_paused_nor_resumed_and_says_so(database: Database, phase: Phase) -> None:
    rollout = create("r2", spec(), artifacts(["x86"]), fleet_of({"x86": 2}), 1000.0)
    with database.write() as session:
        rollouts.add(session, rollout)
        rollouts.save(session, msgspec.structs.replace(rollout, phase=phase), 0, [])
    for kind in (IntentKind.PAUSE, IntentKind.RESUME):
        with pytest.raises(ConflictError, match=f"can't {kind.value} any more"), database.write() as session:
            rollouts.intend(session, "r2", kind)
    with database.write() as session:
        rollouts.intend(session, "r2", IntentKind.ABORT)


def test_a_rollout_of_the_agent_holds_boards_apart_from_one_of_a_model(database: Database) -> None:
    fleet = fleet_of({"x86": 2})
    with database.write() as session:
        for name, changed in (("r2", spec()), ("agents", msgspec.structs.replace(spec(), model=AGENT))):
            rollouts.add(session, create(name, changed, artifacts(["x86"]), fleet, 1000.0))
    with database.read() as session:
        assert rollouts.holders(session) == dict.fromkeys(fleet, "r2")
        assert rollouts.holders(session, Subject.AGENT) == dict.fromkeys(fleet, "agents")


def test_an_assignment_about_the_agent_is_in_force_beside_the_one_about_a_model(database: Database) -> None:
    enrol(database, "b1")
    about_agent = assignment("agents.b1.1", "b1", 2)
    about_agent.subject = Subject.AGENT.value
    with database.write() as session:
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1), about_agent])
    with database.read() as session:
        board = devices.get_device(session, "b1")
        assert (board.assignment, board.agent_assignment) == ("r1.b1.1", "agents.b1.1")
        assert [(row.id, row.subject) for row in sorted(rollouts.unpublished(session), key=lambda row: row.version)] == [
            ("r1.b1.1", "model"), ("agents.b1.1", "agent"),
        ]  # fmt: skip
        found = rollouts.signed_before(session, 1e12, heard_since=0.0, beyond=(0.0, ""))
        first, second = (row for row, _ in found)
        assert {first.id, second.id} == {"r1.b1.1", "agents.b1.1"}
        beyond = first.created_at, first.id
        assert [row.id for row, _ in rollouts.signed_before(session, 1e12, 0.0, beyond)] == [second.id]
        assert rollouts.signed_before(session, 1e12, 0.0, (second.created_at, second.id)) == []
        assert rollouts.signed_before(session, 1e12, board.reported_at + 1, (0.0, "")) == [], "not heard of since"
        assert rollouts.is_known(session, "agents.b1.1")
        assert not rollouts.is_known(session, "r9.b1.1")
    with database.write() as session:
        rollouts.mark_published(session, [("r1.b1.1", 1), ("agents.b1.1", 2)])
        assert rollouts.unpublished(session) == []
        assert rollouts.publish_all_again(session) == 2


def test_an_ended_rollout_takes_only_a_roll_back_and_holds_no_board(database: Database) -> None:
    rollout = create("r2", spec(), artifacts(["x86"]), fleet_of({"x86": 2}), 1000.0)
    ended = msgspec.structs.replace(rollout, phase=Phase.SUCCEEDED, ended_at=1.0)
    with database.write() as session:
        rollouts.add(session, rollout)
        rollouts.save(session, ended, 0, [])
    with database.read() as session:
        assert rollouts.holders(session) == {}
        assert rollouts.to_work_on(session) == []
    with pytest.raises(ConflictError, match="only rollback"), database.write() as session:
        rollouts.intend(session, "r2", IntentKind.RESUME)
    with database.write() as session:
        rollouts.intend(session, "r2", IntentKind.ROLLBACK)
        assert rollouts.to_work_on(session) == ["r2"]


def test_only_the_assignment_in_force_is_published_and_bytes_come_back_verbatim(database: Database) -> None:
    enrol(database, "b1", "b2")
    with database.write() as session:
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1), assignment("r1.b2.1", "b2", 1)])
        rollouts.put_assignments(session, [assignment("r2.b1.1", "b1", 2)])
    with database.read() as session:
        waiting = rollouts.unpublished(session)
    assert [(row.id, row.payload) for row in waiting] == [
        ("r1.b2.1", b"\x00signed\xff"),
        ("r2.b1.1", b"\x00signed\xff"),
    ]
    with database.write() as session:
        rollouts.mark_published(session, [(row.id, row.version) for row in waiting])
        assert rollouts.unpublished(session) == []
        assert rollouts.publish_all_again(session) == 2
        assert len(rollouts.unpublished(session)) == 2


@pytest.mark.parametrize("anew", ["", "x86", "arm"], ids=["nobody", "the same class", "another class"])
def test_what_nobody_is_assigned_any_more_is_withdrawn_and_a_successors_published_again(
    database: Database, anew: str
) -> None:
    enrol(database, "b1", "b2")
    with database.write() as session:
        devices.put_class(session, "arm", "{}", 1.0)
        about_agent = assignment("r2.b1.1", "b1", 2)
        about_agent.subject = "agent"
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1), about_agent, assignment("r1.b2.1", "b2", 1)])
        rollouts.mark_published(session, [(row.id, row.version) for row in rollouts.unpublished(session)])
        assert rollouts.withdrawn(session) == []
        devices.revoke(session, "b1")
        assert rollouts.unpublished(session) == []
        if anew:
            devices.enrol(session, "b1", anew, now=2.0)
    same, expected = anew == "x86", [("r1.b1.1", 1), ("r2.b1.1", 2)]

    def waiting() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        with database.read() as session:
            found = rollouts.unpublished(session), rollouts.withdrawn(session)
        first, second = ([(row.id, row.version) for row in rows] for rows in found)
        return first, second

    assert waiting() == ((expected, []) if same else ([], expected))
    with database.write() as session:
        rollouts.mark_published(session, expected)
    assert waiting() == ([], [])
    with database.write() as session:  # the broker forgot what it retained, or forgot that it no longer does
        rollouts.publish_all_again(session)
    theirs = ("r1.b2.1", 1)
    assert waiting() == (([expected[0], theirs, expected[1]], []) if same else ([theirs], expected))


def test_a_withdrawn_assignment_takes_the_place_of_no_newer_one(database: Database) -> None:
    enrol(database, "b1")
    with database.write() as session:
        devices.put_class(session, "arm", "{}", 1.0)
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1)])
        devices.revoke(session, "b1")
        devices.enrol(session, "b1", "arm", now=2.0)
        rollouts.put_assignments(session, [assignment("r2.b1.1", "b1", 2)])
    with database.read() as session:
        assert rollouts.withdrawn(session) == []
        assert [row.id for row in rollouts.unpublished(session)] == ["r2.b1.1"]


def test_what_another_board_of_the_name_said_is_not_its_successors_of_another_class(database: Database) -> None:
    enrol(database, "b1")
    with database.write() as session:
        devices.put_class(session, "arm", "{}", 1.0)
        devices.put_reported(session, [devices.ReportedRow("b1", "boot", "{}", 1.0)])
        devices.revoke(session, "b1")
        devices.enrol(session, "b1", "arm", now=2.0)
        assert devices.get_device(session, "b1").reported == ""


def test_an_assignment_signed_anew_is_published_again_though_its_old_bytes_were(database: Database) -> None:
    enrol(database, "b1")
    with database.write() as session:
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1)])
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 2)])
        rollouts.mark_published(session, [("r1.b1.1", 1)])
        assert [row.version for row in rollouts.unpublished(session)] == [2]


def test_no_two_assignments_of_a_board_have_one_version(database: Database) -> None:
    enrol(database, "b1")
    with database.write() as session:
        rollouts.put_assignments(session, [assignment("r1.b1.1", "b1", 1)])
    with pytest.raises(ConflictError), database.write() as session:
        rollouts.put_assignments(session, [assignment("r2.b1.1", "b1", 1)])
