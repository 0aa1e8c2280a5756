"""The rollout engine on simulated boards: waves, gates, undoing, catching up, the operator's words."""

from __future__ import annotations

import msgspec
import pytest
from edgefleet_controller.rollout import engine
from edgefleet_controller.rollout.views import (
    ENDED,
    Assign,
    GateSpec,
    IntentKind,
    Phase,
    Standing,
    Wave,
)
from edgefleet_shared.contract import Verdict
from edgefleet_shared.outcomes import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulated_boards import Does, World, board, fleet_of, manifest, random_world, spec


def assigned(world: World) -> list[str]:
    return [d.progress.device for _, d in world.log if isinstance(d, Assign) and not d.back]


def gate(world: World, wave: int, device_class: str) -> Verdict:
    return next(g.verdict for g in world.rollout.gates if (g.wave, g.device_class) == (wave, device_class))


# ------------------------------------------------------------------------------------------------------- going forward


def test_a_good_version_goes_canary_half_all_and_succeeds_when_every_board_has_it() -> None:
    world = World(fleet_of({"x86": 10, "arm": 4}))
    world.tick()
    assert len(assigned(world)) == 2, "one canary of each class"
    assert {world.fleet[d].device_class for d in assigned(world)} == {"x86", "arm"}
    assert world.run().phase is Phase.SUCCEEDED
    assert world.reference() == set(world.fleet)
    by_wave = {w: [p.device_class for p in world.rollout.boards.values() if p.wave == w] for w in (0, 1, 2)}
    assert [(w, b.count("x86"), b.count("arm")) for w, b in by_wave.items()] == [(0, 1, 1), (1, 4, 1), (2, 5, 2)]
    assert all(g.verdict is Verdict.PASSED for g in world.rollout.gates)
    assert len(world.rollout.gates) == 6


def test_no_class_enters_a_wave_before_every_class_has_passed_the_one_before() -> None:
    fleet = fleet_of({"fast": 6, "slow": 6})
    canary = min((p for p in World(fleet).rollout.boards.values() if p.device_class == "slow"), key=lambda p: p.rank)
    world = World(fleet, does={canary.device: Does.HANGS}, rollout_spec=spec(timeout_s=600.0))
    world.run(seconds=300)
    assert len(assigned(world)) == 2
    assert gate(world, 0, "fast") is Verdict.PASSED


def test_the_half_of_a_two_board_class_whose_canary_passed_is_shown_as_nothing_to_do() -> None:
    world = World(fleet_of({"x86": 2}))
    assert world.run().phase is Phase.SUCCEEDED
    assert "nothing to do" in world.rollout.tracks["x86"].notes["half"]
    assert [g.wave for g in world.rollout.gates] == [0, 2]


def test_waves_that_do_not_reach_everybody_get_one_for_the_rest() -> None:
    world = World(fleet_of({"x86": 5}), spec(Wave(name="canary", per_class=1)))
    assert [w.name for w in world.rollout.waves] == ["canary", "rest"]
    assert world.run().phase is Phase.SUCCEEDED


def test_boards_that_had_the_artifact_before_are_not_touched() -> None:
    fleet = fleet_of({"x86": 3})
    fleet["x86-1"] = board("x86-1", "x86", version="2")
    world = World(fleet)
    assert world.run().phase is Phase.SUCCEEDED
    assert world.standing("x86-1") is Standing.HAD_IT
    assert "x86-1" not in assigned(world)


def test_a_board_that_serves_the_artifact_but_was_told_another_since_is_assigned_it() -> None:
    fleet = fleet_of({"x86": 2})
    told_another = board("x86-1", "x86", version="2", assigned_manifest=manifest("x86", "3"))
    world = World(fleet | {"x86-1": told_another})
    assert world.run().phase is Phase.SUCCEEDED
    assert "x86-1" in assigned(world)


@pytest.mark.parametrize("limit", [1, 3])
def test_never_more_boards_in_flight_than_allowed(limit: int) -> None:
    world = World(fleet_of({"x86": 9, "arm": 5}), spec(max_in_flight=limit))
    assert world.run().phase is Phase.SUCCEEDED
    assert world.most_in_flight == limit


