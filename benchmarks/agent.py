"""``make bench-agent``: what the resident agent costs a board, idle and during updates of a small and a large model, beside Mender's client.

The agent is the real one, installed as on a board (the board's lock and no more), under the real broker of the tests' controller. Memory is what the kernel says is resident (VmRSS), and
beside it what is the process's own share (PSS: pages that it shares with the runtime count by half). Mender's client is Debian's
package, unpacked beside the build and run with a server that is not there, as a board without a line would; where this machine has
no apt, its row says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path

from frame import Row, finish

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the controller that is worked by hand, and artifacts of any size

from support import artifacts  # noqa: E402
from support.controller import Board, Controller  # noqa: E402

SIZES = (4_000_000, 100_000_000)
SETTLED_S = 6.0
SAMPLE_S = 0.01
EXPOSED = (("fleet-agent", 1.5), ("fleet-runtime", 0.6))
MIB = 1024.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-agent-") as folder:
        rows = memory(Path(folder))
    rows += exposure()
    finish("agent", rows)


def memory(folder: Path) -> list[Row]:
    controller = Controller(folder / "controller")
    board = Board(controller, "board", folder / "board", environment()).start()
    assert board.agent is not None
    mender = Mender(folder / "mender")
    try:
        first = artifacts.make_artifact(controller.layout, version="1", seed=1, device_class=controller.device_class)
        update(controller, board.name, first, "1")
        time.sleep(SETTLED_S)
        idle, share, peer = resident(board.agent.pid), proportional(board.agent.pid), mender.resident()
        rows = [
            Row("agent, idle, resident", idle, "MiB", 24.0, mender.name, peer),
            Row("agent, idle, its share (PSS)", share, "MiB"),
        ]
        for number, size in enumerate(SIZES, 2):
            before = resident(board.agent.pid)
            large = artifacts.make_artifact(
                controller.layout, version=str(number), seed=number, device_class=controller.device_class,
                content=artifacts.onnx_model(number, padding_bytes=size),
            )  # fmt: skip
            with Peak(board.agent.pid) as peak:
                update(controller, board.name, large, str(number))
            rows.append(
                Row(f"agent, peak above idle, update of {size // 1_000_000} MB", peak.most - before, "MiB", 8.0)
            )
        return rows
    finally:
        mender.stop()
        board.stop()
        controller.stop()


def environment() -> str:
    """The interpreter of an environment that holds what a board with onnxruntime has."""
    where = ROOT / "build" / "board"
    shutil.rmtree(where, ignore_errors=True)
    venv.create(where, with_pip=False)
    (site,) = where.glob("lib/python*/site-packages")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"--target={site}",
        "--no-deps",
    ]
    subprocess.run([*pip, "--require-hashes", "-r", ROOT / "requirements" / "agent-onnxruntime.txt"], check=True)
    subprocess.run([*pip, "--no-build-isolation", ROOT / "shared", ROOT / "agent"], check=True)
    return str(where / "bin" / "python")


def update(controller: Controller, device: str, manifest: object, version: str) -> None:
    controller.release(manifest, "toy", version)
    assignment = controller.assign(device, manifest, version)
    outcome = controller.outcome(device, assignment, timeout_s=180.0)
    if outcome.value != "succeeded":
        raise SystemExit(f"the update ended {outcome.value}: {controller.reason(device)}")


def resident(pid: int) -> float:
    """MiB, by the kernel's count."""
    return _field(Path(f"/proc/{pid}/status"), "VmRSS")


def proportional(pid: int) -> float:
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def _field(path: Path, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / MIB


class Peak:
    """The most that a process held while the block ran."""

    def __init__(self, pid: int) -> None:
        self._pid, self.most = pid, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.most = max(self.most, resident(self._pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Mender:
    """Mender's client as Debian packages it, running without a server."""

    def __init__(self, folder: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.name = "Mender's client: not to be had here"
        cache = ROOT / "build" / "peers"
        binary = cache / "mender" / "usr" / "bin" / "mender"
        if not binary.exists() and not self._fetch(cache, binary):
            return
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "device_type").write_text("device_type=bench\n")
        (folder / "mender.conf").write_text('{"ServerURL": "https://127.0.0.1:1", "UpdatePollIntervalSeconds": 5}\n')
        self._process = subprocess.Popen(
            [binary, "--config", folder / "mender.conf", "--data", folder / "data", "--no-syslog", "daemon"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.name = "Mender's client, idle"

    @staticmethod
    def _fetch(cache: Path, binary: Path) -> bool:
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            return False
        cache.mkdir(parents=True, exist_ok=True)
        got = subprocess.run(["apt-get", "download", "-qq", "mender-client"], cwd=cache, capture_output=True)
        packages = sorted(cache.glob("mender-client_*.deb"))
        if got.returncode or not packages:
            return False
        subprocess.run(["dpkg-deb", "--extract", packages[-1], cache / "mender"], check=True)
        return binary.exists()

    def resident(self) -> float | None:
        if self._process is None or self._process.poll() is not None:
            return None
        return resident(self._process.pid)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def exposure() -> list[Row]:
    """What ``systemd-analyze security`` says of the units; 0 is nothing exposed, 10 everything."""
    if shutil.which("systemd-analyze") is None:
        return []
    rows = []
    units = ROOT / "agent" / "edgefleet_agent" / "systemd"
    for name, goal in EXPOSED:
        told = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", units / f"{name}.service"],
            capture_output=True, text=True, env=os.environ | {"SYSTEMD_COLORS": "0"},
        ).stdout  # fmt: skip
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
        if found is not None:
            rows.append(Row(f"exposure of {name}.service", float(found[1]), "of 10", goal))
    return rows


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
