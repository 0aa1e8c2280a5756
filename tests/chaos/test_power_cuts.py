"""Every state that a power cut can leave, in its bounded part: each kind of story cut at every instant. `make chaos` has the rest."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from chaos.board import STATE, Story
from chaos.enrolment import EnrolmentExplorer
from chaos.explorer import Explorer
from chaos.mistakes import ENROLMENT_MISTAKES, MISTAKES, SPOOL_MISTAKES, Mistake
from chaos.spooling import SpoolExplorer
from chaos.stories import depot, stories


def by_name(name: str) -> Story:
    return next(story for story in stories() if story.name == name)


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_whatever_a_cut_leaves_a_verified_model_is_named_and_the_board_ends_where_it_should(story: Story) -> None:
    explorer = Explorer(depot())
    explorer.explore(story)
    assert explorer.failures == []
    assert explorer.recovered > 20


def test_an_agent_that_was_killed_takes_nothing_for_safe_that_a_cut_can_still_take() -> None:
    explorer = Explorer(depot())
    explorer.explore_kills(by_name("assigned what serves already"), depth=2)
    assert explorer.failures == []


def test_a_cut_leaves_a_board_enrolled_and_whole_or_able_to_enrol_again() -> None:
    explorer = EnrolmentExplorer(depot())
    explorer.explore(depth=1)
    assert explorer.failures == []
    assert explorer.recovered > 20


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_caught(mistake: Mistake) -> None:
    explorer = Explorer(depot(), mistake.make_disk, limit=1)
    with mistake.plant() if mistake.plant else nullcontext():
        if mistake.kills:
            explorer.explore_kills(by_name(mistake.story), depth=2)
        else:
            explorer.explore(by_name(mistake.story))
    assert explorer.failures != []


@pytest.mark.parametrize("mistake", ENROLMENT_MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_of_the_enrolment_is_caught(mistake: Mistake) -> None:
    explorer = EnrolmentExplorer(depot(), mistake.make_disk, limit=1)
    with mistake.plant() if mistake.plant else nullcontext():
        explorer.explore(depth=1)
    assert explorer.failures != []


def test_whatever_a_cut_leaves_every_event_that_was_stored_comes_once_or_is_counted() -> None:
    explorer = SpoolExplorer()
    explorer.explore(depth=1)
    assert explorer.failures == []
    assert explorer.recovered > 50


@pytest.mark.parametrize("mistake", SPOOL_MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_of_the_spool_is_caught(mistake: Mistake) -> None:
    explorer = SpoolExplorer(mistake.make_disk, limit=1)
    with mistake.plant() if mistake.plant else nullcontext():
        explorer.explore(depth=1)
    assert explorer.failures != []


def test_a_start_that_takes_an_earlier_ones_name_is_caught() -> None:
    explorer = SpoolExplorer(limit=1, boot_of=lambda depth: "boot")
    explorer.explore(depth=1)
    assert explorer.failures != []


def test_nothing_goes_past_the_port() -> None:
    assert not STATE.parent.exists(), "something wrote to the machine's own disk"