def test_a_count_wave_takes_at_least_one_board_of_every_class() -> None:
    world = World(fleet_of({"a": 50, "b": 1, "c": 1}), spec(Wave(name="few", count=2)))
    world.tick()
    assert {world.fleet[d].device_class for d in assigned(world)} == {"a", "b", "c"}


def test_a_wave_of_named_boards_takes_these_and_leaves_other_classes_to_their_next_wave() -> None:
    world = World(fleet_of({"x86": 4, "arm": 2}), spec(Wave(name="pilot", devices=("x86-2",))))
    world.tick()
    assert assigned(world) == ["x86-2"]
    assert "names no board" in world.rollout.tracks["arm"].notes["pilot"]
    assert world.run().phase is Phase.SUCCEEDED


# -------------------------------------------------------------------------------------------------------- bad versions


@pytest.mark.parametrize(
    ("does", "outcome"),
    [
        (Does.REFUSES, Outcome.FAILED_NO_CHANGE),
        (Does.FALLS_BACK, Outcome.FAILED_ROLLED_BACK),
        (Does.HANGS, Outcome.TIMED_OUT),
    ],
)
def test_a_bad_version_stops_at_the_canaries_and_every_touched_board_is_returned(does: Does, outcome: Outcome) -> None:
    fleet = fleet_of({"x86": 6, "arm": 6})
    world = World(fleet, does=dict.fromkeys(fleet, does))
    rollout = world.run()
    assert rollout.phase is Phase.ROLLED_BACK
    assert len(set(assigned(world))) == 2
    assert world.reference("1") == set(fleet), "every board serves what it served before"
    for device in assigned(world):
        p = rollout.boards[device]
        assert p.standing is Standing.RETURNED
        assert p.outcome is outcome
        assert device in rollout.reason, "the operator is told board by board"
        assert p.reason
        assert p.reason in rollout.reason
        assert world.fleet[device].assigned_manifest == p.previous.manifest
    untouched = set(fleet) - set(assigned(world))
    assert all(world.fleet[d] == msgspec.structs.replace(fleet[d], last_seen=world.now) for d in untouched)


def test_one_class_failing_waits_for_the_other_canaries_then_undoes_those_that_took_it_too() -> None:
    fleet = fleet_of({"good": 4, "bad": 4, "hangs": 4})
    does = {d: Does.REFUSES for d in fleet if d.startswith("bad")} | {
        d: Does.HANGS for d in fleet if d.startswith("hangs")
    }
    world = World(fleet, does=does)
    world.run(seconds=30)
    assert world.rollout.phase is Phase.STOPPING, "the hanging canary still has time to tell"
    rollout = world.run()
    assert rollout.phase is Phase.ROLLED_BACK
    assert {g.device_class: g.verdict for g in rollout.gates} == {
        "good": Verdict.PASSED,
        "bad": Verdict.FAILED,
        "hangs": Verdict.FAILED,
    }
    assert len(set(assigned(world))) == 3
    assert world.reference("1") == set(fleet)


def test_a_single_failure_within_the_allowed_share_does_not_stop_but_is_not_called_success() -> None:
    fleet = fleet_of({"x86": 20})
    rank = {d: p.rank for d, p in World(fleet).rollout.boards.items()}
    last = max(rank, key=rank.__getitem__)
    gate_spec = GateSpec(max_failed_share=0.2)
    world = World(fleet, spec(gate=gate_spec), does={last: Does.FALLS_BACK})
    rollout = world.run()
    assert rollout.phase is Phase.INCOMPLETE
    assert last in rollout.reason
    assert world.reference() == set(fleet) - {last}


def test_a_wave_that_can_no_longer_pass_stops_before_its_other_boards_are_assigned() -> None:
    fleet = fleet_of({"x86": 40})
    order = sorted(World(fleet).rollout.boards.values(), key=lambda p: p.rank)
    world = World(
        fleet,
        spec(Wave(name="canary", per_class=1), Wave(name="all", percent=100), max_in_flight=2),
        does={p.device: Does.FALLS_BACK for p in order[1:]},
    )
    assert world.run().phase is Phase.ROLLED_BACK
    assert len(set(assigned(world))) == 3, "the canary, and the two that were in flight"


