"""The agent's own update under power cuts, kills and refusing disks, in its bounded part. `make chaos` has the rest."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from chaos.board import STATE
from chaos.selfupdate import AgentStory, agent_stories, check_end, play
from chaos.selfupdate_explorer import AgentExplorer, AgentFaultRunner
from chaos.selfupdate_mistakes import AGENT_MISTAKES, Mistake
from chaos.stories import depot


def by_name(name: str) -> AgentStory:
    return next(story for story in agent_stories() if story.name == name)


@pytest.mark.parametrize("story", agent_stories(), ids=lambda story: story.name)
def test_whatever_a_cut_leaves_the_launcher_starts_a_verified_agent_and_the_board_ends_where_it_should(
    story: AgentStory,
) -> None:
    check_end(play(story))
    explorer = AgentExplorer(depot())
    explorer.explore(story)
    assert explorer.failures == []
    assert explorer.recovered > 20


@pytest.mark.parametrize("name", ["update", "update: it dies at its import"])
def test_an_agent_that_is_killed_at_any_moment_of_its_update_ends_where_it_should(name: str) -> None:
    explorer = AgentExplorer(depot())
    explorer.explore_kills(by_name(name))
    assert explorer.failures == []
    assert explorer.recovered > 20


@pytest.mark.parametrize("story", agent_stories(), ids=lambda story: story.name)
def test_a_disk_that_refuses_costs_at_most_the_candidate(story: AgentStory) -> None:
    runner = AgentFaultRunner(depot())
    runner.every_operation(story, every=61)
    assert runner.failures == []
    assert runner.faults > 10


@pytest.mark.parametrize("mistake", AGENT_MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_caught(mistake: Mistake) -> None:
    explorer = AgentExplorer(depot(), mistake.make_disk, limit=1)
    with mistake.plant() if mistake.plant else nullcontext():
        explorer.explore(by_name(mistake.story))
    assert explorer.failures != []


def test_nothing_goes_past_the_port() -> None:
    assert not STATE.parent.exists(), "something wrote to the machine's own disk"
