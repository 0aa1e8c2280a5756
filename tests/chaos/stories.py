"""The stories: everything that a board's disk goes through, each from a tree that the agent itself had come to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

from chaos.board import OTHER_KEY, STATE, Agent, SimulatedRuntime, Story, check_end
from chaos.depot import CLASS, DEVICE, Depot
from edgefleet_agent import enroll
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Enrolled
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk, Tree

O = Outcome  # noqa: E741 - the stories must stay readable
ADDRESSES = {"broker_host": "broker", "broker_port": 1, "api_host": "", "api_port": 0}


@functools.cache
def depot() -> Depot:
    return Depot()


def enrolment(office: Depot, disk: MemoryDisk, spend_token: Callable[[], None] = lambda: None) -> None:
    """What ``fleet-agent enroll`` does on the disk, and when it spends the token."""
    enroll.prepare(STATE, files=disk)
    spend_token()
    answer = Enrolled(
        device=DEVICE,
        device_class=CLASS,
        certificate="a certificate",
        ca="a CA",
        root=office.root.decode(),
        **ADDRESSES,
    )
    enroll.keep(STATE, answer, "a CA", threads=1, health_period_s=10.0, files=disk)


@functools.cache
def enrolled() -> Tree:
    disk = MemoryDisk()
    enrolment(depot(), disk)
    return disk.tree()


def play(story: Story) -> Agent:
    """A story from its beginning to its end, with nothing going wrong."""
    disk = MemoryDisk(story.tree)
    agent = Agent(depot(), story, disk, SimulatedRuntime(depot(), disk, story.ailing, story.key))
    agent.run()
    return agent


@functools.cache
def came_to(*versions: str) -> Tree:
    """The tree of a board that took these versions one after the other."""
    tree = enrolled()
    for version in versions:
        story = Story("before", tree, (depot().assign(version),), {version: (O.SUCCEEDED,)}, published=max(versions))
        agent = play(story)
        check_end(agent)
        tree = agent.disk.tree()
    return tree


@functools.cache
def stories() -> tuple[Story, ...]:
    """One of each kind."""
    office, one = depot(), came_to("1")
    two = came_to("1", "2")
    return (
        Story("first install", enrolled(), (office.assign("1"),), {"1": (O.SUCCEEDED,)}),
        Story("first install that is refused", enrolled(), (office.assign("1"),), {"": (O.FAILED_NO_CHANGE,)},
              refused=frozenset("1")),
        Story("first install that fails, with nothing to return to", enrolled(), (office.assign("1"),),
              {"": (O.FAILED_UNABLE_TO_ROLL_BACK,)}, ailing=frozenset("1")),
        Story("install", one, (office.assign("2"),), {"2": (O.SUCCEEDED,)}),
        Story("install over two, the first is collected", two, (office.assign("3"),), {"3": (O.SUCCEEDED,)}),
        Story("return to the previous version by assignment", two, (office.assign("1"),), {"1": (O.SUCCEEDED,)}),
        Story("install that is refused", two, (office.assign("3"),), {"2": (O.FAILED_NO_CHANGE,)}, refused=frozenset("3")),
        Story("rollback", one, (office.assign("2"),), {"1": (O.FAILED_ROLLED_BACK,)}, ailing=frozenset("2")),
        Story("late regression", one, (office.assign("2"),), {"1": (O.LATE_REGRESSION,)}, regressing="2"),
        Story("superseded while fetching", one, (office.assign("2"), office.assign("3")), {"3": (O.SUCCEEDED,)},
              next_when=State.FETCHING),
        Story("assigned what serves already", one, (office.assign("1"),), {"1": (O.SUCCEEDED,)}),
        *building_stories(),
    )  # fmt: skip


def building_stories() -> tuple[Story, ...]:
    """Of an engine that builds its plans on the board."""
    office, five = depot(), came_to("1", "5")
    six = came_to("5", "6")
    return (
        Story("first install that is built", enrolled(), (office.assign("5"),), {"5": (O.SUCCEEDED,)}, "7"),
        Story("install that is built over two, the first is collected with its plan", six, (office.assign("7"),),
              {"7": (O.SUCCEEDED,)}, "7"),
        Story("install that can not be built", six, (office.assign("7"),), {"6": (O.FAILED_NO_CHANGE,)}, "7",
              unbuildable=frozenset("7")),
        Story("rollback to what was built", five, (office.assign("6"),), {"5": (O.FAILED_ROLLED_BACK,)}, "7",
              ailing=frozenset("6")),
        Story("superseded while building", five, (office.assign("6"), office.assign("7")), {"7": (O.SUCCEEDED,)}, "7",
              next_when=State.BUILDING),
        Story("engine upgraded under what serves", six, (office.assign("6"),), {"6": (O.SUCCEEDED,)}, "7", key=OTHER_KEY),
        Story("engine upgraded, then a rollback", six, (office.assign("7"),), {"6": (O.FAILED_ROLLED_BACK,)}, "7",
              ailing=frozenset("7"), key=OTHER_KEY),
    )  # fmt: skip


# What a board may have been through, what the first assignment may be like, and when a second one comes, if one does.
HISTORIES = ((), ("1",), ("1", "2"), ("2", "1"), ("1", "2", "3"))
KINDS = ("good", "refused", "ailing", "regressing")
MOMENTS = (None, State.FETCHING, State.VERIFYING, State.ACCEPTING, State.SWAPPING, State.SOAKING, State.COMMITTING)


def every_story() -> Iterator[Story]:
    """Each history x each first assignment x each moment of a second one, good or refused."""
    yield from stories()
    for history, kind in itertools.product(HISTORIES, KINDS):
        tree = came_to(*history) if history else enrolled()
        for version, then, moment in itertools.product("34", ("", "good", "refused"), MOMENTS):
            if version in history or (moment is None) != (then == "") or (then == "refused" and "1" in history):
                continue
            yield _story(tree, history[-1] if history else "", version, kind, then, moment)


def _story(tree: Tree, serving: str, version: str, kind: str, then: str, moment: State | None) -> Story:
    """Version ``version`` behaves as ``kind`` says; 1 is assigned after it, and behaves as ``then`` says, if it says anything."""
    name = f"{version} over {serving or 'nothing'} is {kind}"
    first = {
        "good": {version: (O.SUCCEEDED,)},
        "refused": {serving: (O.FAILED_NO_CHANGE,)},
        "ailing": {serving: (O.FAILED_ROLLED_BACK if serving else O.FAILED_UNABLE_TO_ROLL_BACK,)},
        "regressing": {serving: (O.LATE_REGRESSION,)} if serving else {version: (O.SUCCEEDED,)},
    }[kind]
    desired, ends = [depot().assign(version)], first
    if moment is not None:
        name += f", 1 comes while {moment.value} and is {then}"
        desired.append(depot().assign("1"))
        if then == "good" or serving == "1":
            ends = {"1": (O.SUCCEEDED,)}
        else:  # what serves is what the first one left, or what was before it when it was superseded
            ends = dict.fromkeys({*first, serving}, (O.FAILED_NO_CHANGE,))
    return Story(
        name, tree, tuple(desired), ends, next_when=moment,
        refused=frozenset(version if kind == "refused" else "") | frozenset("1" if then == "refused" else ""),
        ailing=frozenset(version if kind == "ailing" else ""),
        regressing=version if kind == "regressing" and moment is None else "",
    )  # fmt: skip