def test_a_regression_after_commit_reopens_the_gate_and_undoes_the_rollout() -> None:
    fleet = fleet_of({"x86": 12})
    first = min(World(fleet).rollout.boards.values(), key=lambda p: p.rank).device
    world = World(fleet, spec(max_in_flight=1), does={first: Does.REGRESSES})
    rollout = world.run()
    assert rollout.phase is Phase.ROLLED_BACK
    assert rollout.boards[first].outcome is Outcome.LATE_REGRESSION
    assert gate(world, 0, "x86") is Verdict.FAILED
    assert world.reference("1") == set(fleet)


def test_a_board_that_can_not_be_returned_makes_the_rollout_failed_not_rolled_back() -> None:
    fleet = fleet_of({"good": 3, "bad": 3})
    does = {d: Does.REFUSES if d.startswith("bad") else Does.STUCK for d in fleet}
    rollout = World(fleet, does=does).run()
    assert rollout.phase is Phase.FAILED
    assert "stale metadata" in rollout.reason


def test_a_first_artifact_that_other_classes_refuse_stays_on_boards_that_had_nothing_before() -> None:
    fleet = fleet_of({"good": 2, "bad": 2}, version=None)
    world = World(fleet, does={d: Does.REFUSES for d in fleet if d.startswith("bad")})
    rollout = world.run()
    assert rollout.phase is Phase.FAILED
    assert "had nothing before" in rollout.reason
    returned = [p for p in rollout.boards.values() if p.standing is Standing.RETURNED]
    assert [p.back_reason for p in returned] == ["serves nothing, as before"]


# ------------------------------------------------------------------------------------- inconclusive is neither of the two


def test_a_board_that_could_not_tell_is_asked_again_and_counts_when_it_can() -> None:
    fleet = fleet_of({"x86": 3})
    world = World(fleet, does=dict.fromkeys(fleet, Does.CANNOT_TELL_ONCE))
    rollout = world.run()
    assert rollout.phase is Phase.SUCCEEDED
    assert sorted(assigned(world)) == sorted([*fleet, *fleet])
    assert all(p.previous.manifest == manifest("x86", "1") for p in rollout.boards.values())


def test_a_canary_that_can_never_tell_pauses_after_the_attempts_and_resuming_asks_again() -> None:
    fleet = fleet_of({"x86": 3})
    world = World(fleet, does=dict.fromkeys(fleet, Does.CANNOT_TELL))
    rollout = world.run()
    assert rollout.phase is Phase.PAUSED
    assert len(assigned(world)) == rollout.spec.attempts
    assert "inconclusive" in rollout.reason
    assert "no board of this wave gave a clear answer" in rollout.reason
    world.does = {}
    world.intend(IntentKind.RESUME)
    assert world.run().phase is Phase.SUCCEEDED


def test_a_wave_smaller_than_the_minimum_sample_is_never_a_pass() -> None:
    world = World(fleet_of({"x86": 10}), spec(gate=GateSpec(min_sample=3)))
    rollout = world.run()
    assert rollout.phase is Phase.PAUSED
    assert gate(world, 0, "x86") is Verdict.INCONCLUSIVE
    assert "the gate needs 3" in rollout.reason
    assert len(assigned(world)) == 1


# ----------------------------------------------------------------------------------------------- boards out of reach


def test_an_offline_board_blocks_nobody_and_catches_up_when_it_comes_back() -> None:
    fleet = fleet_of({"x86": 4, "arm": 2})
    world = World(fleet | {"x86-0": board("x86-0", online=False)})
    world.run(seconds=600)
    assert world.rollout.phase is Phase.CATCHING_UP
    assert "waiting for 1" in world.rollout.reason
    assert world.reference() == set(fleet) - {"x86-0"}
    world.connect("x86-0")
    assert world.run().phase is Phase.SUCCEEDED
    assert world.rollout.boards["x86-0"].wave == world.rollout.catch_up
    assert gate(world, world.rollout.catch_up, "x86") is Verdict.PASSED


def test_a_failure_in_the_catch_up_undoes_the_catch_up_only() -> None:
    fleet = fleet_of({"x86": 4})
    world = World(fleet | {"x86-0": board("x86-0", online=False)}, does={"x86-0": Does.FALLS_BACK})
    world.run(seconds=600)
    world.connect("x86-0")
    rollout = world.run()
    assert rollout.phase is Phase.FAILED
    assert "3 boards whose gates had passed keep the version" in rollout.reason
    assert world.reference() == set(fleet) - {"x86-0"}
    assert world.fleet["x86-0"].assigned_manifest == manifest("x86", "1")


