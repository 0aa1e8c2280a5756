"""The second way of transport: chunks by HTTPS ranges, when the broker brings none."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from edgefleet_agent import fetch_http
from edgefleet_agent.fetch_http import fetch_chunks
from edgefleet_controller.demo.boards import Board
from edgefleet_shared.artifact import Layout, digest_of, parse_manifest
from edgefleet_shared.errors import TransportError
from support.broker import TestBroker
from support.fleet import Fleet, manifests, write

CONTENT = bytes(range(256)) * 40
CHUNK_BYTES = 4096


def test_a_board_whom_the_broker_brings_no_chunk_gets_the_artifact_by_https(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    folder = manifests(tmp_path / "manifests")
    board = Board("lonely", "pc", tmp_path / "board")
    try:
        # At one byte a second the blob sender is worth nothing; the HTTPS API has no such pace.
        fleet.start(EDGEFLEET_BLOB_BYTES_PER_S="1")
        fleet.json("apply", "-f", str(folder))
        fleet.json("model", "add", "-f", str(folder / "model-1.yaml"))
        (artifact,) = fleet.json("model", "compile", "toy", "1", "--class", "pc")["artifacts"]
        token = fleet.client().token("pc", site="lab", device=board.name)
        board.enroll(f"https://127.0.0.1:{fleet.api_port}", token)
        board.start()
        spec = {
            "model": "toy", "version": "1", "soak_s": 1.0, "timeout_s": 120.0, "reach_window_s": 60.0,
            "selector": {"devices": [board.name]}, "waves": [{"name": "all", "percent": 100}],
        }  # fmt: skip
        fleet.json("rollout", "create", "-f", str(write(tmp_path / "r.yaml", "Rollout", "far", spec)))
        done = fleet.run("rollout", "watch", "far", "--timeout", "120", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        shown = fleet.json("device", "show", board.name)
        assert shown["version"] == "1"
        layout = Layout(fleet.home / "artifacts")
        layers = sum(blob.size for blob in parse_manifest(layout.read(artifact["manifest"], 1 << 20)).layers)
        status = fleet.client().status()
        assert status["blob_bytes"] < layers, "the broker brought it after all"
        assert status["sent_bytes"] > layers
    finally:
        board.stop()
        fleet.close()


# Chunk numbers, where the received chunks go, whether they are wanted still, and whose certificates the board trusts.
Fetch = Callable[..., None]
Answer = Callable[[BaseHTTPRequestHandler, int, int], None]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[Answer], Fetch]]:
    """Give it how a server with a certificate of the fleet answers a range; get what a board that fetches chunks receives."""
    pki = TestBroker(tmp_path)
    running: list[ThreadingHTTPServer] = []

    def begin(answer: Answer) -> Fetch:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                answer(self, int(first), int(last))

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki.ca.folder / "server.pem", pki.ca.folder / "server.key")
        context.load_verify_locations(pki.ca.folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)

        def fetch(
            numbers: list[int],
            taken: dict[int, bytes],
            wanted: Callable[[], bool] = lambda: True,
            *,
            trusts: TestBroker = pki,
        ) -> None:
            fetch_chunks(
                trusts.endpoint("board"), "127.0.0.1", server.server_port, digest_of(CONTENT), len(CONTENT), CHUNK_BYTES,
                numbers, lambda digest, number, piece: taken.update({number: piece}), wanted,
            )  # fmt: skip

        return fetch

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


def reply(to: BaseHTTPRequestHandler, status: int, body: bytes, length: int | None = None) -> None:
    to.send_response(status)
    to.send_header("Content-Length", str(len(body) if length is None else length))
    to.end_headers()
    to.wfile.write(body)


def sent_away(to: BaseHTTPRequestHandler) -> None:
    to.send_response(302)
    to.send_header("Location", "https://portal.example/")
    to.send_header("Content-Length", "0")
    to.end_headers()


def honest(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
    reply(to, 206, CONTENT[first : last + 1])


def test_only_the_missing_chunks_are_asked_for_and_the_last_one_is_shorter(served) -> None:
    asked = []

    def noted(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        asked.append((first, last))
        honest(to, first, last)

    taken: dict[int, bytes] = {}
    served(noted)([0, 2], taken)
    assert taken == {0: CONTENT[:4096], 2: CONTENT[8192:]}
    assert asked == [(0, 4095), (8192, len(CONTENT) - 1)]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda to, first, last: reply(to, 200, CONTENT), id="ranges are ignored"),
        pytest.param(lambda to, first, last: reply(to, 206, CONTENT), id="more than was asked for"),
        pytest.param(lambda to, first, last: reply(to, 206, CONTENT[first:last]), id="a byte too few"),
        pytest.param(lambda to, first, last: reply(to, 206, b"x", length=4096), id="cut in the middle"),
        pytest.param(lambda to, first, last: reply(to, 200, b"<html>Log in</html>"), id="a page to log in"),
        pytest.param(lambda to, first, last: reply(to, 200, CONTENT[first : last + 1]), id="its length by chance"),
        pytest.param(lambda to, first, last: sent_away(to), id="sent to another host"),
        pytest.param(lambda to, first, last: reply(to, 206, gzip.compress(CONTENT[first : last + 1])), id="packed"),
        pytest.param(lambda to, first, last: reply(to, 403, json.dumps({"code": "refused"}).encode()), id="refused"),
        pytest.param(lambda to, first, last: to.wfile.write(b"\x00\xff\r\n\r\n"), id="no HTTP"),
        pytest.param(lambda to, first, last: None, id="hangs up"),
    ],
)
def test_an_answer_that_is_not_the_range_ends_the_fetch_and_keeps_what_came_before(served, answer) -> None:
    def then_bad(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        (honest if first == 0 else answer)(to, first, last)
        to.close_connection = first != 0

    taken: dict[int, bytes] = {}
    with pytest.raises(TransportError):
        served(then_bad)([0, 1, 2], taken)
    assert taken == {0: CONTENT[:4096]}


def test_what_is_not_wanted_any_more_is_left_also_by_a_controller_that_drips(tmp_path: Path, served) -> None:
    asked: list[int] = []
    hung_up = threading.Event()

    def drip(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        asked.append(first)
        if first == 0:
            honest(to, first, last)
            return
        to.send_response(206)
        to.send_header("Content-Length", str(last - first + 1))
        to.end_headers()
        with suppress(OSError):
            while not hung_up.wait(0.05):
                to.wfile.write(b"x")
        to.close_connection = True

    wanted = iter([True, True, True, True, False])
    taken: dict[int, bytes] = {}
    try:
        served(drip)([0, 1, 2], taken, lambda: next(wanted, False))
    finally:
        hung_up.set()
    assert taken == {0: CONTENT[:4096]}
    assert 8192 not in asked


@pytest.fixture
def patience() -> Iterator[threading.Event]:
    """Set when what drips has done so for long enough."""
    over = threading.Event()
    timer = threading.Timer(10.0, over.set)
    timer.start()
    yield over
    timer.cancel()
    over.set()


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(b"HTTP/1.1 206 Partial Content\r\nX: ", id="head"),
        pytest.param(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4096\r\n\r\n", id="body"),
    ],
)
def test_an_answer_that_drips_is_not_waited_for_without_end(
    served, begun: bytes, patience: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_http, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(fetch_http, "WINDOW_S", 0.5)

    def drip(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        to.wfile.write(begun)
        with suppress(OSError):
            while not patience.wait(0.05):
                to.wfile.write(b"x")
        to.close_connection = True

    with pytest.raises(TransportError):
        served(drip)([0], {})
    assert not patience.is_set()


def test_a_handshake_that_drips_is_not_waited_for_without_end(
    tmp_path: Path, patience: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_http, "TIMEOUT_S", 0.5)
    pki = TestBroker(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            link, _ = listener.accept()
            with link, suppress(OSError):
                link.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB
                while not patience.wait(0.05):
                    link.sendall(b"x")

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(TransportError):
            fetch_chunks(
                pki.endpoint("board"), "127.0.0.1", listener.getsockname()[1], digest_of(CONTENT), len(CONTENT),
                CHUNK_BYTES, [0], lambda *_: None,
            )  # fmt: skip
    assert not patience.is_set()


def test_a_line_that_is_slow_gets_its_chunks(served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "WINDOW_S", 0.2)
    monkeypatch.setattr(fetch_http, "LEAST_BYTES", 64)

    def trickle(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        to.send_response(206)
        to.send_header("Content-Length", str(last - first + 1))
        to.end_headers()
        for at in range(first, last + 1, 128):
            to.wfile.write(CONTENT[at : min(at + 128, last + 1)])
            threading.Event().wait(0.03)

    taken: dict[int, bytes] = {}
    served(trickle)([0], taken)
    assert taken == {0: CONTENT[:4096]}


def test_a_line_that_is_cut_again_and_again_goes_on_where_it_was_cut(served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "LEAST_BYTES", 256)
    asked: list[int] = []

    def cut(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        asked.append(first)
        reply(to, 206, CONTENT[first : min(first + 1500, last + 1)], length=last - first + 1)
        to.close_connection = True

    taken: dict[int, bytes] = {}
    served(cut)([1, 2], taken)
    assert taken == {1: CONTENT[4096:8192], 2: CONTENT[8192:]}
    assert asked == [4096, 5596, 7096, 8192, 9692]


def test_a_line_that_is_cut_between_two_chunks_is_made_anew(served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "LEAST_BYTES", 256)

    def hang_up_after(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        honest(to, first, last)
        to.close_connection = True

    taken: dict[int, bytes] = {}
    served(hang_up_after)([0, 2], taken)
    assert taken == {0: CONTENT[:4096], 2: CONTENT[8192:]}


def test_a_line_that_is_cut_before_it_brought_much_is_left(served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "LEAST_BYTES", 256)
    asked: list[int] = []

    def cut(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        asked.append(first)
        reply(to, 206, CONTENT[first : first + (1500 if first == 4096 else 200)], length=last - first + 1)
        to.close_connection = True

    taken: dict[int, bytes] = {}
    with pytest.raises(TransportError, match="can't fetch from"):
        served(cut)([1], taken)
    assert (taken, asked) == ({}, [4096, 5596])


def test_a_piece_that_is_no_range_is_not_taken_after_a_cut(served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "LEAST_BYTES", 256)

    def cut(to: BaseHTTPRequestHandler, first: int, last: int) -> None:
        if first == 4096:
            reply(to, 206, CONTENT[first : first + 1500], length=last - first + 1)
        else:
            reply(to, 200, CONTENT)
        to.close_connection = True

    taken: dict[int, bytes] = {}
    with pytest.raises(TransportError, match="answered 200"):
        served(cut)([1], taken)
    assert taken == {}


def test_whoever_has_no_certificate_of_the_fleet_is_not_asked(tmp_path: Path, served) -> None:
    """A captive portal answers every name, by a certificate of its own."""
    asked: list[int] = []
    fetch = served(lambda to, first, last: asked.append(first))
    with pytest.raises(TransportError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch([0], {}, trusts=TestBroker(tmp_path / "another"))
    assert asked == []


def test_a_controller_that_is_not_there_is_a_transport_error(tmp_path: Path) -> None:
    pki = TestBroker(tmp_path)
    with pytest.raises(TransportError, match="can't fetch from"):
        fetch_chunks(
            pki.endpoint("board"), "127.0.0.1", 1, digest_of(CONTENT), len(CONTENT), CHUNK_BYTES, [0], lambda *_: None
        )
