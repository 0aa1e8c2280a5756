"""Who is at the other end: receives a connection's socket, hands on the user that the kernel says connected.

A Unix socket knows its peer (SO_PEERCRED). A loopback TCP connection's other end is a socket of this machine too, and the kernel's
table of sockets names its user, as long as both ends are in one network namespace. Source: unix(7), proc_pid_net(5).
"""

from __future__ import annotations

import socket
import struct
from typing import Any


class Peer:
    """One connection's other end. Asking costs nothing until :attr:`uid` is first read.

    Args:
        connection: its socket, or what a transport gives in its place; None when there is none.
    """

    __slots__ = ("_connection", "_known", "_uid")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._known = False
        self._uid: int | None = None

    @property
    def uid(self) -> int | None:
        """The user id; None when the kernel does not tell."""
        if not self._known:
            self._known, self._uid = True, _uid_of(self._connection)
        return self._uid


def _uid_of(connection: Any) -> int | None:
    try:
        if connection.family == socket.AF_UNIX:
            return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
        table = "/proc/self/net/tcp6" if connection.family == socket.AF_INET6 else "/proc/self/net/tcp"
        theirs, ours = _row(connection.getpeername()), _row(connection.getsockname())
        with open(table) as rows:
            for row in rows:
                fields = row.split()
                # Seen from the other end: its local address is our remote one. A socket that its process has closed has inode 0,
                # and some kernels then say that it is root's.
                if fields[1] == theirs and fields[2] == ours and fields[9] != "0":
                    return int(fields[7])
    except (OSError, AttributeError, ValueError):
        pass  # gone meanwhile, or no such table here
    return None


def _row(address: tuple[Any, ...]) -> str:
    """An address as /proc/net/tcp writes it: 32-bit words in this machine's byte order, in hex."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    packed = socket.inet_pton(family, address[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"