def test_a_class_that_was_away_as_a_whole_begins_with_its_own_canary() -> None:
    fleet = fleet_of({"x86": 3}) | fleet_of({"arm": 6}, online=False)
    world = World(fleet)
    world.run(seconds=600)
    assert world.rollout.phase is Phase.CATCHING_UP
    before = len(assigned(world))
    for device in fleet:
        if device.startswith("arm"):
            world.connect(device)
    world.does = {d: Does.REFUSES for d in fleet if d.startswith("arm")}
    rollout = world.run()
    assert len(assigned(world)) == before + 1, "a canary, not all six at once"
    assert rollout.phase is Phase.ROLLED_BACK


def test_a_rollout_with_nobody_in_reach_waits_and_says_so_rather_than_passing() -> None:
    fleet = fleet_of({"x86": 3}, online=False)
    world = World(fleet)
    world.run(seconds=100)
    assert world.rollout.phase is Phase.RUNNING
    assert "none of the 3 boards" in world.rollout.reason
    for device in fleet:
        world.connect(device)
    assert world.run().phase is Phase.SUCCEEDED


def test_a_board_not_heard_of_within_the_window_is_out_of_reach_though_it_calls_itself_online() -> None:
    fleet = fleet_of({"x86": 3})
    stale = board("x86-0", last_seen=0.0)
    rollout = World(fleet | {"x86-0": stale}).rollout
    decisions = engine.decide(rollout, fleet | {"x86-0": stale}, rollout.created_at)
    assert "x86-0" not in {d.progress.device for d in decisions if isinstance(d, Assign)}


def test_a_board_that_falls_silent_is_replaced_counts_nowhere_and_catches_up() -> None:
    fleet = fleet_of({"x86": 5})
    first = min(World(fleet).rollout.boards.values(), key=lambda p: p.rank).device
    world = World(fleet, does={first: Does.SILENT_THEN_BACK})
    rollout = world.run()
    assert rollout.phase is Phase.SUCCEEDED
    assert rollout.boards[first].left_wave == 0
    assert rollout.boards[first].wave == rollout.catch_up
    assert rollout.boards[first].outcome is Outcome.SUCCEEDED


def test_a_version_that_cuts_boards_off_pauses_instead_of_taking_the_fleet_one_by_one() -> None:
    fleet = fleet_of({"x86": 30})
    world = World(fleet, does=dict.fromkeys(fleet, Does.GOES_SILENT))
    rollout = world.run()
    assert rollout.phase is Phase.PAUSED
    assert "fell silent" in rollout.reason
    assert len(assigned(world)) == 2, "the canary and one in its place"


def test_a_board_out_of_reach_during_the_roll_back_is_named_and_not_called_returned() -> None:
    fleet = fleet_of({"good": 3, "bad": 3})
    world = World(fleet, does={d: Does.REFUSES for d in fleet if d.startswith("bad")})
    world.tick()
    canary = next(d for d in assigned(world) if d.startswith("good"))
    world.run(seconds=10)
    world.disconnect(canary)
    rollout = world.run()
    assert rollout.phase is Phase.FAILED
    assert f"{canary}: can't be reached" in rollout.reason
    assert world.fleet[canary].assigned_manifest == manifest("good", "1"), "its retained assignment waits for it"


def test_a_revoked_board_does_not_hold_up_the_end() -> None:
    fleet = fleet_of({"x86": 3})
    world = World(fleet | {"x86-0": board("x86-0", online=False)})
    world.run(seconds=600)
    assert world.rollout.phase is Phase.CATCHING_UP
    world.fleet["x86-0"] = msgspec.structs.replace(world.fleet["x86-0"], revoked=True)
    assert world.run().phase is Phase.SUCCEEDED
    assert world.standing("x86-0") is Standing.EXCLUDED


