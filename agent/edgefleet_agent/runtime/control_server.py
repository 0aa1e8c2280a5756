"""The runtime's side of the control socket: receives the agent's orders, carries them out, answers what came of them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
from edgefleet_shared.errors import EdgefleetError, InputError
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent.runtime import control
from edgefleet_agent.runtime.control import Load, Ping, Pong, Refused, Reply, Request, Retire, Shadow, Status, Switch
from edgefleet_agent.runtime.orders import Orders

# From Python 3.13 on a loop removes a Unix socket's file when its server ends. Some are systemd's, and outlive it; the others are replaced by whoever
# binds next, and can't be looked at by their addresses, see control.short_path.
KEEPS_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}


def bind_unix(path: Path, mode: int) -> socket.socket:
    """A listening Unix socket at ``path`` with ``mode`` from its first instant; a stale one is replaced.

    Call only while holding the lock of the folder's owner: two runtimes must not take each other's sockets.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old = os.umask(0o777 & ~mode)
    try:
        with control.short_path(path) as address:
            listener.bind(address)
    finally:
        os.umask(old)
    listener.listen(128)
    listener.setblocking(False)
    return listener


async def serve_control(listener: socket.socket, orders: Orders) -> asyncio.AbstractServer:
    """Answer the control socket until the returned server is closed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                reply = await _answer(line, orders)
                writer.write(msgspec.json.encode(reply) + b"\n")
                await writer.drain()
        except (ValueError, ConnectionError):
            pass  # a line without end, or an agent that went away: its connection is all that is lost
        finally:
            writer.close()

    return await asyncio.start_unix_server(talk, sock=listener, limit=control.MAX_LINE_BYTES, **KEEPS_FILE)


async def _answer(line: bytes, orders: Orders) -> Reply:
    try:
        request = msgspec.json.decode(line, type=Request)
    except MALFORMED as exc:
        return Refused(InputError(f"not a control request: {exc}").as_dict())
    try:
        return await _carry_out(request, orders)
    except EdgefleetError as exc:
        return Refused(exc.as_dict())


async def _carry_out(request: Request, orders: Orders) -> Reply:
    match request:  # mypy proves that every request is handled
        case Load(manifest, mode):
            return await orders.load(manifest, mode)
        case Switch(manifest):
            return await orders.switch(manifest)
        case Shadow(manifest):
            return await orders.shadow(manifest)
        case Retire(manifest):
            return await orders.retire(manifest)
        case Status():
            return orders.status()
        case Ping():
            return Pong(os.getpid())
