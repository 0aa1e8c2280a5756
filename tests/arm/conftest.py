"""One board of each kind, and one network compiled for all of them."""

from __future__ import annotations

import pytest
from support.arm import KINDS, Board, Compiled
from support.userland import UserlandMissing


@pytest.fixture(scope="session", params=KINDS.values(), ids=KINDS.keys())
def board(request: pytest.FixtureRequest) -> Board:
    try:
        return Board(request.param)
    except UserlandMissing as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("compiled"))
