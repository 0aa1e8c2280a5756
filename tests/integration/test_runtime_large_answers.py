"""Requests and answers of megabytes: clients that don't read theirs, or read slowly, cost nobody else an answer and the board no memory; and
where there is none, they are told."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from edgefleet_agent.runtime.body_room import ROOM_BYTES
from edgefleet_shared.contract import TensorSpec
from support import artifacts
from support.runtimes import Runtime, UnixConnection, running, until

WIDTH = 1_000_000
ANSWER_BYTES = WIDTH * 4
PATH = "/v2/models/toy/infer"


def wide(width: int) -> dict[str, Any]:
    """An artifact whose answer to one picture has so many values."""
    return {
        "content": artifacts.wide_model(width), "statistics": None,
        "inputs": (TensorSpec("x", "FP32", (-1, 4)),), "outputs": (TensorSpec("y", "FP32", (-1, width)),),
    }  # fmt: skip


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        made.install(made.add("1", **wide(WIDTH)))
        yield made.start()


def body(rows: int = 1, *, binary: bool = True) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "data": list(range(rows * 4))}
    return json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": binary}}).encode()


def request(content: bytes, *fields: str) -> bytes:
    head = [f"POST {PATH} HTTP/1.1", "Host: board", f"Content-Length: {len(content)}", *fields, "", ""]
    return "\r\n".join(head).encode() + content


def narrow(runtime: Runtime) -> socket.socket:
    """A connection whose kernel takes little that its program has not read."""
    link = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.settimeout(30)
    link.connect(runtime.address)
    return link


def resident_bytes(runtime: Runtime) -> int:
    return runtime.status().memory_bytes


def address_space_bytes(pid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmSize"].split()[0]) * 1024


def test_clients_that_never_read_their_answers_do_not_fill_the_memory_nor_keep_others_out(runtime: Runtime) -> None:
    before = resident_bytes(runtime)
    deaf = [narrow(runtime) for _ in range(2 * ROOM_BYTES // ANSWER_BYTES)]
    try:
        for link in deaf:
            link.sendall(request(body()))
        until(lambda: runtime.status().requests >= len(deaf), what="all of them being computed")
        until(lambda: runtime.ask("POST", PATH, body())[0] == 200, what="another client's large answer")
        assert resident_bytes(runtime) - before < ROOM_BYTES * 1.3
        # Each was told that there was no room, which is counted, or hung up on; this question's own connection is one more.
        assert runtime.status().failed or runtime.gauge("connections") <= len(deaf)
    finally:
        for link in deaf:
            link.close()
    until(lambda: resident_bytes(runtime) - before < ROOM_BYTES / 4, what="the memory being given back")


def test_others_have_their_turn_between_large_answers_that_come_faster_than_they_are_handed_on(
    runtime: Runtime,
) -> None:
    deaf = [narrow(runtime) for _ in range(ROOM_BYTES // ANSWER_BYTES - 10)]
    try:
        for link in deaf:
            link.sendall(request(body()))
        asking = UnixConnection(runtime.state / "run" / "infer.sock")
        served = held = 0
        while held < (len(deaf) - 1) * ANSWER_BYTES:
            asking.request("GET", "/metrics")
            text = asking.getresponse().read().decode()
            held = int(text.partition("\nedgefleet_runtime_held_answer_bytes ")[2].split()[0])
            served += 1
        asking.close()
    finally:
        for link in deaf:
            link.close()
    assert served > 15


def test_others_are_answered_while_millions_of_numbers_are_written_as_json(runtime: Runtime) -> None:
    ended = threading.Event()
    answers: list[tuple[int, Any]] = []

    def ask() -> None:
        answers.append(runtime.ask("POST", PATH, body(2, binary=False)))
        ended.set()

    asking = UnixConnection(runtime.state / "run" / "infer.sock")
    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: runtime.version("1").requests, what="it being computed")
    served = 0
    while not ended.is_set() and runtime.gauge("held_answer_bytes") == 0:
        asking.request("GET", "/v2/health/live")
        asking.getresponse().read()
        served += 1
    asking.close()
    thread.join()
    ((status, answer),) = answers
    (output,) = answer["outputs"]
    assert (status, output["shape"]) == (200, [2, WIDTH])
    assert output["data"] == [6.0] * WIDTH + [22.0] * WIDTH
    assert served > 20


def test_an_answer_that_would_be_too_large_as_json_is_refused_with_what_to_do(runtime: Runtime) -> None:
    status, answer = runtime.ask("POST", PATH, body(5, binary=False))
    assert (status, "ask for it in binary" in answer["error"]) == (400, True)
    assert runtime.ask("POST", PATH, body(5))[0] == 200


def test_a_client_whose_request_there_is_no_memory_for_is_told_so(runtime: Runtime) -> None:
    """It came, and then there was no memory left to understand it."""
    pid = runtime.status().pid
    long = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [5_000_000, 4], "data": [0] * 20_000_000}]}
    ).encode()
    _, most = resource.prlimit(pid, resource.RLIMIT_AS)
    with runtime.connect() as link:
        link.sendall(request(long)[:-1])
        until(lambda: runtime.gauge("held_body_bytes") == len(long) - 1, what="all but its end being there")
        resource.prlimit(pid, resource.RLIMIT_AS, (address_space_bytes(pid) + len(long) // 2, most))
        try:
            link.sendall(long[-1:])
            assert link.recv(4096).startswith(b"HTTP/1.1 503")
            assert runtime.ask("POST", PATH, body(0))[0] == 400
        finally:
            resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
        link.sendall(request(body()))
        assert link.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_whose_body_there_is_no_memory_for_is_told_so_while_it_comes(runtime: Runtime, chunked: bool) -> None:
    pid, size = runtime.status().pid, 48 << 20
    head = f"POST {PATH} HTTP/1.1\r\nHost: board\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {size}\r\n\r\n"
    _, most = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (address_space_bytes(pid) + size // 4, most))
    try:
        with runtime.connect() as link:
            link.sendall(head.encode())
            with suppress(ConnectionError):  # it need not listen to the end
                link.sendall((b"%x\r\n" % size if chunked else b"") + bytes(size))
            assert link.recv(4096).startswith(b"HTTP/1.1 503")
        assert runtime.gauge("held_body_bytes") == 0
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
    assert runtime.ask("POST", PATH, body())[0] == 200


def test_a_client_whose_answer_there_is_no_memory_for_is_told_so_and_its_worker_lives(runtime: Runtime) -> None:
    pid = runtime.status().pid
    _, most = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (address_space_bytes(pid) + ANSWER_BYTES, most))
    try:
        status, answer = runtime.ask("POST", PATH, body(8))
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
    assert (status, "no memory" in answer["error"]) == (503, True)
    assert runtime.ask("POST", PATH, body(8))[0] == 200
    assert (runtime.version("1").crashes, runtime.version("1").retried) == (0, 0)


def test_a_client_that_reads_slowly_gets_its_last_answer_to_the_last_byte(runtime: Runtime) -> None:
    with narrow(runtime) as link:
        link.sendall(request(body(4), "Connection: close"))
        response = http.client.HTTPResponse(link)
        response.begin()
        received = 0
        for _ in range(6):  # longer than a client is listened to that was hung up on
            received += len(response.read(ANSWER_BYTES // 3))
            time.sleep(0.5)
        received += len(response.read())
    header = int(response.getheader("Inference-Header-Content-Length", 0))
    assert (response.status, received - header) == (200, 4 * ANSWER_BYTES)


def test_a_batch_as_large_as_the_configuration_allows_is_answered_and_a_larger_one_is_its_clients_fault(
    runtime: Runtime,
) -> None:
    runtime.client.load(runtime.add("2", **wide(WIDTH * 2)))
    path = "/v2/models/toy/versions/2"
    most = runtime.ask("GET", f"{path}/config")[1]["max_batch_size"]
    assert most == 8
    assert runtime.ask("POST", f"{path}/infer", body(most))[0] == 200
    status, answer = runtime.ask("POST", f"{path}/infer", body(most + 1))
    assert (status, "does not fit" in answer["error"]) == (400, True)
    assert runtime.version("2").failed == 0
