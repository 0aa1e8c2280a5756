"""A running controller, one for each file of tests that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fleet import Fleet, manifests


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A running controller with class ``pc`` registered."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    manifests(made.folder / "manifests")
    try:
        made.start()
        made.json("apply", "-f", str(made.folder / "manifests"))
        yield made
    finally:
        made.close()