@pytest.mark.parametrize("boards", [1, 4])
def test_a_canary_that_is_revoked_while_it_is_in_flight_gives_its_place_to_another(boards: int) -> None:
    world = World(fleet_of({"x86": boards, "arm": 2}))
    world.tick()
    (canary,) = (d for d in assigned(world) if d.startswith("x86"))
    world.fleet[canary] = msgspec.structs.replace(world.fleet[canary], revoked=True, online=False)
    world.agenda = [entry for entry in world.agenda if entry[2] != canary]
    assert world.run().phase is Phase.SUCCEEDED
    assert world.standing(canary) is Standing.EXCLUDED
    assert world.reference() == set(world.fleet) - {canary}
    canaries = [
        p for p in world.rollout.boards.values() if (p.device_class, p.wave) == ("x86", 0) and p.device != canary
    ]
    assert len(canaries) == min(1, boards - 1), "as many as the wave wants, one after the other"


def test_a_board_that_is_revoked_in_its_wave_is_replaced_where_the_sample_would_be_too_small() -> None:
    waves = (Wave(name="canary", per_class=2), Wave(name="all", percent=100))
    world = World(fleet_of({"x86": 8}), spec(*waves, gate=GateSpec(min_sample=2)))
    world.tick()
    canary, _ = assigned(world)
    world.fleet[canary] = msgspec.structs.replace(world.fleet[canary], revoked=True, online=False)
    world.agenda = [entry for entry in world.agenda if entry[2] != canary]
    assert world.run().phase is Phase.SUCCEEDED
    assert sum(p.wave == 0 and p.standing is Standing.TOOK for p in world.rollout.boards.values()) == 2


def replaced_by_another_class(world: World, device: str) -> None:
    """What ``fleet device revoke`` and a token of another class for the same name come to, between two looks at the fleet."""
    world.fleet[device] = msgspec.structs.replace(
        board(device, "arm", version=None), online=world.fleet[device].online, last_seen=world.now
    )


@pytest.mark.parametrize("does", [Does.HANGS, Does.SUCCEEDS], ids=["in flight", "not yet begun"])
def test_a_board_that_is_enrolled_anew_as_of_another_class_gets_no_artifact_of_its_old_one(does: Does) -> None:
    world = World(fleet_of({"x86": 4, "arm": 2}), does=dict.fromkeys(("x86-0", "x86-1", "x86-2", "x86-3"), does))
    world.tick()
    (canary,) = (d for d in assigned(world) if d.startswith("x86"))
    changes = canary if does is Does.HANGS else next(d for d in world.fleet if d.startswith("x86") and d != canary)
    replaced_by_another_class(world, changes)
    world.does = {}
    world.agenda = [entry for entry in world.agenda if entry[2] != changes]
    assert world.run().phase is Phase.SUCCEEDED
    assert world.standing(changes) is Standing.EXCLUDED
    assert world.rollout.boards[changes].reason == "enrolled anew, as of class arm"
    assert assigned(world).count(changes) == (does is Does.HANGS)


def test_a_board_that_was_enrolled_anew_as_of_another_class_is_not_returned_to_what_the_old_one_had() -> None:
    world = World(fleet_of({"x86": 4}), does={"x86-3": Does.FALLS_BACK})
    while not (found := [d for d in world.fleet if world.standing(d) is Standing.TOOK]):
        world.run(seconds=5)
    (took,) = found
    replaced_by_another_class(world, took)
    world.intend(IntentKind.ROLLBACK)
    assert world.run().phase is Phase.ROLLED_BACK
    assert world.standing(took) is Standing.EXCLUDED
    assert not [d for _, d in world.log if isinstance(d, Assign) and d.back and d.progress.device == took]


# --------------------------------------------------------------------------------------------------- the operator's words


def test_paused_means_that_nothing_is_sent_and_resuming_goes_on_where_it_was() -> None:
    world = World(fleet_of({"x86": 10}))
    world.tick()
    world.intend(IntentKind.PAUSE)
    world.run()
    for _ in range(10):
        world.now += 5
        world._happen()
        world.tick()
    assert world.rollout.phase is Phase.PAUSED
    assert "ann" in world.rollout.reason
    assert len(assigned(world)) == 1
    assert world.standing(assigned(world)[0]) is Standing.TOOK, "what boards report is still recorded"
    world.intend(IntentKind.RESUME)
    assert world.run().phase is Phase.SUCCEEDED


