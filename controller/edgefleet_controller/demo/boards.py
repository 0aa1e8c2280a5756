"""The demo's boards: receive an enrolment token, hand on real processes with an identity and a state folder of their own.

The agent is another distribution that the controller knows nothing of: it is started by its programs, as on a board.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from edgefleet_shared.errors import EnvironmentProblem

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


def program(name: str) -> str:
    """A program of the same installation.

    Raises:
        EnvironmentProblem: edgefleet-agent is not installed beside this program.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise EnvironmentProblem(f"{name} is not installed", hint="the demo's boards need edgefleet-agent: make setup")
    return found


class Board:
    """One board: ``fleet-runtime`` and ``fleet-agent`` as processes.

    Args:
        folder: the board's state folder.
    """

    def __init__(self, name: str, device_class: str, folder: Path) -> None:
        self.name, self.device_class, self.folder = name, device_class, folder
        self._agent: subprocess.Popen[bytes] | None = None
        self._runtime: subprocess.Popen[bytes] | None = None

    @property
    def infer_socket(self) -> Path:
        return self.folder / "run" / "infer.sock"

    def enroll(self, url: str, token: str) -> None:
        """Raises EnvironmentProblem with the program's own words."""
        done = subprocess.run(
            [program("fleet-agent"), "enroll", "--url", url, "--token", token, "--state", str(self.folder),
             "--health-period", "2"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise EnvironmentProblem(f"{self.name} could not be enrolled: {done.stderr.strip()}")

    def start(self) -> None:
        """Start both programs and return when the runtime listens."""
        self.launch()
        self.wait_until_listening()

    def launch(self) -> None:
        """Start both programs."""
        self._runtime = self._launch(
            "fleet-runtime", "--state", str(self.folder), "--http", "127.0.0.1:0", "--socket", str(self.infer_socket)
        )
        self.start_agent()

    def wait_until_listening(self) -> None:
        """Return when the runtime listens.

        Raises:
            EnvironmentProblem: it ended, or takes too long.
        """
        assert self._runtime is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.infer_socket.exists():
            if self._runtime.poll() is not None or time.monotonic() > deadline:
                raise EnvironmentProblem(f"{self.name}'s runtime does not start, see {self.folder}/fleet-runtime.log")
            time.sleep(0.05)

    def start_agent(self) -> None:
        self._agent = self._launch("fleet-agent", "run", "--state", str(self.folder))

    def cut_off(self) -> None:
        """Kill the agent as a power cut would; the runtime goes on serving."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()

    def stop(self) -> None:
        for process in (self._agent, self._runtime):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (self._agent, self._runtime):
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def _launch(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([program(name), *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
