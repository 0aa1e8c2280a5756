"""``fleet-agent doctor``: whatever of a board's memory is damaged, the check that is about it says so."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from chaos.board import STATE
from chaos.stories import came_to
from edgefleet_agent import board, doctor, journal, launcher
from edgefleet_agent import settings as board_settings
from edgefleet_agent.journal import Journal

REMEMBERED = {"enrolment", "trust", "journal", "active artifact", "agent's versions"}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a board that took a version; its engines are another check's matter."""
    for path, content in came_to("1").items():
        if content is not None and path.startswith(f"{STATE}/"):
            target = tmp_path / path.removeprefix(f"{STATE}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    launcher.folder(tmp_path).mkdir()
    journal.write(launcher.folder(tmp_path), Journal())
    monkeypatch.setattr(board, "probe_engines", tuple)
    return tmp_path


def wrong(state: Path) -> set[str]:
    return {finding.what for finding in doctor.examine(state) if not finding.ok} & REMEMBERED


def test_a_whole_board_is_whole(state: Path) -> None:
    assert wrong(state) == set()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("agent.json",), "enrolment"),
        (("trust/root.json",), "trust"),
        (("trust/floors-a.json", "trust/floors-b.json"), "trust"),
        (("journal.json",), "journal"),
        (("slots.json",), "active artifact"),
        (("agent/journal.json",), "agent's versions"),
    ],
)
def test_what_is_damaged_is_found(state: Path, names: tuple[str, ...], what: str) -> None:
    for name in names:
        (state / name).write_bytes(b"{")
    assert wrong(state) == {what}


@pytest.fixture
def disk_of_few_files(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for bytes, and none for names."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of the test's own")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=12", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_has_room_but_takes_no_more_files_is_found(disk_of_few_files: Path) -> None:
    (found,) = (finding for finding in doctor.examine(disk_of_few_files) if finding.what == "disk")
    assert not found.ok
    assert "df -i" in found.detail


def test_a_broker_that_is_not_reached_is_named(state: Path) -> None:
    settings = msgspec.structs.replace(board_settings.read(state), broker_host="127.0.0.1", broker_port=1)
    board_settings.write(state, settings)
    (found,) = [finding for finding in doctor.examine(state) if finding.what == "broker"]
    assert (found.ok, "can't reach 127.0.0.1:1: " in found.detail) == (False, True), found
