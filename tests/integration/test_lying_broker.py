"""A broker that breaks the protocol: each time it costs the connection, never the thread that would make the next one, nor the memory."""

from __future__ import annotations

import socket
import ssl
import threading

import msgspec
import pytest
from edgefleet_shared.mqtt import Link
from support.broker import TestBroker, until

CONNACK = b"\x20\x03\x00\x00\x00"
HUGE_BYTES = 200 << 20
LIES = {
    "a connection acknowledged without a word": b"\x20\x00",
    "a publication whose topic is longer than itself": CONNACK + b"\x30\x04\xff\xff\x00\x00",
    "a publication with half a property": CONNACK + b"\x30\x06\x00\x01a\x02\x26\xff",
    "a publication whose topic is no text": CONNACK + b"\x30\x05\x00\x02\xff\xfe\x00",
    "a packet of no kind": CONNACK + b"\x00\x00",
    "a length without end": CONNACK + b"\x30\xff\xff\xff\xff\xff",
}


class LyingBroker:
    """Takes TLS connections and says one thing on each, then ``more`` zeros."""

    def __init__(self, broker: TestBroker, lie: bytes, more: int = 0) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(broker.ca.folder / "server.pem", broker.ca.folder / "server.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lie, self._more = lie, more
        self.connections = self.sent_bytes = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
                with self._context.wrap_socket(plain, server_side=True) as link:
                    link.settimeout(20)
                    link.recv(4096)
                    self.connections += 1
                    self._talk(link)
            except ssl.SSLError:
                continue
            except OSError:
                if self._listener.fileno() < 0:
                    return

    def _talk(self, link: ssl.SSLSocket) -> None:
        link.sendall(self._lie)
        for _ in range(self._more >> 20):
            link.sendall(bytes(1 << 20))
            self.sent_bytes += 1 << 20
        while link.recv(4096):
            pass

    def stop(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> TestBroker:
    return TestBroker(tmp_path_factory.mktemp("broker"))  # never started: it lends its certificates


@pytest.mark.parametrize("lie", LIES)
def test_whatever_a_broker_says_the_board_connects_again(broker: TestBroker, lie: str) -> None:
    liar = LyingBroker(broker, LIES[lie])
    endpoint = msgspec.structs.replace(broker.endpoint("board"), port=liar.port)
    link = Link(endpoint, "board", on_message=lambda topic, payload: None)
    link.start()
    try:
        until(lambda: liar.connections >= 2, "another connection")
    finally:
        link.stop()
        liar.stop()


def test_a_packet_larger_than_was_agreed_is_not_taken(broker: TestBroker) -> None:
    size = HUGE_BYTES - 5
    length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21])
    liar = LyingBroker(broker, CONNACK + b"\x30" + length, HUGE_BYTES)
    endpoint = msgspec.structs.replace(broker.endpoint("board"), port=liar.port)
    reasons: list[str] = []
    link = Link(endpoint, "board", on_message=lambda topic, payload: None, on_down=reasons.append)
    link.start()
    try:
        until(lambda: liar.connections >= 2, "another connection")
        assert liar.sent_bytes < 64 << 20
        assert any(f"a packet of {size} bytes" in reason for reason in reasons), reasons
    finally:
        link.stop()
        liar.stop()
