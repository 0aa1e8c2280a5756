"""A line between a board and its broker that misbehaves as it is told: it ends TLS on both sides and sees each MQTT packet."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from edgefleet_shared.mqtt import Endpoint

from support.broker import TestBroker

PUBLISH, PUBACK, SUBSCRIBE = 3, 4, 8
PIECE_BYTES = 1024


class Packet(NamedTuple):
    """One MQTT packet as it travels: ``content`` is all of it."""

    content: bytes
    body_at: int

    @property
    def kind(self) -> int:
        return self.content[0] >> 4

    @property
    def topic(self) -> str:
        """Of a PUBLISH."""
        length = int.from_bytes(self.content[self.body_at : self.body_at + 2], "big")
        return self.content[self.body_at + 2 : self.body_at + 2 + length].decode()

    @property
    def payload(self) -> bytes:
        """Of a PUBLISH with QoS 1."""
        return self.content[self._payload_at() :]

    def with_payload(self, payload: bytes) -> bytes:
        """The same PUBLISH with QoS 1, with other bytes of whatever length."""
        body = self.content[self.body_at : self._payload_at()] + payload
        return self.content[:1] + _length(len(body)) + body

    def _payload_at(self) -> int:
        at = self.body_at + 2 + len(self.topic.encode()) + 2
        properties, at = _read_length(self.content, at)
        return at + properties


def _length(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = divmod(number, 128)
        out.append(low | (128 if number else 0))
        if not number:
            return bytes(out)


def _read_length(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return number, at


# What becomes of a packet: the pieces of bytes that go on in its place; None cuts the connection after those before it.
Fate = Iterator[bytes | None]


def as_it_is(packet: Packet) -> Fate:
    yield packet.content


class Line:
    """Takes a board's connections and makes one to the broker for each.

    ``up`` and ``down`` say what becomes of each packet of the board and of the broker; ``bytes_per_s`` how fast what is for the board
    travels; while ``dead`` nothing does, and nobody is told.
    """

    def __init__(self, broker: TestBroker, name: str) -> None:
        self._own, self._broker_port = broker.endpoint(name), broker.port
        self._server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server_tls.load_cert_chain(broker.ca.folder / "server.pem", broker.ca.folder / "server.key")
        self.up: Callable[[Packet], Fate] = as_it_is
        self.down: Callable[[Packet], Fate] = as_it_is
        self.bytes_per_s: float | None = None
        self.dead = False
        self.connections = self.down_bytes = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = self._call(self._listen())
        self.port = int(self._server.sockets[0].getsockname()[1])

    @property
    def endpoint(self) -> Endpoint:
        own = self._own
        return Endpoint(host="127.0.0.1", port=self.port, ca=own.ca, certificate=own.certificate, key=own.key)

    def cut(self) -> None:
        """End every connection at once."""
        self._call(self._cut())

    def stop(self) -> None:
        self._server.close()
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._server_tls)

    async def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end(self) -> None:
        await self._cut()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _serve(self, board: asyncio.StreamReader, to_board: asyncio.StreamWriter) -> None:
        self.connections += 1
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)  # else the broker's bytes wait here
        plain.connect(("127.0.0.1", self._broker_port))
        broker, to_broker = await asyncio.open_connection(sock=plain, ssl=self._own.tls(), server_hostname="127.0.0.1")
        writers = {to_board, to_broker}
        self._writers |= writers
        tasks = [
            asyncio.create_task(self._carry(board, to_broker, upwards=True)),
            asyncio.create_task(self._carry(broker, to_board, upwards=False)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.transport.abort()
        self._writers -= writers

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, upwards: bool) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                packet = await _read(source)
                for piece in (self.up if upwards else self.down)(packet):
                    if piece is None:
                        return
                    await self._send(target, piece, upwards)

    async def _send(self, target: asyncio.StreamWriter, content: bytes, upwards: bool) -> None:
        for start in range(0, len(content), PIECE_BYTES):
            while self.dead:
                await asyncio.sleep(0.05)
            piece = content[start : start + PIECE_BYTES]
            if not upwards and self.bytes_per_s:
                await asyncio.sleep(len(piece) / self.bytes_per_s)
            target.write(piece)
            await target.drain()
            self.down_bytes += 0 if upwards else len(piece)


async def _read(source: asyncio.StreamReader) -> Packet:
    head = await source.readexactly(2)
    while head[-1] & 128:
        head += await source.readexactly(1)
    length, at = _read_length(head, 1)
    return Packet(head + await source.readexactly(length), at)
