"""A broker that says what nobody asked for: it can hold a board up, not fill its disk."""

from __future__ import annotations

from chaos.board import STATE, Agent, SimulatedRuntime, Story, check_end
from chaos.stories import came_to, depot
from edgefleet_agent.transport import MetadataFile
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk


def test_metadata_that_the_board_does_not_follow_is_not_kept() -> None:
    disk = MemoryDisk(came_to("1", "2"))
    story = Story("lies", disk.tree(), (depot().assign("3"),), {"3": (Outcome.SUCCEEDED,)}, "4")
    agent = Agent(depot(), story, disk, SimulatedRuntime(depot(), disk, frozenset()))
    for number in range(200):
        agent.wire.put(MetadataFile(f"{1000 + number}.root.json", b"{}" * 1000))
        agent.wire.put(MetadataFile(f"class-{number}.json", b"{}" * 1000))
    agent.run(4000)
    check_end(agent)
    kept = [path for path in disk.tree() if path.startswith(f"{STATE}/metadata/")]
    assert len(kept) <= 5, kept
