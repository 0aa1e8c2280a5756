"""The real agent killed at random, on a disk that refuses and on one that is full: a few of each. `make chaos` does many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chaos.processes import Trial, disks_that_refuse, full_disks, has_strace, kill_at_random, may_mount
from support.controller import Board


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    made = Trial(tmp_path_factory.mktemp("trial"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def board(trial: Trial) -> Iterator[Board]:
    with trial.board() as made:
        yield made


def test_an_agent_that_is_killed_at_a_random_moment_ends_where_it_should(trial: Trial, board: Board) -> None:
    kill_at_random(trial, board, times=2, seed=11)
    assert trial.failures == []


@pytest.mark.skipif(not has_strace(), reason="strace is not installed")
def test_an_agent_whose_disk_refuses_goes_on_and_says_so(trial: Trial, board: Board) -> None:
    disks_that_refuse(trial, board, [("fsync", "EIO", "4+")])
    assert trial.failures == []


@pytest.mark.skipif(not may_mount(), reason="only root may mount a small disk")
def test_an_agent_whose_disk_is_full_goes_on_and_says_so(trial: Trial, board: Board) -> None:
    full_disks(trial, board, [0])
    assert trial.failures == []
