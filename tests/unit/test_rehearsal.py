"""The rehearsal of a version of the agent: whatever a running agent starts as a program must be there, and come up, before it is tried."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import edgefleet_agent
import pytest
from edgefleet_agent import settings as board_settings
from edgefleet_agent.settings import Settings

PACKAGE = Path(edgefleet_agent.__file__).parent
# A module that is named in quotes is started as a program. The runtime stays with the board's package, as the launcher does.
STARTED = re.compile(r'"(edgefleet_agent\.[a-z_.]+)"')
PROGRAMS = sorted(
    {
        program
        for path in PACKAGE.glob("*.py")
        if path.name not in ("launcher.py", "rehearsal.py")
        for program in STARTED.findall(path.read_text())
    }
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    (made / "trust").mkdir(parents=True)
    (made / "trust/root.json").write_bytes(b"{}")
    board_settings.write(made, Settings(device="d", device_class="c", site="", broker_host="broker", broker_port=1))
    return made


def rehearse(state: Path, code: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])
    program = "import sys; from edgefleet_agent.rehearsal import rehearse; print(rehearse(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", program, str(state)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_a_version_that_is_whole_comes_through(state: Path, tmp_path: Path) -> None:
    assert len(PROGRAMS) >= 9
    done = rehearse(state, tmp_path)
    assert done.stdout.strip() == edgefleet_agent.__version__, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_version_in_which_one_program_does_not_come_up_is_caught(state: Path, tmp_path: Path, program: str) -> None:
    code = tmp_path / "code"
    shutil.copytree(PACKAGE, code / "edgefleet_agent")
    broken = code / Path(*program.split(".")).with_suffix(".py")
    broken.write_text('raise ImportError("planted")\n')
    done = rehearse(state, code)
    assert done.returncode != 0
    assert "planted" in done.stderr
