"""Sockets from systemd: a real child process gets real descriptors, as systemd passes them."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import textwrap

from edgefleet_agent.runtime import activation

# Does what systemd does between fork and exec: descriptors from 3 on, LISTEN_PID its own.
STARTER = """
import os, sys
count, *command = sys.argv[1:]
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=count)
os.execv(sys.executable, [sys.executable, *command])
"""
PROGRAM = """
import os
from edgefleet_agent.runtime import activation
from edgefleet_shared.errors import EnvironmentProblem
try:
    for taken in activation.inherited():
        peer, _ = taken.accept()
        peer.sendall(b"served")
        peer.close()
        print(taken.family.name, os.get_inheritable(taken.fileno()))
except EnvironmentProblem as exc:
    print("refused:", exc)
print("LISTEN_FDS" in os.environ)
"""


def run(sockets: list[socket.socket], count: str | None = None) -> subprocess.Popen[str]:
    def place() -> None:
        for number, one in enumerate(sockets):
            os.dup2(one.fileno(), 3 + number, inheritable=True)

    return subprocess.Popen(
        [sys.executable, "-c", STARTER, count or str(len(sockets)), "-c", textwrap.dedent(PROGRAM)],
        stdout=subprocess.PIPE,
        text=True,
        close_fds=False,
        preexec_fn=place,
    )


def high(kind: socket.AddressFamily, type_: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A socket whose descriptor is out of the way of 3, 4, ..."""
    made = socket.socket(kind, type_)
    moved = socket.socket(fileno=fcntl.fcntl(made.fileno(), fcntl.F_DUPFD_CLOEXEC, 40))
    made.close()
    return moved


def test_tcp_and_unix_sockets_are_taken_over_and_not_passed_on(tmp_path):
    tcp, unix = high(socket.AF_INET), high(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    unix.bind(str(tmp_path / "s"))
    for one in (tcp, unix):
        one.listen()
    # The clients connect before the program runs: they wait in the backlog.
    clients = [socket.create_connection(tcp.getsockname(), timeout=20), socket.socket(socket.AF_UNIX)]
    clients[1].settimeout(20)
    clients[1].connect(str(tmp_path / "s"))
    child = run([tcp, unix])
    assert [client.recv(10) for client in clients] == [b"served", b"served"]
    assert child.communicate(timeout=20)[0].split("\n")[:3] == ["AF_INET False", "AF_UNIX False", "False"]
    for one in (*clients, tcp, unix):
        one.close()


def test_a_socket_that_does_not_listen_is_refused():
    tcp = high(socket.AF_INET)
    tcp.bind(("127.0.0.1", 0))
    out, _ = run([tcp]).communicate(timeout=20)
    assert "descriptor 3 from systemd is no listening stream socket" in out
    tcp.close()


def test_a_malformed_count_is_refused():
    out, _ = run([], count="many").communicate(timeout=20)
    assert "refused: LISTEN_FDS is 'many'" in out


def test_variables_meant_for_another_process_are_ignored_and_removed():
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert activation.inherited(environment) == []
    assert environment == {"HOME": "/"}
