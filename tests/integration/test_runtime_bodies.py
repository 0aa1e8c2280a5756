"""Bodies that are read straight into shared memory: torn, slow, abandoned, overtaken by a swap or by a dying worker."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import artifacts
from support.runtimes import Load, Runtime, infer_body, running, until

BATCH = np.random.default_rng(3).random((16, 8, 8, 3), np.float32)  # 12 KiB: more than the first read of a request


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        made.install(made.add("1"))
        yield made.start()


def binary_request(x: np.ndarray, path: str = "/v2/models/toy/infer", **fields: object) -> bytes:
    """A whole HTTP request whose tensor is binary, wanting its answer in binary too."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **fields}).encode()
    lines = [
        f"POST {path} HTTP/1.1", "Host: board", f"Inference-Header-Content-Length: {len(header)}",
        f"Content-Length: {len(header) + x.nbytes}", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + header + x.tobytes()


class Talker:
    """One kept-alive connection, whole answers out of it."""

    def __init__(self, runtime: Runtime) -> None:
        self.link = runtime.connect()
        self._file = self.link.makefile("rb")

    def answer(self) -> tuple[int, bytes, int]:
        """(status, body, length of its JSON header)."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = self._file.read(int(headers["content-length"]))
        return status, body, int(headers.get("inference-header-content-length", len(body)))

    def judged(self, x: np.ndarray, version: str = "1") -> None:
        """The answer is that version's, and right."""
        status, body, length = self.answer()
        assert status == 200, body
        header = json.loads(body[:length])
        assert header["model_version"] == version
        values = np.frombuffer(body[length:], np.float32).reshape(len(x), -1)
        np.testing.assert_allclose(values, artifacts.truth(int(version), x), atol=1e-4)


def test_the_same_head_with_other_pictures_gets_other_answers(runtime: Runtime) -> None:
    talker = Talker(runtime)
    for seed in range(20):
        x = np.random.default_rng(seed).random(BATCH.shape, np.float32)
        talker.link.sendall(binary_request(x))
        talker.judged(x)


def test_heads_and_shapes_that_change_on_one_connection_are_each_understood(runtime: Runtime) -> None:
    talker = Talker(runtime)
    for rows in (16, 1, 3, 16, 30, 1):
        x = np.random.default_rng(rows).random((rows, 8, 8, 3), np.float32)
        talker.link.sendall(binary_request(x, id=f"rows-{rows}"))
        talker.judged(x)


@pytest.mark.parametrize("piece", [1, 7, 300, 2048, 5000])
def test_a_request_torn_anywhere_is_put_together(runtime: Runtime, piece: int) -> None:
    talker, whole = Talker(runtime), binary_request(BATCH)
    for at in range(0, len(whole), piece):
        talker.link.sendall(whole[at : at + piece])
    talker.judged(BATCH)


def test_pipelined_binary_requests_are_answered_in_order(runtime: Runtime) -> None:
    talker = Talker(runtime)
    pictures = [np.random.default_rng(n).random(BATCH.shape, np.float32) for n in range(12)]
    talker.link.sendall(b"".join(binary_request(x) for x in pictures))
    for x in pictures:
        talker.judged(x)


def test_clients_that_stall_with_half_a_picture_keep_nobody_out(runtime: Runtime) -> None:
    whole = binary_request(BATCH)
    stalled = [runtime.connect() for _ in range(30)]
    for link in stalled:
        link.sendall(whole[:6000])
    with Load(runtime) as load:
        load.seen("1", 50)
    assert load.failed == []
    assert load.wrong == 0
    for link in stalled:  # each is still answered once the rest comes
        link.sendall(whole[6000:])
    for link in stalled:
        assert link.recv(65536).startswith(b"HTTP/1.1 200")
        link.close()


def test_clients_that_vanish_while_their_picture_comes_give_the_memory_back(runtime: Runtime) -> None:
    whole = binary_request(BATCH)
    for _ in range(50):
        link = runtime.connect()
        link.sendall(whole[: len(whole) // 2])
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.close()
    until(lambda: b"edgefleet_runtime_held_body_bytes 0" in runtime.get("/metrics")[1], what="the bodies being let go")
    until(lambda: b"edgefleet_runtime_free_slots 6" in runtime.get("/metrics")[1], what="the slots being given back")
    talker = Talker(runtime)
    talker.link.sendall(whole)
    talker.judged(BATCH)


def test_a_picture_that_was_half_there_when_the_swap_came_is_answered_by_the_new_version(runtime: Runtime) -> None:
    talker, whole = Talker(runtime), binary_request(BATCH)
    talker.link.sendall(whole[:6000])
    until(lambda: b"edgefleet_runtime_free_slots 5" in runtime.get("/metrics")[1], what="the first half being there")
    old, new = runtime.status().serving, runtime.add("2")
    runtime.client.load(new)
    runtime.client.switch(new)
    runtime.client.retire(old or "")
    talker.link.sendall(whole[6000:])
    talker.judged(BATCH, "2")


def test_a_picture_that_was_half_there_when_its_worker_died_is_answered_by_the_next_worker(runtime: Runtime) -> None:
    talker, whole = Talker(runtime), binary_request(BATCH)
    talker.link.sendall(whole[:6000])
    until(lambda: b"edgefleet_runtime_free_slots 5" in runtime.get("/metrics")[1], what="the first half being there")
    os.kill(runtime.version("1").pid, signal.SIGKILL)
    until(lambda: runtime.version("1").crashes == 1, what="the crash being counted")
    talker.link.sendall(whole[6000:])
    talker.judged(BATCH)


def test_a_picture_read_into_a_workers_memory_outlives_that_worker(runtime: Runtime) -> None:
    """The first value kills version 2 while it computes; what it was asked is still there for the version before it."""
    bad = runtime.add("2", behaviour="poison")
    runtime.client.load(bad)
    runtime.client.switch(bad)
    poison = BATCH.copy()
    poison[0, 0, 0, 0] = 1.0
    talker = Talker(runtime)
    talker.link.sendall(binary_request(poison))
    talker.judged(poison, "1")
    assert runtime.version("2").crashes == 1


AWKWARD = {
    "bare line feeds": (b"GET /v2 HTTP/1.1\nHost: b\n\n\r\n\r\n", b"HTTP/1.1 400"),
    "a head inside a head": (b"POST /v2 HTTP/1.1\nContent-Length: 5\n\nhello\r\n\r\n", b"HTTP/1.1 400"),
    "an unknown transfer coding": (b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", b"HTTP/1.1 501"),
    "half a head": (b"GET /v2 HTT", b"HTTP/1.1 400"),
    "half a body": (binary_request(BATCH)[:-1], b"HTTP/1.1 400"),
    "an endless head": (b"GET /v2 HTTP/1.1\r\nX: " + b"v" * 100_000, b"HTTP/1.1 431"),
    "an endless target": (b"GET /" + b"v" * 100_000, b"HTTP/1.1 414"),
    "a header length of nonsense": (
        binary_request(BATCH).replace(b"Inference-Header-Content-Length: ", b"Inference-Header-Content-Length: x"), b"HTTP/1.1 400"
    ),
    "a header longer than any body": (
        binary_request(BATCH).replace(b"Inference-Header-Content-Length: ", b"Inference-Header-Content-Length: 99999"), b"HTTP/1.1 400"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AWKWARD)
def test_what_could_be_read_in_two_ways_is_refused(runtime: Runtime, case: str) -> None:
    sent, expected = AWKWARD[case]
    with runtime.connect() as link:
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        received = b""
        while piece := link.recv(65536):
            received += piece
    assert received.startswith(expected), received[:200]
    assert received.count(b"HTTP/1.1 ") == 1


def test_empty_lines_before_a_request_are_skipped(runtime: Runtime) -> None:
    talker = Talker(runtime)
    for _ in range(2):
        talker.link.sendall(b"\r\n\r\n" + binary_request(BATCH) + b"\r\n")
        talker.judged(BATCH)


def test_a_chunked_body_is_taken_and_what_is_pipelined_behind_it_must_be_sent_again(runtime: Runtime) -> None:
    head, _, body = binary_request(BATCH).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 999]), body[i : i + 999]) for i in range(0, len(body), 999))
    request = b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n" + chunks + b"0\r\n\r\n"
    talker = Talker(runtime)
    for _ in range(2):
        talker.link.sendall(request)
        talker.judged(BATCH)
    talker.link.sendall(request + b"GET /v2 HTTP/1.1\r\nHost: b\r\n\r\n")
    talker.judged(BATCH)
    assert talker.link.recv(100) == b""


def test_head_gets_no_body(runtime: Runtime) -> None:
    with runtime.connect() as link:
        link.sendall(b"HEAD /v2 HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n")
        received = b""
        while piece := link.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 200")
    assert received.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("length", ["\xb2", "\xb2\xb3", "-5", "1e2", "99999999999999", "0x10", ""])
def test_a_header_length_that_is_none_is_refused_and_the_connection_goes_on(runtime: Runtime, length: str) -> None:
    talker, whole = Talker(runtime), binary_request(BATCH)
    said = whole.split(b"Inference-Header-Content-Length: ")[1].split(b"\r\n")[0]
    talker.link.sendall(whole.replace(said, length.encode("latin-1"), 1))
    status, body, _ = talker.answer()
    assert status == 400, body
    talker.link.sendall(whole)
    talker.judged(BATCH)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"inputs": []}, 400),
        ({"outputs": [{"name": "nothing"}]}, 400),
        ({"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}]}, 400),
        ({"parameters": 7}, 400),
    ],
)
def test_what_is_wrong_in_a_header_is_told_when_its_body_has_come(
    runtime: Runtime, fields: dict[str, object], status: int
) -> None:
    talker = Talker(runtime)
    talker.link.sendall(binary_request(BATCH, **fields))
    assert talker.answer()[0] == status
    talker.link.sendall(binary_request(BATCH))
    talker.judged(BATCH)


