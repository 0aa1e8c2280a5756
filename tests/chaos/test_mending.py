"""Files that no cut of ours can damage, damaged all the same: a disk that lies, a bit that rots. The board mends itself or says so."""

from __future__ import annotations

import pytest
from chaos.board import STATE, Agent, SimulatedRuntime, Story, check_end
from chaos.stories import came_to, depot
from edgefleet_agent import plans, slots
from edgefleet_agent.runtime.control import Loaded
from edgefleet_agent.slots import SlotStatus
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import EngineError
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk, Tree

DAMAGE = {
    "emptied": lambda content: b"",
    "zero-filled": lambda content: bytes(len(content)),
    "torn": lambda c: c[: len(c) // 2],
}
TEXT_DAMAGE = DAMAGE | {"no text": lambda content: content.replace(b'":"', b'":"\xff')}


def damaged(tree: Tree, name: str, how: str) -> MemoryDisk:
    path = f"{STATE}/{name}"
    content = tree[path]
    assert content is not None
    return MemoryDisk(tree | {path: TEXT_DAMAGE[how](content)})


def start(disk: MemoryDisk, desired: bytes, ends: str, published: str = "4") -> Agent:
    story = Story("damage", disk.tree(), (desired,), {ends: (Outcome.SUCCEEDED,)}, published)
    return Agent(depot(), story, disk, SimulatedRuntime(depot(), disk, frozenset()))


@pytest.mark.parametrize("how", TEXT_DAMAGE)
def test_a_damaged_journal_is_kept_for_people_and_begun_anew(how: str) -> None:
    disk = damaged(came_to("1", "2"), "journal.json", how)
    agent = start(disk, depot().assign("3"), "3")
    agent.run()
    check_end(agent)
    assert f"{STATE}/journal.json.damaged" in disk.tree()


@pytest.mark.parametrize("how", TEXT_DAMAGE)
def test_damaged_slots_are_mended_from_what_the_journal_knows_without_a_controller(how: str) -> None:
    disk = damaged(came_to("1", "2"), "slots.json", how)
    agent = start(disk, depot().assign("2"), "2")
    agent.runner.turn(None)  # the first thing that happens, before anything arrives
    active = slots.read(STATE, files=disk.calm()).active
    assert active is not None
    assert (active.version, active.status) == ("2", SlotStatus.GOOD)
    assert agent.runtime.serving == active.manifest
    agent.run()
    check_end(agent)


def test_when_slots_and_journal_are_both_damaged_the_assignment_is_taken_anew() -> None:
    tree = damaged(came_to("1", "2"), "slots.json", "torn").tree()
    disk = damaged(tree, "journal.json", "torn")
    agent = start(disk, depot().assign("2"), "2")
    agent.run()
    check_end(agent)


@pytest.mark.parametrize("how", TEXT_DAMAGE)
def test_one_damaged_copy_of_the_floors_is_made_good_by_the_other(how: str) -> None:
    tree = came_to("1", "2")
    for name in ("floors-a.json", "floors-b.json"):
        disk = damaged(tree, f"trust/{name}", how)
        agent = start(disk, depot().assign("3"), "3")
        agent.run()
        check_end(agent)
        copies = [disk.tree()[f"{STATE}/trust/{other}"] for other in ("floors-a.json", "floors-b.json")]
        assert copies[0] == copies[1]


def test_a_board_whose_floors_are_all_damaged_accepts_nothing_and_says_why() -> None:
    tree = damaged(came_to("1", "2"), "trust/floors-a.json", "torn").tree()
    disk = damaged(tree, "trust/floors-b.json", "torn")
    agent = start(disk, depot().assign("3"), "3")
    for _ in range(60):
        agent.turn()
    told = agent.wire.reported
    assert told is not None
    assert "floors" in told.problem
    assert told.active is not None
    assert told.active.version == "2"
    assert agent.runtime.serving == depot().manifest("2")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_board_whose_trusted_root_is_damaged_serves_on_and_says_what_to_do(how: str) -> None:
    disk = damaged(came_to("1", "2"), "trust/root.json", how)
    agent = start(disk, depot().assign("3"), "3")
    for _ in range(60):
        agent.turn()
    told = agent.wire.reported
    assert told is not None
    assert "enrol the board again" in told.problem
    assert agent.runtime.serving == depot().manifest("2")


def plan_of(tree: Tree, version: str) -> str:
    """The path of a version's plan."""
    made = plans.read(Layout(STATE / "artifacts", read_only=True, files=MemoryDisk(tree)))
    return f"{STATE}/artifacts/blobs/sha256/{made[depot().manifest(version)].digest.partition(':')[2]}"


@pytest.mark.parametrize("how", DAMAGE)
def test_a_plan_that_rotted_under_the_model_that_serves_is_built_again(how: str) -> None:
    tree = came_to("5", "6")
    path = plan_of(tree, "6")
    content = tree[path]
    assert content is not None
    disk = MemoryDisk(tree | {path: DAMAGE[how](content)})
    agent = start(disk, depot().assign("6"), "6", "7")
    agent.run()
    check_end(agent)
    assert disk.tree()[path] == content


@pytest.mark.parametrize("how", TEXT_DAMAGE)
def test_damaged_records_of_plans_cost_a_build(how: str) -> None:
    disk = damaged(came_to("5", "6"), "artifacts/plans.json", how)
    agent = start(disk, depot().assign("6"), "6", "7")
    agent.run()
    check_end(agent)


def test_a_record_of_a_plan_that_names_no_digest_costs_a_build() -> None:
    tree = came_to("5", "6")
    path = f"{STATE}/artifacts/plans.json"
    content = tree[path]
    assert content is not None
    disk = MemoryDisk(tree | {path: content.replace(b'"digest":"sha256:', b'"digest":"sha25v:')})
    agent = start(disk, depot().assign("6"), "6", "7")
    agent.run()
    check_end(agent)
    assert disk.tree()[path] == content


def test_a_plan_that_is_not_held_against_its_digest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "is_whole", lambda layout, plan: True)
    with pytest.raises(AssertionError):
        test_a_plan_that_rotted_under_the_model_that_serves_is_built_again("torn")


