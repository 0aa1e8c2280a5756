"""Versions of the agent for tests: this repository's own wheels, as they are or with one file changed; and a board with the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

from edgefleet_controller import agent_version
from edgefleet_shared.artifact import Descriptor
from edgefleet_shared.assignment import AGENT
from edgefleet_shared.messages import AgentReport
from edgefleet_shared.outcomes import Outcome

from support.broker import until
from support.controller import Board, Controller

ROOT = Path(__file__).resolve().parents[2]
RESTART_S = 0.1  # what systemd's RestartSec= is to the real unit


def wheels(folder: Path) -> list[Path]:
    """The wheels of edgefleet-agent and edgefleet-shared, built from this tree."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation",
         f"--wheel-dir={folder}", str(ROOT / "shared"), str(ROOT / "agent")],
        check=True,
    )  # fmt: skip
    return sorted(folder.glob("*.whl"))


def changed(
    sources: list[Path], folder: Path, version: str, file: str = "", old: str = "", new: str = "", metadata: str = ""
) -> list[Path]:
    """The same wheels as another version, with ``old`` in ``file`` replaced by ``new`` and lines added to the agent's METADATA."""
    folder.mkdir()
    made = []
    for source in sources:
        target = folder / source.name
        with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
            for entry in before.infolist():
                content = before.read(entry)
                if entry.filename == "edgefleet_agent/__init__.py":
                    content = content.replace(b'__version__ = "0.1.0"', f'__version__ = "{version}"'.encode())
                if entry.filename.endswith(".dist-info/METADATA"):
                    more = metadata if entry.filename.startswith("edgefleet_agent-") else ""
                    content = content.replace(b"\nVersion: 0.1.0\n", f"\nVersion: {version}\n{more}".encode())
                if file and entry.filename == file:
                    assert content.count(old.encode()) == 1, f"{old!r} is not once in {file}"
                    content = content.replace(old.encode(), new.encode())
                after.writestr(entry, content)
        made.append(target)
    return made


def release(controller: Controller, sources: list[Path]) -> Descriptor:
    """Build an agent's artifact for the controller's class and sign it."""
    (digest,) = agent_version.build(sources, [controller.device_class], controller.layout)
    manifest = controller.layout.manifest(digest)
    config = controller.layout.agent_config(manifest)
    made = Descriptor("", digest, controller.layout.path(digest).stat().st_size)
    controller.gateway.publish_metadata(
        controller.repository.publish(
            controller.signer.release(
                controller.need(f"class-{controller.device_class}.json"), device_class=controller.device_class,
                model=AGENT, version=config.version, manifest=made, requires=config.requires,
            )
        )
    )  # fmt: skip
    return made


class Kept:
    """The launcher on a state folder, started again whenever what it became has ended, as its unit has it."""

    def __init__(self, state: Path) -> None:
        self.state, self.starts = state, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True)
        self._thread.start()

    def _keep_up(self) -> None:
        while not self._ending.is_set():
            with (self.state / "agent.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "edgefleet_agent.launcher", "--state", str(self.state)],
                    stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
            self.starts += 1
            self._process.wait()
            self._ending.wait(RESTART_S)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """Of the launcher, and of the agent that it became."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        self._ending.set()
        while self._thread.is_alive():
            self.kill(signal.SIGTERM)
            self._thread.join(5)


class LaunchedBoard(Board):
    """A board whose agent is started by the launcher."""

    def start_agent(self) -> None:
        self._kept = Kept(self.state)

    @property
    def starts(self) -> int:
        """How many times the launcher was started."""
        return self._kept.starts

    @property
    def pid(self) -> int:
        """Of the agent."""
        return self._kept.pid

    def kill_agent(self, number: int = signal.SIGKILL) -> None:
        """It is started again at once."""
        self._kept.kill(number)

    def stop(self) -> None:
        self._kept.stop()
        if self.runtime.process is not None:
            self.runtime.stop()

    @property
    def told(self) -> AgentReport:
        """What the board says of its agent."""
        report = self.controller.reports.get(self.name)
        return (report.agent if report is not None else None) or AgentReport()

    def outcome(self, assignment: str, timeout_s: float = 120.0) -> Outcome:
        """Wait until the board tells how an assignment about its agent ended."""

        def ended() -> bool:
            return self.told.ended is not None and self.told.ended.assignment == assignment

        until(ended, f"{self.name} tells how {assignment} ended; {self.told}", timeout_s)
        assert self.told.ended is not None
        return self.told.ended.outcome

    def version(self) -> str:
        """The version that runs, as it says itself."""
        return self.controller.reports[self.name].agent_version
