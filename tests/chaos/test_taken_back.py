"""A version that the controller takes back while the board is at it."""

from __future__ import annotations

import pytest
from chaos.board import Agent, SimulatedRuntime, Story, check_end
from chaos.stories import came_to, depot
from edgefleet_agent.runtime.control import Switched
from edgefleet_shared.lifecycle import State
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk


class NotedRuntime(SimulatedRuntime):
    """Notes what it was switched to."""

    def __init__(self, disk: MemoryDisk) -> None:
        super().__init__(depot(), disk, frozenset())
        self.switched: list[str] = []

    def switch(self, manifest: str, timeout_s: float = 0.0) -> Switched:
        self.switched.append(manifest)
        return super().switch(manifest, timeout_s)


@pytest.mark.parametrize("moment", [State.FETCHING, State.VERIFYING, State.BUILDING])
def test_a_version_that_is_taken_back_while_it_is_verified_or_accepted_never_serves(moment: State) -> None:
    story = Story(
        "taken back", came_to("1"), (depot().assign("2"), depot().assign("1")), {"1": (Outcome.SUCCEEDED,)}, next_when=moment
    )  # fmt: skip
    disk = MemoryDisk(story.tree)
    runtime = NotedRuntime(disk)
    agent = Agent(depot(), story, disk, runtime)
    agent.run()
    check_end(agent)
    assert runtime.switched == []
