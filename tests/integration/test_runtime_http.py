"""The Open Inference Protocol on the wire: Triton's own client unchanged, and clients that mean harm."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from edgefleet_agent.runtime.body_room import ROOM_BYTES
from edgefleet_agent.runtime.control import short_path
from edgefleet_agent.runtime.http import MAX_CONNECTIONS
from support import artifacts
from support.runtimes import Runtime, UnixConnection, infer_body, running, until
from tritonclient.utils import InferenceServerException

X = np.random.default_rng(7).random((1, 8, 8, 3), np.float32)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with running(tmp_path_factory.mktemp("board")) as made:
        made.install(made.add("1"))
        made.start()
        yield made


@pytest.fixture
def client(runtime: Runtime) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient("{}:{}".format(*runtime.address))
    yield made
    made.close()


def triton_input(x: np.ndarray, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return tensor


# --- Triton's client, unchanged


def test_tritonclient_finds_the_server_live_ready_and_described(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("toy")
    assert client.is_model_ready("toy", "1")
    assert not client.is_model_ready("toy", "9")
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("toy")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 8, 8, 3]}]
    assert metadata["versions"] == ["1"]
    assert client.get_model_repository_index() == [{"name": "toy", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_infers_in_every_encoding(
    client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None, compression: str | None
) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer(
        "toy",
        [triton_input(X, binary_in)],
        outputs=outputs,
        request_id="r-1",
        query_params={"trace": 1},
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_allclose(result.as_numpy("y"), artifacts.truth(1, X), atol=1e-4)
    assert result.get_response()["id"] == "r-1"
    assert result.get_response()["model_version"] == "1"


def test_tritonclient_infers_batches_pinned_versions_and_asynchronously(client: triton.InferenceServerClient) -> None:
    batch = np.repeat(X, 7, axis=0)
    result = client.infer("toy", [triton_input(batch)], model_version="1")
    np.testing.assert_allclose(result.as_numpy("y"), artifacts.truth(1, batch), atol=1e-4)
    pending = [client.async_infer("toy", [triton_input(X)]) for _ in range(5)]
    for request in pending:
        np.testing.assert_allclose(request.get_result().as_numpy("y"), artifacts.truth(1, X), atol=1e-4)


def test_tritonclient_reads_statistics_that_count_its_requests(client: triton.InferenceServerClient) -> None:
    before = client.get_inference_statistics("toy")["model_stats"][0]["inference_count"]
    for _ in range(3):
        client.infer("toy", [triton_input(X)])
    (stats,) = client.get_inference_statistics("toy", "1")["model_stats"]
    assert stats["inference_count"] == before + 3
    assert stats["inference_stats"]["compute_infer"]["ns"] > 0


def test_tritonclient_learns_from_the_configuration_whether_it_may_send_batches(
    client: triton.InferenceServerClient,
) -> None:
    told = client.get_model_config("toy", "1")
    assert (told["name"], told["backend"], told["max_batch_size"]) == ("toy", "onnxruntime", 16)
    assert told["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [8, 8, 3]}]
    assert told["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [5]}]


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (lambda c: c.load_model("toy"), "agent alone decides"),
        (lambda c: c.unload_model("toy"), "agent alone decides"),
        (lambda c: c.get_trace_settings("toy"), "no tracing"),
        (lambda c: c.get_trace_settings(), "no tracing"),
        (lambda c: c.update_trace_settings("toy", {}), "no tracing"),
        (lambda c: c.get_log_settings(), "no log settings"),
        (lambda c: c.update_log_settings({}), "no log settings"),
        (lambda c: c.register_cuda_shared_memory("r", b"AAAA", 0, 64), "use system shared memory"),
        (lambda c: c.get_model_config("other"), "not served here"),
    ],
)
def test_tritonclient_is_told_what_is_not_served(client: triton.InferenceServerClient, ask: Any, why: str) -> None:
    with pytest.raises(InferenceServerException, match=why):
        ask(client)


def test_tritonclient_is_told_what_it_did_wrong(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="not served here"):
        client.infer("other", [triton_input(X)])
    with pytest.raises(InferenceServerException, match="not served here"):
        client.infer("toy", [triton_input(X)], model_version="77")
    with pytest.raises(InferenceServerException, match="has shape"):
        client.infer("toy", [triton_input(np.zeros((1, 4, 4, 3), np.float32))])


# --- the same over the Unix socket, and metrics


def test_the_unix_socket_speaks_the_same_protocol(runtime: Runtime) -> None:
    connection = UnixConnection(runtime.state / "run" / "infer.sock")
    for _ in range(3):
        connection.request("POST", "/v2/models/toy/infer", infer_body(X))
        answer = json.loads(connection.getresponse().read())
        np.testing.assert_allclose(answer["outputs"][0]["data"], artifacts.truth(1, X).ravel(), atol=1e-4)
    connection.close()
    assert (runtime.state / "run" / "infer.sock").stat().st_mode & 0o777 == 0o660


def test_metrics_are_prometheus_text_with_counters_by_version(runtime: Runtime) -> None:
    runtime.infer(X)
    status, text = runtime.get("/metrics")
    assert status == 200
    line = next(row for row in text.decode().splitlines() if row.startswith("edgefleet_runtime_requests_total"))
    assert line.startswith('edgefleet_runtime_requests_total{model="toy",version="1"} ')
    assert int(line.split()[-1]) > 0


# --- hostile and clumsy clients


def talk(runtime: Runtime, *pieces: bytes) -> bytes:
    """Send raw bytes, close our sending side, and return all that comes back."""
    with runtime.connect() as link:
        for piece in pieces:
            link.sendall(piece)
        link.shutdown(socket.SHUT_WR)
        received = b""
        while piece := link.recv(65536):
            received += piece
    return received


def post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [
        "POST /v2/models/toy/infer HTTP/1.1",
        "Host: board",
        f"Content-Length: {len(body) if length is None else length}",
    ]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def still_serves(runtime: Runtime) -> None:
    status, answer = runtime.infer(X)
    assert status == 200
    np.testing.assert_allclose(answer["outputs"][0]["data"], artifacts.truth(1, X).ravel(), atol=1e-4)


RAW = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b"HTTP/1.1 400"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 400"),
    "negative length": (post(b"", length=-1), b"HTTP/1.1 400"),
    "two lengths": (b"POST /v2/models/toy/infer HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", b"HTTP/1.1 400"),
    "length and chunks": (b"POST /v2/models/toy/infer HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"HTTP/1.1 400"),
    "a bad chunk": (b"POST /v2/models/toy/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"HTTP/1.1 400"),
    "a body of a terabyte": (post(b"", length=1 << 40), b"HTTP/1.1 413"),
    "a length of 4000 digits": (b"POST /v2 HTTP/1.1\r\nContent-Length: " + b"9" * 4000 + b"\r\n\r\n", b"HTTP/1.1 4"),
    "an endless URL": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 414"),
    "endless headers": (b"GET /v2 HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"v" * 1000) for i in range(50)) + b"\r\n", b"HTTP/1.1 431"),
    "CONNECT": (b"CONNECT example:443 HTTP/1.1\r\nHost: example\r\n\r\n", b"HTTP/1.1 404"),
    "a gzip that is none": (post(b"hello", "Content-Encoding: gzip"), b"HTTP/1.1 400"),
    "a gzip cut off": (post(gzip.compress(infer_body(X))[:-9], "Content-Encoding: gzip"), b"HTTP/1.1 400"),
    "an unknown encoding": (post(b"hello", "Content-Encoding: br"), b"HTTP/1.1 415"),
    "an empty body": (post(b""), b"HTTP/1.1 400"),
    "a lying header length": (post(infer_body(X), "Inference-Header-Content-Length: 99999999"), b"HTTP/1.1 400"),
    "a path outside": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: b\r\n\r\n", b"HTTP/1.1 404"),
    "the wrong method": (b"GET /v2/models/toy/infer HTTP/1.1\r\nHost: b\r\n\r\n", b"HTTP/1.1 405"),
    "loading over HTTP": (b"POST /v2/repository/models/toy/unload HTTP/1.1\r\nHost: b\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 404"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_a_hostile_request_gets_a_clear_refusal_and_the_next_client_its_answer(runtime: Runtime, case: str) -> None:
    sent, expected = RAW[case]
    answer = talk(runtime, sent)
    assert answer.startswith(expected), answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    still_serves(runtime)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /v2/health/ready HTTP/1.0\n\n",
        b"GET /v2/health/ready HTTP/1.1\r\nHost: board\n\r\n",
        b"GET /v2/health/ready HTTP/1.1\r\nHost: board\r\n\n",
    ],
)
def test_a_client_whose_lines_do_not_end_as_lines_do_is_told_so_at_once(runtime: Runtime, sent: bytes) -> None:
    with runtime.connect() as link:  # whose limit is less than the time that a request may take to arrive
        link.sendall(sent)
        assert link.recv(4096).startswith(b"HTTP/1.1 400")


def test_an_offer_to_upgrade_is_ignored_and_the_connection_goes_on(runtime: Runtime) -> None:
    offer = b"GET /v2 HTTP/1.1\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert talk(runtime, offer + post(infer_body(X)) + offer).count(b"HTTP/1.1 200") == 3


def test_a_client_of_http_1_0_that_keeps_its_connection_is_told_that_it_may(runtime: Runtime) -> None:
    """Else it waits for the end of the connection, as ``ab -k`` does."""
    ask = b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    heads = [part.lower() for part in talk(runtime, ask + ask).split(b"HTTP/1.1 200 OK")[1:]]
    assert len(heads) == 2
    assert b"\r\nconnection: keep-alive\r\n" in heads[0]
    (plain,) = talk(runtime, b"GET /v2 HTTP/1.0\r\n\r\n").split(b"HTTP/1.1 200 OK")[1:]
    assert b"\r\nconnection: close\r\n" in plain.lower()


def test_a_client_that_believes_a_proxy_between_us_is_answered(runtime: Runtime) -> None:
    for url in (b"http://board:8000/v2/models/toy?x=1", b"HTTP://127.0.0.1/v2/models/toy"):
        assert b'"name":"toy"' in talk(runtime, b"GET " + url + b" HTTP/1.1\r\nHost: board\r\n\r\n")


def test_bodies_that_are_small_only_while_they_are_packed_do_not_fill_the_memory(tmp_path: Path) -> None:
    count = 60_000  # 46 MB: a batch that waits for a slot, and is then told that it fits none
    tensor = {
        "name": "x", "datatype": "FP32", "shape": [count, 8, 8, 3], "parameters": {"binary_data_size": count * 768},
    }  # fmt: skip
    header = json.dumps({"inputs": [tensor]}).encode()
    packed = post(
        gzip.compress(header + bytes(count * 768), 1), "Content-Encoding: gzip",
        f"Inference-Header-Content-Length: {len(header)}",
    )  # fmt: skip
    with running(tmp_path) as runtime:
        # Its worker is stopped for a while, which must not count as hanging.
        runtime.install(runtime.add("1", contract=artifacts.make_contract(latency_p95_ms=5000.0)))
        runtime.start()
        worker = runtime.version("1").pid
        os.kill(worker, signal.SIGSTOP)
        links = []
        for sent in [post(infer_body(X))] * 6 + [packed] * 8:
            links.append(runtime.connect())
            links[-1].sendall(sent)
        refused = links[-1].recv(4096)
        memory_bytes = runtime.status().memory_bytes
        os.kill(worker, signal.SIGCONT)
        assert refused.startswith(b"HTTP/1.1 503"), refused
        assert memory_bytes < 450 << 20
        answers = [link.recv(65536)[:12] for link in links[:-1]]
        assert set(answers[:6]) == {b"HTTP/1.1 200"}
        assert set(answers[6:]) <= {b"HTTP/1.1 413", b"HTTP/1.1 503"}
        until(lambda: runtime.gauge("held_body_bytes") == 0, what="the memory given back")
        still_serves(runtime)
        for link in links:
            link.close()


def test_bodies_that_are_only_announced_take_no_memory(runtime: Runtime) -> None:
    """Twenty heads of a hundred bytes took 1.1 GB."""
    before = runtime.status().memory_bytes
    links = [runtime.connect() for _ in range(20)]
    try:
        for link in links:
            link.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\nx")
        until(lambda: runtime.gauge("held_body_bytes") == len(links), what="their beginnings being there")
        assert runtime.status().memory_bytes < before + (16 << 20)
    finally:
        for link in links:
            link.close()


def test_bodies_of_a_megabyte_count_once_they_are_announced(runtime: Runtime) -> None:
    before = runtime.status().memory_bytes
    links = [runtime.connect() for _ in range(400)]
    try:
        for link in links:
            link.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\nx")
        until(lambda: runtime.gauge("held_body_bytes") > ROOM_BYTES - (2 << 20), what="all room being announced")
        assert runtime.gauge("held_body_bytes") <= ROOM_BYTES
        assert runtime.status().memory_bytes < before + ROOM_BYTES * 1.2
        assert links[-1].recv(4096).startswith(b"HTTP/1.1 503")
    finally:
        for link in links:
            link.close()
    until(lambda: runtime.gauge("held_body_bytes") == 0, what="the memory given back")


def test_clients_that_send_what_is_large_by_the_dozen_keep_nobody_out_who_asks_for_little(runtime: Runtime) -> None:
    room = ROOM_BYTES
    links = [runtime.connect() for _ in range(5)]
    try:
        for link, total in zip(links, (room // 5,) * 4 + (room - room // 5 * 4,), strict=True):
            link.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (total + 1))
            for begin in range(0, total, 1 << 20):
                link.sendall(b"x" * min(1 << 20, total - begin))
        until(lambda: runtime.gauge("held_body_bytes") == room, what="all room being taken")
        assert runtime.infer(X)[0] == 200
        assert talk(runtime, post(b"x" * (1 << 20))).startswith(b"HTTP/1.1 503")
    finally:
        for link in links:
            link.close()
    until(lambda: runtime.gauge("held_body_bytes") == 0, what="the memory given back")


def test_packed_bodies_that_come_all_at_once_take_little_while_they_wait_for_their_turn(tmp_path: Path) -> None:
    packed = post(gzip.compress(bytes(5 << 18))[:-8], "Content-Encoding: gzip")  # cut off: each is refused at its turn
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        front = runtime.status().pid
        status = Path(f"/proc/{front}/status")
        links = [runtime.connect() for _ in range(150)]
        before = runtime.status().memory_bytes
        os.kill(front, signal.SIGSTOP)
        try:
            for link in links:
                link.sendall(packed)
        finally:
            os.kill(front, signal.SIGCONT)
        assert {link.recv(65536)[:12] for link in links} == {b"HTTP/1.1 400"}
        highest = int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
        assert highest * 1024 - before < 60 << 20  # a megabyte of each was unpacked at once
        for link in links:
            link.close()


def test_a_small_body_that_unpacks_to_gigabytes_is_refused(runtime: Runtime) -> None:
    machine = zlib.compressobj(9)
    bomb = b"".join(machine.compress(bytes(1 << 20)) for _ in range(100)) + machine.flush()
    assert talk(runtime, post(bomb, "Content-Encoding: deflate")).startswith(b"HTTP/1.1 413")
    still_serves(runtime)


def test_a_chunked_body_larger_than_allowed_is_cut_off_while_it_comes(runtime: Runtime) -> None:
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with runtime.connect() as link:
        link.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = b""
        try:
            for _ in range(80):
                link.sendall(chunk)
            answer = link.recv(4096)
        except OSError:
            pass  # the server closed while we were still pushing: refused all the same
        assert not answer or answer.startswith(b"HTTP/1.1 413")
    still_serves(runtime)


def test_pipelined_requests_are_answered_in_their_order(runtime: Runtime) -> None:
    batch = b"".join(post(infer_body(X, id=str(i))) for i in range(40))
    batch += b"GET /v2 HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = talk(runtime, batch)
    ids = [json.loads(part)["id"] for part in _bodies(answer)[:40]]
    assert ids == [str(i) for i in range(40)]


def _bodies(stream: bytes) -> list[bytes]:
    found = []
    while stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        length = int(next(h for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")).split(b":")[1])
        found.append(rest[:length])
        stream = rest[length:]
    return found


def test_a_bad_request_behind_good_ones_does_not_cost_their_answers(runtime: Runtime) -> None:
    answer = talk(runtime, post(infer_body(X)) * 3 + b"rubbish\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 3


def test_clients_that_vanish_in_the_middle_cost_nothing(runtime: Runtime) -> None:
    whole = post(infer_body(X))
    for cut in (1, 20, len(whole) // 2, len(whole) - 1, len(whole)):
        link = runtime.connect()
        link.sendall(whole[:cut])
        # A reset instead of a goodbye.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.close()
    still_serves(runtime)

    def held() -> Any:
        text = runtime.get("/metrics")[1].decode()
        return "edgefleet_runtime_held_body_bytes 0" in text

    until(held, what="the bodies being let go")


def test_idle_connections_do_not_keep_others_out(runtime: Runtime) -> None:
    idle = [runtime.connect() for _ in range(50)]
    still_serves(runtime)
    for link in idle:
        link.close()


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_a_crowd_that_comes_at_once_while_the_board_is_busy_is_let_in(
    tmp_path: Path, family: socket.AddressFamily
) -> None:
    """A Unix socket whose queue is full refuses whoever does not want to wait, and TCP lets them try again after a second."""
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        assert runtime.process is not None
        runtime.process.send_signal(signal.SIGSTOP)
        crowd = [socket.socket(family, socket.SOCK_STREAM) for _ in range(400)]
        try:
            for link in crowd:
                link.settimeout(0.5)
                if family == socket.AF_UNIX:
                    with short_path(tmp_path / "run" / "infer.sock") as address:
                        link.setblocking(False)
                        link.connect(address)
                else:
                    link.connect(runtime.address)
        finally:
            runtime.process.send_signal(signal.SIGCONT)
        for link in crowd:
            link.settimeout(20)
            link.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: board\r\n\r\n")
        assert all(link.recv(4096).startswith(b"HTTP/1.1 200") for link in crowd)
        for link in crowd:
            link.close()


def test_programs_that_forget_their_connections_do_not_keep_others_out(runtime: Runtime) -> None:
    forgotten = [runtime.connect() for _ in range(MAX_CONNECTIONS)]
    try:
        # Those that are silent for a while go, the oldest first, and only as many as are needed.
        until(lambda: runtime.get("/v2/health/live")[0] == 200, what="another one being let in")
        for number in range(5):
            assert runtime.infer(X)[0] == 200, number
        ask = b"GET /v2/health/live HTTP/1.1\r\nHost: b\r\n\r\n"
        forgotten[-1].sendall(ask)
        assert forgotten[-1].recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        for link in forgotten:
            link.close()
    until(lambda: runtime.gauge("connections") < 10, what="all of them gone")


def test_expect_100_continue_is_answered_before_the_body(runtime: Runtime) -> None:
    body = infer_body(X)
    with runtime.connect() as link:
        link.sendall(post(b"", "Expect: 100-continue", length=len(body)))
        assert link.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        link.sendall(body)
        assert link.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_request_larger_than_one_slot_is_told_the_limit(runtime: Runtime) -> None:
    status, answer = runtime.infer(np.zeros((2000, 8, 8, 3), np.float32))
    assert status == 413
    assert "one request may have" in answer["error"]
    still_serves(runtime)


def test_random_bytes_and_torn_requests_never_stop_the_server(runtime: Runtime) -> None:
    random = np.random.default_rng(11)
    whole = post(infer_body(X), "Inference-Header-Content-Length: 120")
    for _ in range(150):
        torn = bytearray(whole[: random.integers(1, len(whole))])
        for position in random.integers(0, len(torn), 5):
            torn[position] = random.integers(0, 256)
        with runtime.connect() as link:
            link.sendall(bytes(torn))
            link.shutdown(socket.SHUT_WR)
    still_serves(runtime)
    assert runtime.version("1").crashes == 0


# --- the program's own door


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--http", "0.0.0.0:8000"], "not loopback"),
        (["--http", "eight thousand"], "HOST:PORT"),
        (["--http", "127.0.0.1:99999"], "HOST:PORT"),
    ],
)
def test_an_address_that_others_could_reach_or_that_is_none_is_refused(
    tmp_path: Path, options: list[str], words: str
) -> None:
    with running(tmp_path) as runtime, pytest.raises(AssertionError, match=words):
        runtime.start(*options)


def test_a_port_that_is_taken_is_said_so(tmp_path: Path) -> None:
    with socket.socket() as taken, running(tmp_path) as runtime:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AssertionError, match="can't listen at"):
            runtime.start("--http", f"127.0.0.1:{taken.getsockname()[1]}")


def test_sockets_that_systemd_holds_outlive_a_restart_of_the_runtime(tmp_path: Path) -> None:
    port, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    with port, unix, running(tmp_path) as runtime:
        unix.bind(f"\0edgefleet-held-{os.getpid()}")
        unix.listen()
        runtime.install(runtime.add("1"))
        for _ in range(2):
            runtime.start("--http", "127.0.0.1:9", held=(port, unix))
            assert runtime.address == port.getsockname()
            assert runtime.infer(X)[0] == 200
            runtime.stop(signal.SIGKILL)
            with socket.create_connection(port.getsockname(), timeout=5):
                pass  # the backlog takes a client while nobody runs


def test_it_tells_the_service_manager_that_it_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    name = f"\0edgefleet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, running(tmp_path) as runtime:
        manager.bind(name)
        manager.settimeout(20)
        environment = {"NOTIFY_SOCKET": "@" + name[1:], "WATCHDOG_USEC": "1000000"}
        runtime.start(ready=False, env=environment)
        heard = [manager.recv(1024)]
        assert heard[0].startswith(b"READY=1\nSTATUS=listening at")
        heard.append(manager.recv(1024))
        heard.append(manager.recv(1024))
        assert heard[1:] == [b"WATCHDOG=1", b"WATCHDOG=1"]
        runtime.stop()
        while heard[-1] == b"WATCHDOG=1":
            heard.append(manager.recv(1024))
        assert heard[-1] == b"STOPPING=1"
