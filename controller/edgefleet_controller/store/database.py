"""The database behind its URL: SQLite out of the box, PostgreSQL by setting. Receives a URL, hands on sessions.

A session is one transaction: it commits when its block ends, and is undone when the block raises. ``write`` takes SQLite's
write lock at once: a reader that turns writer would be refused half-way instead of waiting its turn.
Foreign exceptions are translated here; our own pass through.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgefleet_shared.errors import ConflictError, EnvironmentProblem, InputError
from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, OperationalError
from sqlmodel import Session, SQLModel

from edgefleet_controller.store.tables import SCHEMA_VERSION

BUSY_TIMEOUT_MS = 15_000  # a writer waits so long for the one before it
_MIGRATION_LOCK = 0x6566_7631  # PostgreSQL advisory lock: "efv1"

_SERIAL_LOCK = 0x6566_7632

# From version n to n+1, statements for a database that exists already; a new one is made as tables.py says.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE device ADD COLUMN agent_assignment VARCHAR NOT NULL DEFAULT ''",
        "ALTER TABLE assignment ADD COLUMN subject VARCHAR NOT NULL DEFAULT 'model'",
        # Boards that were enrolled before may send results without a signature until their first signed one.
        "ALTER TABLE device ADD COLUMN must_sign BOOLEAN NOT NULL DEFAULT false",
        "ALTER TABLE device ADD COLUMN proof TEXT NOT NULL DEFAULT ''",
    ),
    # Workers over HTTPS (ADR 0015). The token's class may be missing: SQLite can't drop NOT NULL, and tokens are short-lived.
    2: (
        "CREATE TABLE worker (name VARCHAR NOT NULL PRIMARY KEY, device_class VARCHAR REFERENCES device_class (name), "
        "certificate_serial VARCHAR NOT NULL, revoked BOOLEAN NOT NULL, enrolled_at FLOAT NOT NULL, last_seen FLOAT NOT NULL)",
        "DROP TABLE enrolment_token",
        "CREATE TABLE enrolment_token (sha256 VARCHAR NOT NULL PRIMARY KEY, role VARCHAR NOT NULL, "
        "device_class VARCHAR REFERENCES device_class (name), site VARCHAR NOT NULL, label VARCHAR NOT NULL, "
        "created_at FLOAT NOT NULL, expires_at FLOAT NOT NULL, used_at FLOAT, used_by VARCHAR NOT NULL)",
        *(
            f"ALTER TABLE compile_job ADD COLUMN {column}"
            for column in (
                "kind VARCHAR NOT NULL DEFAULT 'compile'", "parent VARCHAR NOT NULL DEFAULT ''", "worker VARCHAR NOT NULL DEFAULT ''",
                "lease VARCHAR NOT NULL DEFAULT ''", "lease_until FLOAT", "attempts INTEGER NOT NULL DEFAULT 0",
                "report TEXT NOT NULL DEFAULT ''", "log TEXT NOT NULL DEFAULT ''",
            )
        ),
        "CREATE INDEX ix_compile_job_lease ON compile_job (lease)",
        "CREATE INDEX ix_compile_job_parent ON compile_job (parent)",
    ),
    # Agents from before told how their own update ended without a signature; as with models, until the first signed one.
    3: (
        "ALTER TABLE device ADD COLUMN agent_must_sign BOOLEAN NOT NULL DEFAULT false",
        "ALTER TABLE device ADD COLUMN agent_proof TEXT NOT NULL DEFAULT ''",
    ),
    4: ("ALTER TABLE enrolment_token ADD COLUMN certificate TEXT NOT NULL DEFAULT ''",),
    5: ("ALTER TABLE worker ADD COLUMN renewed_serial VARCHAR NOT NULL DEFAULT ''",),
    # Which worker failed at a job, and how (ADR 0015).
    6: (
        "ALTER TABLE worker ADD COLUMN edgefleet VARCHAR NOT NULL DEFAULT ''",
        "CREATE TABLE job_failure (job VARCHAR NOT NULL REFERENCES compile_job (id), worker VARCHAR NOT NULL, silent BOOLEAN NOT NULL, "
        "error TEXT NOT NULL, at FLOAT NOT NULL, PRIMARY KEY (job, worker))",
    ),
}  # fmt: skip


class Database:
    """A connection pool and its transactions.

    Args:
        url: ``sqlite:////path/file.db`` or ``postgresql://user@host/name``.

    Raises:
        InputError: not such a URL.
        EnvironmentProblem: the driver is missing.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
                raise InputError(
                    f"database URL of kind {parsed.drivername!r}", hint="sqlite:////path/file.db or postgresql://..."
                )
            if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
                raise InputError("the database must be a file", hint="sqlite:////path/file.db")
            self.engine = (
                _sqlite(parsed) if parsed.drivername == "sqlite" else create_engine(parsed, pool_pre_ping=True)
            )
        except (ArgumentError, NoSuchModuleError) as exc:
            raise InputError(f"not a database URL: {exc}", hint="sqlite:////path/file.db or postgresql://...") from exc
        except ModuleNotFoundError as exc:
            raise EnvironmentProblem(
                f"the database needs the Python package {exc.name}", hint="install edgefleet-controller[postgresql]"
            ) from exc

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database."""
        with self._session(writes=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are durable when the block has ended.

        Raises:
            ConflictError: the change contradicts what is stored.
            EnvironmentProblem: disk full, database gone, waited too long for another writer.
        """
        with self._session(writes=True) as session:
            yield session

    @contextmanager
    def _session(self, writes: bool) -> Iterator[Session]:
        with translated(), Session(self.engine.execution_options(writes=writes), expire_on_commit=False) as session:
            yield session
            if writes:
                session.commit()

    def serialise(self, session: Session) -> None:
        """Let only one transaction at a time go on from here, for checks that look at many rows before they add one. SQLite's
        write lock does that already."""
        if not self.is_sqlite:
            session.connection().execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SERIAL_LOCK})

    def migrate(self) -> None:
        """Bring the database to this program's schema; a new one is created.

        Raises:
            EnvironmentProblem: it was written by a newer edgefleet, or can't be reached.
        """
        with translated(), self.engine.execution_options(writes=True).begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            _migrate(connection)

    def close(self) -> None:
        self.engine.dispose()


