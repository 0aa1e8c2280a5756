"""The runtime on sockets that somebody else holds, as systemd does: a restart of it refuses nobody."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import pytest
from edgefleet_agent.runtime.control import RuntimeClient, socket_path
from support.runtimes import Runtime, until

# What systemd does between fork and exec: descriptors from 3 on, LISTEN_PID the program's own.
STARTER = """
import os, sys
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[1])
os.execv(sys.executable, [sys.executable, "-m", "edgefleet_agent.runtime.app", *sys.argv[2:]])
"""


def listening(family: socket.AddressFamily, address: object) -> socket.socket:
    """A listening socket whose descriptor is out of the way of 3, 4, ..."""
    made = socket.socket(family, socket.SOCK_STREAM)
    made.bind(address)
    made.listen(16)
    moved = socket.socket(fileno=fcntl.fcntl(made.fileno(), fcntl.F_DUPFD_CLOEXEC, 40))
    made.close()
    return moved


@pytest.fixture
def start(tmp_path: Path):
    started: list[subprocess.Popen[bytes]] = []

    def begin(*held: socket.socket) -> subprocess.Popen[bytes]:
        def place() -> None:
            for number, one in enumerate(held):
                os.dup2(one.fileno(), 3 + number, inheritable=True)

        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", STARTER, str(len(held)), "--state", str(tmp_path / "state")],
                stdout=log, stderr=log, close_fds=False, preexec_fn=place,
            )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def live(connect: Callable[[], socket.socket]) -> dict[str, object]:
    connection = HTTPConnection("board")
    connection.sock = connect()
    connection.request("GET", "/v2")
    answer = connection.getresponse()
    assert answer.status == 200
    told: dict[str, object] = json.loads(answer.read())
    connection.close()
    return told


def test_a_client_that_connects_between_two_runtimes_waits_and_is_served(start, tmp_path):
    tcp, unix = listening(socket.AF_INET, ("127.0.0.1", 0)), listening(socket.AF_UNIX, str(tmp_path / "held.sock"))
    first = start(tcp, unix)

    def by_unix() -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(30)
        link.connect(str(tmp_path / "held.sock"))
        return link

    def by_tcp() -> socket.socket:
        return socket.create_connection(tcp.getsockname(), timeout=30)

    assert live(by_tcp) == live(by_unix)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 0
    early = by_tcp(), by_unix()  # nobody runs, nobody is refused, and the path is still there
    start(tcp, unix)
    for link in early:
        assert live(lambda link=link: link)
    # Its own default addresses are not bound beside what it was handed.
    assert not (tmp_path / "state" / "run" / "infer.sock").exists()
    tcp.close()
    unix.close()


def test_a_socket_that_other_machines_reach_is_refused(start, tmp_path):
    # Bound to every address, but nothing is sent through it.
    held = listening(socket.AF_INET, ("0.0.0.0", 0))
    assert start(held).wait(20) != 0
    assert "which is not loopback" in (tmp_path / "log").read_text()
    held.close()


def test_with_a_unix_socket_alone_no_port_is_opened(start, tmp_path):
    held = listening(socket.AF_UNIX, str(tmp_path / "held.sock"))
    process = start(held)
    client = RuntimeClient(socket_path(tmp_path / "state"))

    def up() -> bool:
        return process.poll() is None and socket_path(tmp_path / "state").exists() and client.ping().pid == process.pid

    until(up, what="the runtime listening")
    assert not (tmp_path / "state" / "run" / "http.addr").exists()
    held.close()


def test_without_systemd_it_binds_its_own(tmp_path):
    runtime = Runtime(tmp_path)
    try:
        runtime.start(ready=False)
        assert (tmp_path / "run" / "infer.sock").exists()
        assert runtime.get("/v2/health/live")[0] == 200
    finally:
        runtime.stop()
