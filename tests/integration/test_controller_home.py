"""The controller's ground: a disk that is full, and PostgreSQL instead of SQLite. What was there stays, and work goes on after."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgefleet_shared.artifact import digest_of
from support.broker import until
from support.fleet import Fleet, manifests
from support.postgresql import Postgresql, PostgresqlMissing

DISK_BYTES = 48 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no right to mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave not one free byte."""
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(DISK_BYTES))
    return ballast


def test_a_full_disk_is_told_loses_nothing_and_the_same_command_works_when_there_is_space(small_disk, tmp_path):
    # A folder of its own for all but the home, so that only the controller's disk is full.
    fleet = Fleet(small_disk)
    made = manifests(tmp_path / "manifests")
    try:
        fleet.start()
        fleet.json("apply", "-f", str(made / "class.yaml"))
        fleet.json("model", "add", "-f", str(made / "model-1.yaml"))
        before = fleet.json("model", "list")
        ballast = fill(small_disk)
        content = bytes(300_000)
        with fleet.http(operator=True) as http:
            answer = http.put(f"/v1/blobs/{digest_of(content)}", content=content)
            assert answer.status_code == 503
            assert "No space left" in answer.json()["message"]
            assert http.head(f"/v1/blobs/{digest_of(content)}").status_code == 404
        done = fleet.run("model", "add", "-f", str(made / "model-2.yaml"), "--json")
        told = json.loads(done.stdout)["error"]
        assert done.returncode == 1
        assert "No space left" in told["message"] or "full" in told["message"]
        assert told["hint"]
        assert "Traceback" not in done.stderr
        assert fleet.json("model", "list") == before
        ballast.unlink()
        fleet.json("model", "add", "-f", str(made / "model-2.yaml"))
        assert [m["version"] for m in fleet.json("model", "list")] == ["1", "2"]
        assert not list((fleet.home / "artifacts").rglob(".put-*")), "what a refused upload left behind"
    finally:
        fleet.close()


def test_a_fleet_on_postgresql_is_there_again_after_the_controller_was_killed(tmp_path):
    try:
        server = Postgresql()
    except PostgresqlMissing as exc:
        pytest.skip(str(exc))
    try:
        fleet = Fleet(tmp_path)
        made = manifests(tmp_path / "manifests")
        database = {"EDGEFLEET_DATABASE_URL": server.url}
        fleet.start(**database)
        fleet.json("apply", "-f", str(made / "class.yaml"))
        fleet.json("model", "add", "-f", str(made / "model-1.yaml"))
        board = fleet.board("on-postgresql").start()
        until(lambda: any(d["online"] for d in fleet.client().devices()), "the board is seen")
        before = fleet.json("model", "list")
        fleet.end(signal.SIGKILL)
        assert not (fleet.home / "edgefleet.db").exists()
        fleet.start(**database)
        assert fleet.json("model", "list") == before
        until(lambda: any(d["online"] for d in fleet.client().devices()), "the board is seen again")
        board.stop()
        fleet.close()
    finally:
        server.stop()