def test_a_blob_that_rotted_under_the_model_that_serves_is_fetched_again_with_the_next_one() -> None:
    labels = depot().layout.manifest(depot().manifest("2")).blobs()[2].digest.partition(":")[2]
    disk = MemoryDisk(came_to("1", "2") | {f"{STATE}/artifacts/blobs/sha256/{labels}": b"rot"})
    agent = start(disk, depot().assign("3"), "3")
    agent.run()
    check_end(agent)


def test_a_manifest_that_rotted_under_the_model_that_serves_keeps_no_garbage_beyond_the_next_commit() -> None:
    rotten, newer = depot().manifest("2").partition(":")[2], depot().manifest("3")
    disk = MemoryDisk(came_to("1", "2") | {f"{STATE}/artifacts/blobs/sha256/{rotten}": b"rot"})
    agent = start(disk, depot().assign("3"), "3")
    agent.run()
    check_end(agent)
    layout = Layout(STATE / "artifacts", read_only=True, files=disk)
    assert set(layout.digests()) == {newer, *(blob.digest for blob in layout.manifest(newer).blobs())}
    assert slots.read(STATE, files=disk).previous is None, "what can't be returned to is not named"


class Stubborn(SimulatedRuntime):
    """It can start no worker until somebody mends it."""

    mended = False

    def _boot(self) -> None:
        if self.mended:
            super()._boot()

    def load(self, manifest: str, mode: str = "auto", timeout_s: float = 0.0) -> Loaded:
        if not self.mended:
            raise EngineError("no memory for a worker")
        return super().load(manifest, mode, timeout_s)


def test_a_board_whose_runtime_does_not_serve_says_so_and_tries_again_until_it_does() -> None:
    disk = MemoryDisk(came_to("1", "2"))
    runtime = Stubborn(depot(), disk, frozenset())
    story = Story("stubborn", disk.tree(), (depot().assign("2"),), {"2": (Outcome.SUCCEEDED,)})
    agent = Agent(depot(), story, disk, runtime)
    with pytest.raises(AssertionError, match=r"wedged in idle: .*the runtime does not serve: no memory for a worker"):
        agent.run()
    runtime.mended = True
    agent.run()
    assert runtime.serving == depot().manifest("2")
    assert agent.wire.reported is not None
    assert agent.wire.reported.problem == ""
