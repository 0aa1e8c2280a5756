"""A controller that was restored from a backup, and boards that know more than it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_controller.rollout.views import Phase
from edgefleet_shared.assignment import Subject
from support.rollout_sites import BOARDS, Site


@pytest.mark.parametrize("heard_first", [True, False])
@pytest.mark.parametrize("subject", Subject)
def test_a_controller_from_a_backup_orders_no_board_back_to_what_it_remembers(
    tmp_path: Path, subject: Subject, heard_first: bool
) -> None:
    """Assignments in force are signed anew before they expire, with a new number: a board would follow it."""
    site = Site(tmp_path, BOARDS, subject=subject)
    site.create()
    assert site.run("r2").phase is Phase.SUCCEEDED
    copy = site.backup()
    site.create("r3", version="3")
    assert site.run("r3").phase is Phase.SUCCEEDED
    site.restore(copy)
    site.clock.advance(200)
    if not heard_first:
        site.service.renew_assignments(100.0)
    site.hear()
    site.service.publish_all_again()
    for _ in range(3):
        site.tick()
        site.work()
        site.service.renew_assignments(100.0)
    assert set(site.versions().values()) == {"3"}
    site.create("r4", version="1")
    assert site.run("r4").phase is Phase.SUCCEEDED
    site.clock.advance(200)
    assert site.service.renew_assignments(100.0) == len(BOARDS), "it knows them again"


@pytest.mark.parametrize("lost", ["2", "3"])
def test_a_rollout_called_as_one_that_a_backup_lacks_is_followed_by_every_board(tmp_path: Path, lost: str) -> None:
    site = Site(tmp_path, BOARDS)
    copy = site.backup()
    site.create("again", version=lost)
    assert site.run("again").phase is Phase.SUCCEEDED
    site.restore(copy)
    site.hear()
    site.create("again", version="3")
    assert site.run("again").phase is Phase.SUCCEEDED
    assert set(site.versions().values()) == {"3"}
