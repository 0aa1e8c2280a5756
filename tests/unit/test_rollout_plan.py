"""Creating and planning a rollout: what is refused, and what every board is told."""

from __future__ import annotations

import msgspec
import pytest
from edgefleet_controller.rollout import waves
from edgefleet_controller.rollout.plan import PlanRow, create, plan
from edgefleet_controller.rollout.views import GateSpec, Phase, RolloutSpec, Selector, Standing, Wave
from edgefleet_shared.errors import ConflictError, InputError
from edgefleet_shared.fingerprint import Fingerprint
from hypothesis import given
from hypothesis import strategies as st
from support.simulated_boards import START, Does, World, artifacts, board, fleet_of, spec


def planned(
    fleet: dict, rollout_spec: RolloutSpec | None = None, classes: tuple[str, ...] = ("x86",)
) -> dict[str, PlanRow]:
    rollout = create("r2", rollout_spec or spec(), artifacts(classes), fleet, START)
    return {row.device: row for row in plan(rollout, fleet, START)}


def test_the_plan_says_for_every_board_its_wave_or_why_not() -> None:
    fleet = fleet_of({"x86": 8})
    fleet |= {
        "had": board("had", version="2"),
        "off": board("off", online=False, last_seen=START - 5000),
        "new": board("new", version=None, fingerprint=None, online=False, last_seen=0.0),
        "arm": board("arm", "arm"),
        "old-engine": board("old-engine", fingerprint=Fingerprint(arch="x86_64", engines={"tflite": "2"})),
    }
    rows = planned(fleet)
    assert set(rows) == set(fleet)
    count = {wave: sum(row.wave == wave for row in rows.values()) for wave in ("canary", "half", "all", "catch-up")}
    assert count == {"canary": 1, "half": 3, "all": 4, "catch-up": 2}, (
        "half of nine is five, of which one has it and one is the canary"
    )
    assert (rows["had"].standing, rows["had"].wave, rows["had"].why) == (Standing.HAD_IT, "", "already there")
    assert "not seen for 5000 s" in rows["off"].why
    assert "never seen" in rows["new"].why
    assert rows["arm"].why == "there is no artifact for class arm"
    assert "needs engine onnxruntime, the board has tflite" in rows["old-engine"].why
    assert rows["arm"].manifest == rows["old-engine"].manifest == ""


def test_the_plan_is_what_then_happens() -> None:
    fleet = fleet_of({"x86": 13, "arm": 7})
    rollout_spec = spec(max_in_flight=2)
    rows = planned(fleet, rollout_spec, ("x86", "arm"))
    world = World(fleet, rollout_spec)
    world.run()
    assert {d: row.wave for d, row in rows.items()} == {
        d: world.rollout.wave_name(p.wave) for d, p in world.rollout.boards.items()
    }


def test_the_plan_shows_a_gate_that_could_never_decide() -> None:
    rows = planned(fleet_of({"x86": 5}), spec(gate=GateSpec(min_sample=3)))
    waiting = [row for row in rows.values() if row.standing is Standing.WAITING]
    assert len(waiting) == 4
    assert all("the gate needs 3" in row.why for row in waiting)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (spec(selector=Selector(classes=("nowhere",))), "matches no board"),
        (spec(selector=Selector(devices=("ghost",))), "no such device: ghost"),
        (
            spec(selector=Selector(devices=("x86-0",)), waves=(Wave(name="a", devices=("x86-1",)),)),
            "selector leaves out",
        ),
        (spec(waves=()), "has no wave"),
        (spec(waves=(Wave(name="a"),)), "exactly one of"),
        (spec(waves=(Wave(name="a", count=1, percent=5),)), "exactly one of"),
        (spec(waves=(Wave(name="a", count=1), Wave(name="a", percent=100))), "same name"),
        (spec(waves=(Wave(name="a", percent=float("nan")),)), "percent"),
        (spec(waves=(Wave(name="a", count=0),)), "at least one board"),
        (spec(gate=GateSpec(min_sample=0)), "min_sample"),
        (spec(gate=GateSpec(max_failed_share=1.0)), "could not fail"),
        (spec(gate=GateSpec(max_failed_share=float("nan"))), "max_failed_share"),
        (spec(gate=GateSpec(max_latency_ratio=float("inf"))), "max_latency_ratio"),
        (spec(gate=GateSpec(max_error_rate=float("nan"))), "max_error_rate"),
        (spec(timeout_s=0.0), "timeout_s"),
    ],
)
def test_a_rollout_that_means_nothing_is_refused_with_the_reason(wrong: RolloutSpec, says: str) -> None:
    with pytest.raises(InputError, match=says):
        create("r2", wrong, artifacts(["x86"]), fleet_of({"x86": 2}), START)


def test_a_rollout_that_no_selected_board_can_take_is_refused_with_every_reason() -> None:
    with pytest.raises(InputError, match=r"arm-0: there is no artifact for class arm"):
        create("r2", spec(), artifacts(["x86"]), fleet_of({"arm": 2}), START)


def test_a_board_of_another_unfinished_rollout_is_refused_by_name() -> None:
    fleet = fleet_of({"x86": 2})
    fleet["x86-1"] = msgspec.structs.replace(fleet["x86-1"], holder="r1")
    with pytest.raises(ConflictError, match="x86-1 by r1") as refused:
        create("r2", spec(), artifacts(["x86"]), fleet, START)
    assert "abort r1" in refused.value.hint
    create("r2", spec(selector=Selector(devices=("x86-0",))), artifacts(["x86"]), fleet, START)


def test_a_revoked_board_is_not_selected() -> None:
    fleet = fleet_of({"x86": 1}, revoked=True)
    with pytest.raises(InputError, match="matches no board"):
        create("r2", spec(), artifacts(["x86"]), fleet, START)


def test_a_selector_matches_by_class_site_label_and_name_together() -> None:
    b = board("b", "x86", site="lab", labels={"line": "3"})
    assert Selector().matches(b)
    assert Selector(classes=("x86",), sites=("lab",), labels={"line": "3"}, devices=("b",)).matches(b)
    for wrong in (
        Selector(classes=("arm",)),
        Selector(sites=("x",)),
        Selector(labels={"line": "4"}),
        Selector(devices=("c",)),
    ):
        assert not wrong.matches(b)


def test_the_canary_is_not_the_same_board_in_every_rollout() -> None:
    fleet = fleet_of({"x86": 30})
    canaries = set()
    for n in range(20):
        world = World(fleet, name=f"r{n}", does=dict.fromkeys(fleet, Does.HANGS))
        world.tick()
        canaries |= set(world.touched)
    assert len(canaries) > 8


def test_a_rollout_whose_boards_all_have_it_succeeds_without_touching_one() -> None:
    world = World(fleet_of({"x86": 3}, version="2"))
    assert world.run().phase is Phase.SUCCEEDED
    assert world.touched == []


@given(st.floats(0.1, 100), st.integers(0, 50), st.integers(0, 50))
def test_a_percent_wave_reaches_its_share_and_no_board_more(percent: float, begun: int, left: int) -> None:
    candidates = {
        "c": list(create("r", spec(), artifacts(["c"]), fleet_of({"c": left + 1}), START).boards.values())[:left]
    }
    chosen = waves.choose(Wave(name="w", percent=percent), candidates, {"c": begun})["c"]
    total = begun + left
    reached = begun + len(chosen)
    assert reached >= min(percent * total / 100 - 1e-6, total)
    assert len(chosen) == 0 or (reached - 1) < percent * total / 100
