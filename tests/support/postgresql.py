"""A real PostgreSQL for tests: initdb and pg_ctl in a temporary folder, on a Unix socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path


class PostgresqlMissing(Exception):
    """No PostgreSQL here, and why."""


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path and shutil.which("pg_ctl"):
        return Path(on_path).parent
    raise PostgresqlMissing("initdb was not found: apt-get install postgresql")


class Postgresql:
    """One server with a fresh cluster. ``url`` is its ``postgres`` database."""

    def __init__(self) -> None:
        binaries = _binaries()
        # A Unix socket's path is limited to 107 characters, so the folder does not lie under pytest's.
        self.folder = Path(tempfile.mkdtemp(prefix="efpg"))
        self._as_user: list[str] = []
        user = "postgres"
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            try:
                account = pwd.getpwnam("postgres")
            except KeyError as exc:
                shutil.rmtree(self.folder)
                raise PostgresqlMissing("running as root, and there is no user postgres to run it as") from exc
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._as_user = ["runuser", "-u", "postgres", "--"]
        data = self.folder / "data"
        self._run(binaries / "initdb", "-D", data, "-U", user, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}'"
        self._pg_ctl = [*self._as_user, str(binaries / "pg_ctl"), "-D", str(data)]
        self._run(binaries / "pg_ctl", "-D", data, "-w", "-l", self.folder / "log", "-o", options, "start")
        self.url = f"postgresql://{user}@/postgres?host={self.folder}"

    def _run(self, *command: object) -> None:
        done = subprocess.run(
            [*self._as_user, *map(str, command)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise PostgresqlMissing(f"{command[0]} failed: {done.stdout[-500:]}")

    def stop(self) -> None:
        subprocess.run(
            [*self._pg_ctl, "-m", "immediate", "stop"], cwd=self.folder, stdout=subprocess.DEVNULL, check=True
        )
        shutil.rmtree(self.folder, ignore_errors=True)