def test_a_body_that_is_longer_or_shorter_than_its_tensor_is_refused(runtime: Runtime) -> None:
    talker, whole = Talker(runtime), binary_request(BATCH)
    said = whole.split(b"\r\nContent-Length: ")[1].split(b"\r\n")[0]
    for more in (8, -8):
        other = whole.replace(b"\r\nContent-Length: " + said, b"\r\nContent-Length: %d" % (int(said) + more), 1)
        talker.link.sendall(other + bytes(more) if more > 0 else other[:more])
        assert talker.answer()[0] == 400
    talker.link.sendall(whole)
    talker.judged(BATCH)


def test_others_are_answered_while_a_request_of_millions_of_numbers_is_understood(runtime: Runtime) -> None:
    """It takes tenths of a second of work, whatever comes of it; meanwhile whoever asks on has his turn many times."""
    rows = 15_000
    body = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 8, 8, 3], "data": [0] * (rows * 192)}]}
    )
    ended = threading.Event()
    answers: list[tuple[int, Any]] = []

    def ask() -> None:
        answers.append(runtime.ask("POST", "/v2/models/toy/infer", body.encode()))
        ended.set()

    with runtime.connect() as link:
        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: runtime.gauge("held_body_bytes") >= len(body), what="the body being there")
        served = 0
        while not ended.is_set():
            link.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: b\r\n\r\n")
            assert link.recv(4096).startswith(b"HTTP/1.1 200")
            served += 1
        asking.join()
    assert answers[0][0] == 413  # too large for the toy's slots, which is found last
    assert served > 50


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_others_are_answered_while_a_small_body_is_unpacked_that_is_a_large_one(
    runtime: Runtime, encoding: str
) -> None:
    rows = 80_000
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 8, 8, 3], "parameters": {"binary_data_size": rows * 768}}
    header = json.dumps({"inputs": [tensor]}).encode()
    packed = (gzip.compress if encoding == "gzip" else zlib.compress)(header + bytes(rows * 768))
    fields = {"Content-Encoding": encoding, "Inference-Header-Content-Length": str(len(header))}
    served = 0
    with runtime.connect() as link, ThreadPoolExecutor(1) as pool:
        ask = b"GET /v2/health/live HTTP/1.1\r\nHost: b\r\n\r\n"
        link.sendall(ask)
        assert link.recv(4096).startswith(b"HTTP/1.1 200")
        asked = pool.submit(runtime.ask, "POST", "/v2/models/toy/infer", packed, fields)
        while not asked.done():
            link.sendall(ask)
            assert link.recv(4096).startswith(b"HTTP/1.1 200")
            served += 1
        status, answer = asked.result()
    assert (status, "one request may have" in answer["error"]) == (
        413,
        True,
    )  # too large for the toy's slots, which is found last
    assert served > 40


@pytest.mark.parametrize("more", [b"garbage", gzip.compress(b"}")], ids=["garbage", "another member"])
def test_a_packed_body_with_something_behind_it_is_refused_and_not_half_read(runtime: Runtime, more: bytes) -> None:
    body = gzip.compress(infer_body(np.zeros((1, 8, 8, 3), np.float32))) + more
    status, answer = runtime.ask("POST", "/v2/models/toy/infer", body, {"Content-Encoding": "gzip"})
    assert (status, "follow the gzip body" in answer["error"]) == (400, True)


def test_the_runtime_says_where_it_listens(runtime: Runtime) -> None:
    (line,) = [line for line in (runtime.state / "runtime.log").read_text().splitlines() if '"listening"' in line]
    assert json.loads(line)["addresses"] == [
        "http://{}:{}".format(*runtime.address),
        str(runtime.state / "run" / "infer.sock"),
    ]
