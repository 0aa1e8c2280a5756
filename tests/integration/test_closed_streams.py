"""Programs that are started without standard input, output and error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.broker import until

CLOSED = 'exec "$@" <&- >&- 2>&-'


def started(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", CLOSED, "sh", sys.executable, "-m", *command])


def targets(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)]


@pytest.mark.parametrize("program", ["runtime", "gateway"])
def test_it_stops_as_any_other(tmp_path: Path, program: str) -> None:
    state = str(tmp_path / "state")
    if program == "runtime":
        process = started("edgefleet_agent.runtime.app", "--state", state, "--http", "off")
        ready = tmp_path / "state/run/control.sock"
    else:
        ready = tmp_path / "grpc.sock"
        process = started("edgefleet_agent.runtime.grpc_gateway", "--state", state, "--listen", f"unix:{ready}")
    try:
        until(lambda: ready.exists() or process.poll() is not None, "it serves", 60)
        assert process.poll() is None
        assert targets(process.pid) == ["/dev/null"] * 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_the_launcher_becomes_the_agent_all_the_same(tmp_path: Path) -> None:
    script = "import os; from edgefleet_agent import launcher; os.execve = lambda *_: os._exit(42); launcher.main()"
    command = ["sh", "-c", CLOSED, "sh", sys.executable, "-c", script, "--state", str(tmp_path)]
    assert subprocess.run(command, timeout=60).returncode == 42
