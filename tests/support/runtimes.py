"""A real ``fleet-runtime`` process for tests, and a steady stream of real requests against it."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from edgefleet_agent import slots
from edgefleet_agent.runtime.control import RuntimeClient, StatusReport, socket_path
from edgefleet_agent.slots import Slot, Slots, SlotStatus
from edgefleet_shared.errors import EdgefleetError

from support import artifacts


def until(condition: Callable[[], Any], limit_s: float = 20.0, what: str = "the condition") -> Any:
    """The first truthy value of ``condition``; fails after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come true within {limit_s} s")


_HAND_OVER = """
import os, sys
copies = [int(fd) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(copies, 3):
    os.dup2(fd, number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(copies))}
os.execv(sys.argv[2], sys.argv[2:])
"""


def start_holding(held: tuple[socket.socket, ...], command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a process with listening sockets as systemd would: descriptors from 3 on, and the pid that only the new process knows."""
    # Out of the way of 3 and up, where the new process will have them.
    copies = [fcntl.fcntl(s.fileno(), fcntl.F_DUPFD, 64) for s in held]
    if held:
        command = [sys.executable, "-c", _HAND_OVER, ",".join(map(str, copies)), *command]
    try:
        return subprocess.Popen(command, pass_fds=copies, **options)
    finally:
        for copy in copies:
            os.close(copy)


class Runtime:
    """A state folder and the ``fleet-runtime`` process on it.

    Args:
        state: the agent's state folder; made when missing.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.layout = slots.artifacts(state)
        self.client = RuntimeClient(socket_path(state))
        self.process: subprocess.Popen[bytes] | None = None

    def add(self, version: str, **options: Any) -> str:
        """Build the toy artifact of ``version`` (seed = its number) into the state; its manifest's digest."""
        options.setdefault("seed", int(version))
        return artifacts.make_artifact(self.layout, version=version, **options).digest

    def install(self, active: str | None, previous: str | None = None) -> None:
        """Write the slots as a board would have them."""

        def slot(digest: str | None) -> Slot | None:
            return None if digest is None else Slot(digest, "toy", "?", SlotStatus.GOOD)

        slots.write(self.state, Slots(active=slot(active), previous=slot(previous)))

    def start(
        self,
        *options: str,
        ready: bool = True,
        env: dict[str, str] | None = None,
        held: tuple[socket.socket, ...] = (),
    ) -> Runtime:
        """Start the process.

        Args:
            ready: wait until it serves, not only listens.
            held: listening sockets to hand over as systemd would.
        """
        command = [sys.executable, "-m", "edgefleet_agent.runtime.app"]
        with (self.state / "runtime.log").open("ab") as log:
            self.process = start_holding(
                held, [*command, "--state", str(self.state), "--http", "127.0.0.1:0", *options],
                stdout=log, stderr=log, env=os.environ | (env or {}),
            )  # fmt: skip
        until(self._listens, what="the runtime listening")
        if ready:
            until(lambda: self.get("/v2/health/ready")[0] == 200, what="the runtime ready")
        return self

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the runtime ended: {(self.state / 'runtime.log').read_text()}")
        try:
            return self.client.ping().pid == self.process.pid
        except EdgefleetError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(15)
        finally:
            if self.process.poll() is None:
                self.process.kill()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = (self.state / "run" / "http.addr").read_text().strip().rpartition(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        """A raw connection to the TCP port."""
        link = socket.create_connection(self.address, timeout=10)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link

    def get(self, path: str) -> tuple[int, Any]:
        return self.ask("GET", path)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """One request on a connection of its own: (status, parsed JSON or text)."""
        connection = http.client.HTTPConnection(*self.address, timeout=90)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.getheader("Content-Type") == "application/json":
            return response.status, json.loads(content)
        return response.status, content

    def infer(self, x: np.ndarray, path: str = "/v2/models/toy/infer") -> tuple[int, Any]:
        return self.ask("POST", path, infer_body(x))

    def status(self) -> StatusReport:
        return self.client.status()

    def gauge(self, name: str) -> float:
        """A gauge of the whole runtime, from ``/metrics``; the question's own connection is counted where that matters."""
        text = self.get("/metrics")[1].decode()
        return float(
            next(line for line in text.splitlines() if line.startswith(f"edgefleet_runtime_{name} ")).split()[1]
        )

    def version(self, number: str) -> Any:
        return next(v for v in self.status().versions if v.version == number)


def infer_body(x: np.ndarray, **extra: Any) -> bytes:
    """A JSON infer request for the toy model."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor], **extra}).encode()


@contextmanager
def running(state: Path) -> Iterator[Runtime]:
    """A runtime that is surely gone afterwards."""
    runtime = Runtime(state)
    try:
        yield runtime
    finally:
        runtime.stop()


class Load:
    """Threads that send the toy model requests without a pause, over the Unix socket, and judge every answer.

    ``failed`` holds whatever was no 200; ``wrong`` counts answers whose numbers are not those of the version they name.
    """

    def __init__(self, runtime: Runtime, threads: int = 2, x: np.ndarray | None = None) -> None:
        self.answers: Counter[str] = Counter()
        self.failed: list[str] = []
        self.wrong = 0
        self.longest_s = 0.0
        self._runtime, self._halt = runtime, threading.Event()
        self._x = np.random.default_rng(5).random((1, 8, 8, 3), np.float32) if x is None else x
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        until(lambda: sum(self.answers.values()) >= 20, what="load running")
        return self

    def __exit__(self, *exc: object) -> None:
        self._halt.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a request was never answered"

    def seen(self, version: str, count: int = 20) -> None:
        """Wait until ``count`` more answers of ``version`` came."""
        target = self.answers[version] + count
        until(lambda: self.answers[version] >= target, what=f"{count} answers of version {version}")

    def _send(self) -> None:
        body = infer_body(self._x)
        connection = UnixConnection(self._runtime.state / "run" / "infer.sock")
        while not self._halt.is_set():
            began = time.monotonic()
            try:
                connection.request("POST", "/v2/models/toy/infer", body)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as exc:
                connection.close()
                with self._lock:
                    self.failed.append(repr(exc))
                continue
            with self._lock:
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                if response.status != 200:
                    self.failed.append(content.decode())
                    continue
                answer = json.loads(content)
                version = answer["model_version"]
                expected = artifacts.truth(int(version), self._x).ravel()
                self.wrong += not np.allclose(answer["outputs"][0]["data"], expected, atol=1e-3)
                self.answers[version] += 1


class UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket, however long its path."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=90)
        self._path = path

    def connect(self) -> None:
        from edgefleet_agent.runtime.control import short_path

        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(90)
        with short_path(self._path) as address:
            self.sock.connect(address)


@contextmanager
def gateway(
    runtime: Runtime, listen: str = "127.0.0.1:0", held: tuple[socket.socket, ...] = (), **options: Any
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``fleet-runtime-grpc`` before a runtime: where it listens, and its process. Arguments as of :func:`start_holding`."""
    process = start_holding(
        held,
        [sys.executable, "-m", "edgefleet_agent.runtime.grpc_gateway", "--state", str(runtime.state), "--listen", listen],
        stdout=subprocess.PIPE, text=True, **options,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout.readline().removeprefix("listening at ").strip(), process
    finally:
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGKILL)  # SIGKILL comes from tests only
