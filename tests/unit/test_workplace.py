"""The folder that a compile or an import works in is gone afterwards, also where the job was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from edgefleet_controller.compile.workplace import work_folder

JOB = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from edgefleet_controller.compile.workplace import work_folder
with work_folder(sys.argv[2]) as folder:
    (folder / "samples").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_job_leaves_nothing_however_it_ends(place: Path) -> None:
    with work_folder("compile") as folder:
        (folder / "samples").write_bytes(b"x")
    assert list(place.iterdir()) == []

    def failing() -> None:
        with work_folder("compile"):
            raise RuntimeError("whatever")

    with pytest.raises(RuntimeError):
        failing()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("purpose", ["compile", "add"])
def test_what_a_killed_job_left_goes_with_the_next_and_what_another_works_in_stays(place: Path, purpose: str) -> None:
    jobs = [
        subprocess.Popen([sys.executable, "-c", JOB, str(place), purpose], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, working = (Path(job.stdout.readline().strip()) for job in jobs if job.stdout is not None)
        jobs[0].send_signal(signal.SIGKILL)
        jobs[0].wait(timeout=10)
        assert (killed / "samples").exists()
        with work_folder("compile"):
            assert not killed.exists()
            assert (working / "samples").exists()
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def test_a_folder_that_is_no_jobs_stays(place: Path) -> None:
    stranger = place / "edgefleet-compile-of-somebody"
    stranger.mkdir()
    with work_folder("compile"):
        assert stranger.exists()
