"""Stage 8, swap: receives listening sockets that systemd holds, hands their connections' bytes to the gateway's own socket, and back.

The library that speaks gRPC can't take over a socket that somebody else opened (ADR 0006). In the gateway's process, so that nothing that carries
ends before what is carried. Told to stop, it takes no more connections, which wait for the next gateway with systemd, and takes leave of those that
are there between two frames of an answer: their clients send what comes next by a new connection, and close this one once they have their
answers. The library's own way to stop cancels calls that have just come.
Source: RFC 9113, 4.1 (frames) and 6.8 (GOAWAY with the highest stream number: nothing is refused that is on its way).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from edgefleet_agent.runtime.control import short_path

MAX_CONNECTIONS = 256  # as many as the socket unit lets wait; those above wait there
LINGER_S = 2.0  # for a client to take the end of what was said, and hang up
PIECE_BYTES = 64 * 1024  # at once, of each direction of each connection
_FRAME_HEADER_BYTES = 9
_GOAWAY = bytes([0, 0, 8, 7, 0, 0, 0, 0, 0]) + (2**31 - 1).to_bytes(4, "big") + bytes(4)


class Frames:
    """Where one frame ends and the next begins in what a server says. Pure."""

    def __init__(self) -> None:
        self._head, self._left, self._any = b"", 0, False

    @property
    def between(self) -> bool:
        """Whether something may be put in here. Not before the first frame: that must be the server's settings."""
        return self._any and not self._head and not self._left

    def feed(self, piece: bytes) -> int | None:
        """Go on by a piece; where in it something may be put first, None for nowhere."""
        first, at = None, 0
        while at < len(piece):
            if not self._left:
                needed = _FRAME_HEADER_BYTES - len(self._head)
                self._head += piece[at : at + needed]
                at = min(at + needed, len(piece))
                if len(self._head) < _FRAME_HEADER_BYTES:
                    break
                self._head, self._left = b"", int.from_bytes(self._head[:3], "big")
            step = min(self._left, len(piece) - at)
            at, self._left = at + step, self._left - step
            if not self._left:
                self._any = True
                first = at if first is None else first
        return first


class _Leave:
    """Takes leave of one client, once, between two frames."""

    def __init__(self, loop: asyncio.AbstractEventLoop, link: socket.socket) -> None:
        self._loop, self._link = loop, link
        self._frames, self._writing = Frames(), asyncio.Lock()
        self._taking, self._taken = False, False

    async def send(self, piece: bytes) -> None:
        """Hand a piece of what the server says to the client."""
        async with self._writing:
            cut = self._frames.feed(piece)
            if self._taking and not self._taken and cut is not None:
                self._taken = True
                piece = piece[:cut] + _GOAWAY + piece[cut:]
            await self._loop.sock_sendall(self._link, piece)

    async def take(self) -> None:
        """At once where nothing is being said, else as soon as a frame ends."""
        self._taking = True
        async with self._writing:
            if self._frames.between and not self._taken:
                self._taken = True
                with suppress(OSError):
                    await self._loop.sock_sendall(self._link, _GOAWAY)


class Carrier(threading.Thread):
    """Carries connections between ``listeners`` and the gateway's socket at ``path``."""

    def __init__(self, listeners: list[socket.socket], path: Path) -> None:
        super().__init__(name="carrier", daemon=True)
        self._listeners, self._path = listeners, path
        self._loop = asyncio.new_event_loop()
        self._ending, self._accepts_none = asyncio.Event(), threading.Event()
        self._leaves = set[_Leave]()

    def stop(self) -> None:
        """Take no more connections, and take leave of those that are there; :meth:`join` waits for them to be closed."""
        self._loop.call_soon_threadsafe(self._ending.set)
        self._accepts_none.wait()

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        room = asyncio.Semaphore(MAX_CONNECTIONS)
        carried = set[asyncio.Task[None]]()
        accepting = [asyncio.create_task(self._accept(listener, room, carried)) for listener in self._listeners]
        await self._ending.wait()
        for task in accepting:
            task.cancel()
        await asyncio.gather(*accepting, return_exceptions=True)
        self._accepts_none.set()
        await asyncio.gather(*(leave.take() for leave in self._leaves))
        await asyncio.gather(*carried)

    async def _accept(self, listener: socket.socket, room: asyncio.Semaphore, carried: set[asyncio.Task[None]]) -> None:
        listener.setblocking(False)
        while True:
            await room.acquire()
            try:
                link, _ = await self._loop.sock_accept(listener)
            except OSError:  # its client is gone again, or there are no descriptors just now
                room.release()
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._carry(link))
            carried.add(task)
            task.add_done_callback(carried.discard)
            task.add_done_callback(lambda _: room.release())

    async def _carry(self, link: socket.socket) -> None:
        with link, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner, suppress(OSError):
            link.setblocking(False)
            inner.setblocking(False)
            with short_path(self._path) as address:
                await self._loop.sock_connect(inner, address)
            leave = _Leave(self._loop, link)
            self._leaves.add(leave)
            try:
                asked = asyncio.create_task(
                    self._pump(link, inner, lambda piece: self._loop.sock_sendall(inner, piece))
                )
                await self._pump(inner, link, leave.send)
                # The gateway is done with it; the client may not be, or may have forgotten it.
                await asyncio.wait({asked}, timeout=LINGER_S)
                asked.cancel()
            finally:
                self._leaves.discard(leave)

    async def _pump(
        self, source: socket.socket, target: socket.socket, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Until ``source`` says nothing any more; an error of either ends the other direction, too."""
        try:
            while piece := await self._loop.sock_recv(source, PIECE_BYTES):
                await send(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, target):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
