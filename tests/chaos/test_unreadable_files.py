"""A card that is half dead: one file of the board can't be read any more, for as long as it is not written anew."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from chaos.board import STATE, Agent, SimulatedRuntime, Story, check_end
from chaos.stories import came_to, depot
from edgefleet_agent import slots
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk

# Without these nobody may be followed: the board serves on, and says what to do.
TRUSTED = {"trust/root.json"}
# Read before there is an agent at all, and on its connection's side.
ENROLMENT = {"agent.json", "identity/agent.key", "identity/agent.pem", "identity/ca.pem"}


class HalfDead(MemoryDisk):
    """A disk on which reading one file fails; what is put in its place lies on better blocks."""

    def __init__(self, tree: dict[str, bytes | None], path: str) -> None:
        super().__init__(tree)
        self.broken = {path}
        self.fault = self._refuse
        self.after = self._follow

    def _refuse(self, number: int, operation: str, path: str) -> None:
        if operation == "read" and path in self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def _follow(self, operation: str, path: str) -> None:
        if operation in ("rename", "unlink"):
            self.broken.discard(path)


# Two versions that a board took, the second of which serves, and the one that it is to take; those from 5 on have plans.
BOARDS = (("1", "2", "3"), ("5", "6", "7"))


def cases() -> Iterator[tuple[tuple[str, str, str], str]]:
    """Every file of every board."""
    for versions in BOARDS:
        named = {path[len(f"{STATE}/") :] for path, content in came_to(*versions[:2]).items() if content is not None}
        for path in sorted(named - TRUSTED - ENROLMENT):
            yield versions, path


def start(versions: tuple[str, str, str], path: str) -> Agent:
    disk, wanted = HalfDead(came_to(*versions[:2]), f"{STATE}/{path}"), versions[2]
    story = Story("half dead", disk.tree(), (depot().assign(wanted),), {wanted: (Outcome.SUCCEEDED,)}, "7")
    return Agent(depot(), story, disk, SimulatedRuntime(depot(), disk, frozenset()))


@pytest.mark.parametrize(("versions", "path"), list(cases()))
def test_a_file_that_can_not_be_read_keeps_no_model_from_the_board(versions: tuple[str, str, str], path: str) -> None:
    agent = start(versions, path)
    agent.run()
    check_end(agent)


def test_a_board_that_can_not_read_whom_it_trusts_serves_on_and_says_so() -> None:
    agent = start(BOARDS[0], "trust/root.json")
    for _ in range(200):
        agent.turn()
    told = agent.wire.reported
    assert told is not None
    assert "trust/root.json" in told.problem
    active = slots.read(STATE, files=agent.disk.calm()).active
    assert active is not None
    assert active.version == "2"
    assert agent.runtime.serving == active.manifest