def test_abort_lets_boards_in_flight_finish_and_leaves_all_as_they_are() -> None:
    fleet = fleet_of({"x86": 10})
    world = World(fleet)
    world.run(seconds=10)
    world.intend(IntentKind.ABORT)
    rollout = world.run()
    assert rollout.phase is Phase.ABORTED
    assert world.reference() == set(assigned(world))
    assert 0 < len(world.reference()) < 10
    assert not any(p.standing in (Standing.CHOSEN, Standing.IN_FLIGHT) for p in rollout.boards.values())


@pytest.mark.parametrize("after_s", [0, 12, 7200])
def test_roll_back_returns_boards_that_took_it_in_flight_ones_and_even_after_the_end(after_s: float) -> None:
    fleet = fleet_of({"x86": 6})
    world = World(fleet)
    world.run(seconds=after_s)
    world.intend(IntentKind.ROLLBACK)
    rollout = world.run()
    assert rollout.phase is Phase.ROLLED_BACK
    assert world.reference("1") == set(fleet)


def test_roll_back_leaves_boards_alone_that_another_rollout_has_moved_on() -> None:
    world = World(fleet_of({"x86": 3}))
    assert world.run().phase is Phase.SUCCEEDED
    world._set("x86-1", assignment="r3.x86-1.1", assigned_manifest=manifest("x86", "3"), serving=manifest("x86", "3"))
    world.intend(IntentKind.ROLLBACK)
    assert world.run().phase is Phase.ROLLED_BACK
    assert world.standing("x86-1") is Standing.MOVED_ON
    assert world.serves("x86-1") == manifest("x86", "3")


def test_a_word_that_does_not_apply_is_heard_once_and_changes_nothing() -> None:
    world = World(fleet_of({"x86": 2}))
    world.run()
    world.intend(IntentKind.RESUME)
    world.tick()
    assert world.rollout.phase is Phase.SUCCEEDED
    assert world.rollout.intent_seen == 1


# ------------------------------------------------------------------------------------------------- what always holds


@settings(max_examples=100)
@given(seed=st.integers(0, 10**9), boards=st.integers(1, 40))
def test_whatever_boards_do_the_rules_hold(seed: int, boards: int) -> None:
    world = random_world(seed, boards)
    rollout = world.run(seconds=4 * 3600)
    # It ends, or rests on something that only a person or an absent board can change.
    assert rollout.phase in ENDED | {Phase.PAUSED, Phase.CATCHING_UP, Phase.RUNNING}, rollout.phase
    if rollout.phase in (Phase.CATCHING_UP, Phase.RUNNING):
        away = [p for p in rollout.boards.values() if p.standing in (Standing.WAITING, Standing.AWAY)]
        assert away
        assert not any(world.fleet[p.device].online for p in away)
        assert not any(p.standing in (Standing.CHOSEN, Standing.IN_FLIGHT) for p in rollout.boards.values())
    # Boards never assigned keep what they had, to the byte.
    for device in set(world.fleet) - set(world.touched):
        assert world.serves(device) == world.first[device].serving
        assert world.fleet[device].assignment == world.first[device].assignment
    if rollout.phase is Phase.SUCCEEDED:
        taking_part = {p.device for p in rollout.boards.values() if p.standing is not Standing.EXCLUDED}
        assert taking_part <= world.reference()
    if rollout.phase is Phase.ROLLED_BACK:
        for p in rollout.boards.values():
            if p.tries and p.standing is not Standing.MOVED_ON:
                assert world.serves(p.device) == world.first[p.device].serving
    # Nobody is touched after a gate failed, and each wave's gate passed before the next wave began.
    failed_at = [g.at for g in rollout.gates if g.verdict is Verdict.FAILED]
    if failed_at:
        late = [d for at, d in world.log if isinstance(d, Assign) and not d.back and at > min(failed_at)]
        assert not late
    assert all(len(g.rows) >= 3 for g in rollout.gates)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**9))
def test_when_every_board_comes_back_and_works_every_rollout_succeeds(seed: int) -> None:
    world = random_world(seed, 25)
    world.does = {}
    world.run(seconds=1200)
    for device, b in world.fleet.items():
        if not b.online:
            world.connect(device)
    assert world.run(seconds=8 * 3600).phase is Phase.SUCCEEDED
    assert world.reference() >= {p.device for p in world.rollout.boards.values()}
