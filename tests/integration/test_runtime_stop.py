"""What a runtime that is told to stop does with the clients it has: none loses a request that it was let in with."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import artifacts, hostile
from support.runtimes import Runtime, infer_body, running, until

X = np.random.default_rng(7).random((1, 8, 8, 3), np.float32)
GET = b"GET /v2/models/toy HTTP/1.1\r\nHost: board\r\n\r\n"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        made.install(made.add("1"))
        yield made.start()


def answer(link: socket.socket) -> http.client.HTTPResponse:
    """The next answer, its body in it still; what it says about the connection is in its headers."""
    got = http.client.HTTPResponse(link)
    got.begin()
    return got


def told_to_stop(runtime: Runtime) -> None:
    assert runtime.process is not None
    runtime.process.send_signal(signal.SIGTERM)
    log = runtime.state / "runtime.log"
    until(lambda: '"stopping"' in log.read_text(), what="it has heard of it")


def test_a_client_that_was_let_in_and_has_not_spoken_yet_is_heard(runtime: Runtime) -> None:
    with socket.create_connection(runtime.address, timeout=10) as link:
        until(lambda: runtime.gauge("connections") == 1 + 1, what="it was let in")
        told_to_stop(runtime)
        link.sendall(GET)
        got = answer(link)
        assert (got.status, got.getheader("Connection")) == (200, "close")
        got.read()
        assert link.recv(1) == b""
    assert runtime.process is not None
    assert runtime.process.wait(5) == 0


def test_a_client_that_kept_its_connection_is_told_with_the_next_answer(runtime: Runtime) -> None:
    with socket.create_connection(runtime.address, timeout=10) as link:
        for last in (False, True):
            if last:
                told_to_stop(runtime)
            link.sendall(GET)
            got = answer(link)
            assert (got.status, got.getheader("Connection")) == (200, "close" if last else None)
            got.read()


def test_a_request_whose_body_is_coming_is_answered(runtime: Runtime) -> None:
    body = infer_body(X)
    head = f"POST /v2/models/toy/infer HTTP/1.1\r\nHost: board\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(runtime.address, timeout=10) as link:
        link.sendall(head + body[:200])
        until(lambda: runtime.gauge("held_body_bytes") > 0, what="a part of it is there")
        told_to_stop(runtime)
        for at in range(200, len(body), 1000):
            link.sendall(body[at : at + 1000])
            time.sleep(0.1)  # a slow line: the whole takes longer than the last call
        got = answer(link)
        assert (got.status, got.getheader("Connection")) == (200, "close")


def test_every_request_of_a_pipeline_is_answered_and_the_last_says_goodbye(runtime: Runtime) -> None:
    with socket.create_connection(runtime.address, timeout=10) as link:
        until(lambda: runtime.gauge("connections") == 1 + 1, what="it was let in")
        told_to_stop(runtime)
        link.sendall(GET * 5)
        told = []
        with link.makefile("rb") as stream:
            for _ in range(5):
                got = http.client.HTTPResponse(_Stream(stream))
                got.begin()
                got.read()
                told.append(got.getheader("Connection"))
            assert stream.read(1) == b""
    assert told == [None] * 4 + ["close"]


class _Stream:
    """A stream that several answers follow each other in, for http.client, which takes one of each socket."""

    def __init__(self, stream: object) -> None:
        self.stream = stream

    def makefile(self, mode: str) -> object:
        return self

    def __getattr__(self, name: str) -> object:
        return (lambda: None) if name in ("close", "flush") else getattr(self.stream, name)


def test_a_runtime_that_has_nothing_to_serve_answers_what_it_can_and_ends(tmp_path: Path) -> None:
    with running(tmp_path) as made:
        made.install(made.add("1", content=b"no model at all"))
        made.start(ready=False)
        with made.connect() as waiting, made.connect() as silent:
            body = infer_body(X)
            head = f"POST /v2/models/toy/infer HTTP/1.1\r\nHost: board\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            waiting.sendall(head + body)
            until(lambda: made.gauge("waiting_requests") == 1, what="it waits for a model")
            began = time.monotonic()
            told_to_stop(made)
            silent.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: board\r\n\r\n")
            assert answer(silent).status == 200
            assert answer(waiting).status == 503
        assert made.process is not None
        assert made.process.wait(5) == 0
        assert time.monotonic() - began < 5


def test_silent_clients_do_not_hold_it_up(runtime: Runtime) -> None:
    links = [socket.create_connection(runtime.address, timeout=10) for _ in range(20)]
    try:
        for link in links[:10]:
            link.sendall(GET)
            answer(link).read()
        began = time.monotonic()
        assert runtime.stop() == 0
        assert time.monotonic() - began < 2
    finally:
        for link in links:
            link.close()


def test_no_new_client_loses_a_request_over_restarts(tmp_path: Path) -> None:
    """A client that connects anew for each request, as most do, and that does not ask twice."""
    port, failed, asked, stop = socket.create_server(("127.0.0.1", 0)), [], [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection(*port.getsockname(), timeout=30)
            try:
                connection.connect()
                time.sleep(0.002 * (len(asked) % 3))  # not every client speaks as soon as it may
                connection.request("GET", "/v2/models/toy/ready")
                connection.getresponse().read()
                asked.append(1)
            except (OSError, http.client.HTTPException) as exc:
                failed.append(repr(exc))
            finally:
                connection.close()

    with port, running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start("--http", "127.0.0.1:9", held=(port,))
        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            for _ in range(8):
                enough = len(asked) + 20
                until(lambda enough=enough: len(asked) >= enough, what="requests are under way")
                assert runtime.stop() == 0
                runtime.start("--http", "127.0.0.1:9", held=(port,))
        finally:
            stop.set()
            for client in clients:
                client.join()
    assert failed == []
    assert len(asked) > 100


def test_a_request_that_is_being_computed_is_answered_when_all_processes_are_told_to_stop(tmp_path: Path) -> None:
    """As systemd tells a whole unit, and a terminal, a container or a supervisor a whole group."""
    picture = np.zeros((1, 8, 8, 3), np.float32)
    picture[0, 0, 0, 0] = 1.0
    with running(tmp_path / "state") as runtime, ThreadPoolExecutor(1) as pool:
        slow = hostile.model(1, "linger")
        runtime.install(runtime.add("1", engine="hostile", contract=artifacts.make_contract(), content=slow))
        runtime.start(env=hostile.install(tmp_path / "engine"))
        worker = runtime.version("1").pid
        spawner = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        asked = pool.submit(runtime.infer, picture)
        until(lambda: runtime.version("1").in_flight, what="it being computed")
        assert runtime.process is not None
        for pid in (worker, spawner, runtime.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert asked.result(20)[0] == 200
        assert runtime.process.wait(5) == 0
        assert "worker_ended" not in (runtime.state / "runtime.log").read_text()