def _migrate(connection: Connection) -> None:
    if not inspect(connection).has_table("schema_version"):
        SQLModel.metadata.create_all(connection)
        connection.execute(text("INSERT INTO schema_version (id, version) VALUES (1, :v)"), {"v": SCHEMA_VERSION})
        return
    version = connection.execute(text("SELECT version FROM schema_version")).scalar_one()
    if version > SCHEMA_VERSION:
        raise EnvironmentProblem(
            f"the database has schema {version}, this program knows {SCHEMA_VERSION}",
            hint="a newer edgefleet wrote it: upgrade this one",
        )
    while version < SCHEMA_VERSION:
        for statement in MIGRATIONS[version]:
            connection.execute(text(statement))
        version += 1
    connection.execute(text("UPDATE schema_version SET version = :v"), {"v": version})


def _sqlite(url: Any) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        # The driver's own transactions begin too late (at the first change), so that it is told to leave them to us.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        _write_ahead(cursor)
        # An acknowledged event or a signed assignment must survive a power cut: every commit waits for the disk.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begins(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _write_ahead(cursor: Any) -> None:
    """Switch a new file to write-ahead logging. SQLite does not wait for a lock there: of two programs that start at once, one
    must try again."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def translated() -> Iterator[None]:
    """SQLAlchemy's exceptions as ours."""
    try:
        yield
    except IntegrityError as exc:
        raise ConflictError(f"the database refuses it: {exc.orig}") from exc
    except OperationalError as exc:
        raise EnvironmentProblem(f"the database can't do it: {exc.orig}", hint=_hint(str(exc.orig))) from exc
    except DBAPIError as exc:
        if exc.connection_invalidated:
            raise EnvironmentProblem(f"the database went away: {exc.orig}", hint="is it running?") from exc
        raise


def _hint(message: str) -> str:
    for sign, hint in (
        ("full", "free some space"),
        ("locked", "another process writes for too long"),
        ("unable to open", "does the folder exist, and may it be written?"),
        ("refused", "is the database running?"),
    ):
        if sign in message:
            return hint
    return ""
