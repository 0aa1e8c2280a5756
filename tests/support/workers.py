"""Workers as processes of their own, and as hand-driven clients that may lie; and a controller that leaves all work to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from edgefleet_shared.work_client import WorkClient

from support.broker import until
from support.fleet import FLEET, Fleet, device_class

AGENT = (sys.executable, "-m", "edgefleet_agent.cli")
CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))

LEASE_S = 3.0
CLASS = device_class("pc", precision="int8", search={"effort": "fixed", "prefer": "size"})


def serve(fleet: Fleet) -> None:
    fleet.start(EDGEFLEET_COMPILE_WORKERS="0", EDGEFLEET_WORK_LEASE_S=str(LEASE_S))


def apply(fleet: Fleet, manifest: dict[str, Any]) -> None:
    path = fleet.folder / f"{manifest['metadata']['name']}.yaml"
    path.write_text(yaml.safe_dump(manifest))
    fleet.json("apply", "-f", str(path))


def ended(fleet: Fleet, job: str, within_s: float = 120.0) -> dict[str, Any]:
    until(lambda: fleet.client().job(job)["state"] not in ("queued", "running"), f"job {job} has ended", within_s)
    found: dict[str, Any] = fleet.client().job(job)
    return found


def on_board(name: str, **spec: Any) -> dict[str, Any]:
    return device_class(
        name, precision="int8", measure_on="builder", search={"effort": "fixed", "prefer": "size"}, **spec
    )


def own_cache(folder: Path) -> Path:
    """A cache in which nothing was compiled yet, with the toolchains that are installed here."""
    folder.mkdir(parents=True)
    (CACHE / "toolchains").mkdir(parents=True, exist_ok=True)
    (folder / "toolchains").symlink_to(CACHE / "toolchains")
    return folder


class Process:
    """A worker or a builder board, started by its command."""

    def __init__(self, command: list[str], log_file: Path, **environment: str) -> None:
        self.log_file = log_file
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment
            )

    def until_ready(self) -> Process:
        until(lambda: "ready" in self.log() or self.process.poll() is not None, f"it is ready, see {self.log_file}", 60)
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        return self.log_file.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(120)


@contextmanager
def starting() -> Iterator[Callable[[Process], Process]]:
    """What keeps processes that were started, and ends them at the end."""
    running: list[Process] = []

    def start(process: Process) -> Process:
        running.append(process)
        return process

    try:
        yield start
    finally:
        for process in running:
            process.end(signal.SIGKILL)


def worker(fleet: Fleet, name: str) -> Process:
    """``fleet worker run`` on what is another machine but for its processor: no home, folder and cache of its own. The controller has heard of it."""
    folder = fleet.folder / name
    token = fleet.run("worker", "token", "--name", name).stdout.strip()
    url = f"https://127.0.0.1:{fleet.api_port}"
    command = [*FLEET, "worker", "run", "--controller", url, "--token", token, "--folder", str(folder)]
    cache = own_cache(fleet.folder / f"{name}-cache")
    environment = {"EDGEFLEET_CACHE": str(cache), "EDGEFLEET_HOME": "/nonexistent"}
    process = Process(command, fleet.folder / f"{name}.log", **environment).until_ready()
    until(
        lambda: any(w["name"] == name and w["last_seen"] for w in fleet.json("worker", "list")),
        f"{name} has asked for work",
    )
    return process


def builder(fleet: Fleet, name: str, device_class: str) -> Process:
    """``fleet-agent measure`` on a board of a class, enrolled by command."""
    state = fleet.folder / name
    token = fleet.run("worker", "token", "--name", name, "--class", device_class).stdout.strip()
    url = f"https://127.0.0.1:{fleet.api_port}"
    enrolled = subprocess.run(
        [*AGENT, "enroll", "--state", str(state), "--url", url, "--token", token],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert enrolled.returncode == 0, enrolled.stderr
    return Process([*AGENT, "measure", "--state", str(state)], fleet.folder / f"{name}.log").until_ready()


def client(fleet: Fleet, name: str, device_class: str = "") -> WorkClient:
    """A worker that a test drives by hand."""
    folder = fleet.folder / name
    folder.mkdir()
    answer, key = fleet.enroll(fleet.client().token(device_class, device=name, role="worker"))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    for file, content in (("ca.pem", told["ca"].encode()), ("w.pem", told["certificate"].encode()), ("w.key", key)):
        (folder / file).write_bytes(content)
    return WorkClient(
        "127.0.0.1", fleet.api_port, ca=folder / "ca.pem", certificate=folder / "w.pem", key=folder / "w.key"
    )
