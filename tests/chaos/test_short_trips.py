"""A board that is switched off long before a fetch is through, again and again: a vehicle on short trips, with or without a line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from chaos.board import STATE, Agent, SimulatedRuntime, Story, check_end
from chaos.depot import Depot
from chaos.stories import came_to, depot, enrolment
from edgefleet_agent import journal
from edgefleet_agent.fetch import SAFE_EVERY_S
from edgefleet_agent.journal import Journal
from edgefleet_agent.runtime.control import StatusReport
from edgefleet_shared.lifecycle import MAX_RESTARTS, State
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk, Tree, remains

TRIP_S = 10.0
LOOK_S = 5.0  # that pass with each look at what serves
DEPOT = depot()
TRIPS = 3 * MAX_RESTARTS
CHUNKS = 4 * MAX_RESTARTS  # of the model that is fetched


class Vehicle:
    """A board that serves version 1 and is to fetch version 2, over its starts."""

    def __init__(self) -> None:
        self.depot = Depot(model_bytes=4096 * CHUNKS)
        disk = MemoryDisk()
        enrolment(self.depot, disk)
        first = self._agent(Story("before", disk.tree(), (self.depot.assign("1"),), {"1": (Outcome.SUCCEEDED,)}))
        first.run()
        self.tree: Tree = first.disk.tree()
        self._desired, self._starts = self.depot.assign("2"), 0
        self._model = self.depot.layout.manifest(self.depot.manifest("2")).layers[0].digest

    def _agent(self, story: Story, start: int = 0, kernel_boot: str = "") -> Agent:
        disk = MemoryDisk(story.tree)
        runtime = SimulatedRuntime(self.depot, disk, frozenset())
        return Agent(self.depot, story, disk, runtime, start=start, kernel_boot=kernel_boot)

    def start(self, kernel_boot: str, chunks: int) -> Agent:
        """The agent starts; the line brings so many chunks of the model, and whatever else is wanted."""
        self._starts += 1
        story = Story("trip", self.tree, (self._desired,), {"2": (Outcome.SUCCEEDED,)})
        agent = self._agent(story, self._starts, kernel_boot)
        agent.wire.carries[self._model] = chunks
        return agent

    def trip(self, chunks: int) -> None:
        """The power is cut after :data:`TRIP_S`: what was not safe is lost."""
        agent = _turned(self.start(f"kernel boot {self._starts}", chunks))
        self.tree = min(remains(agent.disk), key=lambda tree: sum(len(content or b"") for content in tree.values()))

    def stop(self, chunks: int) -> None:
        """It is stopped in order soon after it started, and the power cut then."""
        agent = _turned(self.start(f"kernel boot {self._starts}", chunks), SAFE_EVERY_S / 2)
        agent.runner.close()
        self.tree = min(remains(agent.disk), key=lambda tree: sum(len(content or b"") for content in tree.values()))

    def crash(self, chunks: int) -> None:
        """The agent alone ends after as long, on a board that stays on."""
        self.tree = _turned(self.start("one kernel boot", chunks)).disk.tree()

    @property
    def journal(self) -> Journal:
        return journal.read(STATE, files=MemoryDisk(self.tree))


class Soaking(SimulatedRuntime):
    """Time passes with each look at what it serves; after a while somebody switches the board off."""

    def until(self, agent: Agent, seconds: float, how: Callable[[Agent], None]) -> None:
        self._agent, self._ends, self._how = agent, agent.clock.elapsed + seconds, how

    def status(self, crashes: int = 0) -> StatusReport:
        told = super().status(crashes)
        self._agent.clock.elapsed += LOOK_S
        if self._agent.clock.elapsed >= self._ends:
            self._how(self._agent)
        return told


class SwitchedOff(Exception):
    """The power is gone."""


def cut(agent: Agent) -> None:
    raise SwitchedOff


def in_order(agent: Agent) -> None:
    agent.runner.close()
    raise SwitchedOff


def soaked(tree: Tree, desired: bytes, start: int, how: Callable[[Agent], None], seconds: float) -> Agent:
    """A start of a board that is on for so long, or until version 2 has come to its end; the disk has all that was written."""
    disk = MemoryDisk(tree)
    runtime = Soaking(DEPOT, disk, frozenset())
    story = Story("soak", tree, (desired,), {"2": (Outcome.SUCCEEDED,)})
    agent = Agent(DEPOT, story, disk, runtime, start=start, kernel_boot=f"kernel boot {start}")
    runtime.until(agent, seconds, how)
    with suppress(SwitchedOff):
        agent.run()
    return agent


def test_a_board_that_is_switched_off_in_order_each_day_soaks_on_the_next_and_commits() -> None:
    tree, desired = came_to("1"), DEPOT.assign("2", soak_s=int(30 * LOOK_S))
    for start in range(2 * MAX_RESTARTS):
        tree = soaked(tree, desired, start, in_order, 4 * LOOK_S).disk.tree()
        assert journal.read(STATE, files=MemoryDisk(tree)).life.state is State.SOAKING
    last = soaked(tree, desired, 99, in_order, 25 * LOOK_S)  # less than the whole soak
    check_end(last)


def test_a_board_that_loses_its_power_over_each_soak_returns_to_what_it_had() -> None:
    tree, desired = came_to("1"), DEPOT.assign("2", soak_s=int(12 * LOOK_S))
    for start in range(MAX_RESTARTS + 1):
        tree = soaked(tree, desired, start, cut, 8 * LOOK_S).disk.tree()
        assert journal.read(STATE, files=MemoryDisk(tree)).life.state is State.SOAKING
    last = soaked(tree, desired, 99, cut, 100 * LOOK_S)
    check_end(last, {"1": (Outcome.FAILED_ROLLED_BACK,)})


def test_only_the_stop_right_before_a_start_excuses_it() -> None:
    tree, desired = came_to("1"), DEPOT.assign("2", soak_s=int(12 * LOOK_S))
    tree = soaked(tree, desired, 0, in_order, 8 * LOOK_S).disk.tree()
    for start in range(1, MAX_RESTARTS + 2):
        tree = soaked(tree, desired, start, cut, 3 * LOOK_S).disk.tree()
    check_end(soaked(tree, desired, 99, cut, 100 * LOOK_S), {"1": (Outcome.FAILED_ROLLED_BACK,)})


def _turned(agent: Agent, seconds: float = TRIP_S) -> Agent:
    while agent.clock.monotonic() < seconds:
        agent.turn()
    return agent


def test_a_fetch_that_each_trip_brings_further_comes_through() -> None:
    vehicle = Vehicle()
    for _ in range(CHUNKS - 1):
        vehicle.trip(chunks=1)
        assert vehicle.journal.life.state is State.FETCHING
    agent = vehicle.start("the last kernel boot", chunks=1)
    agent.run()
    check_end(agent)


def test_a_fetch_comes_through_though_each_trip_is_shorter_than_what_came_needs_to_be_safe() -> None:
    vehicle = Vehicle()
    for _ in range(CHUNKS - 1):
        vehicle.stop(chunks=1)
        assert vehicle.journal.life.state is State.FETCHING
    agent = vehicle.start("the last kernel boot", chunks=1)
    agent.run()
    check_end(agent)


def test_trips_without_a_line_are_no_sign_against_what_is_to_be_fetched() -> None:
    vehicle = Vehicle()
    for _ in range(TRIPS):
        vehicle.trip(chunks=0)
        assert vehicle.journal.life.state is State.FETCHING
    agent = vehicle.start("at home", chunks=CHUNKS)
    agent.run()
    check_end(agent)


def test_an_agent_that_keeps_ending_over_a_fetch_goes_on_as_long_as_that_gets_further() -> None:
    vehicle = Vehicle()
    for _ in range(TRIPS):
        vehicle.crash(chunks=1)
        assert vehicle.journal.life.state is State.FETCHING
    for _ in range(MAX_RESTARTS + 1):
        vehicle.crash(chunks=0)
    assert vehicle.journal.life.state is State.IDLE
    ended = vehicle.journal.ended
    assert ended is not None
    assert ended.outcome is Outcome.FAILED_NO_CHANGE
    assert ended.reason == f"the agent started, {MAX_RESTARTS + 1} times in a row while fetching"
