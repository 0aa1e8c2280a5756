"""Answers of megabytes: clients that don't read theirs, or read slowly, cost nobody else an answer and the board no memory."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edgefleet_agent.runtime.untaken import MAX_UNTAKEN_BYTES
from edgefleet_shared.contract import TensorSpec
from support import artifacts
from support.runtimes import Runtime, UnixConnection, running, until

WIDTH = 1_000_000
ANSWER_BYTES = WIDTH * 4
PATH = "/v2/models/toy/infer"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        wide: dict[str, Any] = {
            "content": artifacts.wide_model(WIDTH), "statistics": None,
            "inputs": (TensorSpec("x", "FP32", (-1, 4)),), "outputs": (TensorSpec("y", "FP32", (-1, WIDTH)),),
        }  # fmt: skip
        made.install(made.add("1", **wide))
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


def test_clients_that_never_read_their_answers_do_not_fill_the_memory_nor_keep_others_out(runtime: Runtime) -> None:
    before = resident_bytes(runtime)
    deaf = [narrow(runtime) for _ in range(2 * MAX_UNTAKEN_BYTES // ANSWER_BYTES)]
    try:
        for link in deaf:
            link.sendall(request(body()))
        until(lambda: runtime.status().requests >= len(deaf), what="all of them being computed")
        until(lambda: runtime.ask("POST", PATH, body())[0] == 200, what="another client's large answer")
        assert resident_bytes(runtime) - before < MAX_UNTAKEN_BYTES * 1.3
        # Each was told that there was no room, which is counted, or hung up on; this question's own connection is one more.
        assert runtime.status().failed or runtime.gauge("connections") <= len(deaf)
    finally:
        for link in deaf:
            link.close()
    until(lambda: resident_bytes(runtime) - before < MAX_UNTAKEN_BYTES / 4, what="the memory being given back")


def test_others_have_their_turn_between_large_answers_that_come_faster_than_they_are_handed_on(
    runtime: Runtime,
) -> None:
    deaf = [narrow(runtime) for _ in range(MAX_UNTAKEN_BYTES // ANSWER_BYTES - 10)]
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
