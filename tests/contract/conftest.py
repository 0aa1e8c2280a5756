"""The store's contract runs on both databases: a real SQLite file, and a real PostgreSQL where one can be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from edgefleet_controller.store.database import Database
from sqlalchemy import text
from support.postgresql import Postgresql, PostgresqlMissing


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgresql | str]:
    """The server, or the reason why there is none."""
    try:
        server = Postgresql()
    except PostgresqlMissing as exc:
        yield str(exc)
        return
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database's URL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/fleet.db"
    server = request.getfixturevalue("postgresql")
    if isinstance(server, str):
        pytest.skip(f"no PostgreSQL: {server}")
    admin = Database(server.url)
    with admin.write() as session:
        session.connection().execute(text("DROP SCHEMA public CASCADE"))
        session.connection().execute(text("CREATE SCHEMA public"))
    admin.close()
    return str(server.url)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    found = Database(url)
    found.migrate()
    yield found
    found.close()
