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
        return uid_of_tcp(connection.getpeername(), connection.getsockname())
    except (OSError, AttributeError, ValueError):
        return None  # gone meanwhile


def uid_of_tcp(theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> int | None:
    """The user at the other end of a TCP connection within this machine; None when no table of the kernel's tells.

    Args:
        theirs, ours: host, port and whatever follows them of its two ends.
    """
    ways = [("/proc/self/net/tcp6" if ":" in theirs[0] else "/proc/self/net/tcp", theirs[0], ours[0])]
    if ":" not in theirs[0]:
        # An IPv6 socket may speak IPv4, and then stands in its own table; Java and gRPC make no others (RFC 4291, 2.5.5.2).
        ways.append(("/proc/self/net/tcp6", f"::ffff:{theirs[0]}", f"::ffff:{ours[0]}"))
    for table, their_host, our_host in ways:
        found = _look_up(table, _row((their_host, theirs[1])), _row((our_host, ours[1])))
        if found is not None:
            return found
    return None


def _look_up(table: str, theirs: str, ours: str) -> int | None:
    try:
        with open(table) as rows:
            for row in rows:
                fields = row.split()
                # Seen from the other end: its local address is our remote one. A socket that its process has closed has inode 0,
                # and some kernels then say that it is root's.
                if fields[1] == theirs and fields[2] == ours and fields[9] != "0":
                    return int(fields[7])
    except (OSError, ValueError):
        pass  # no such table here
    return None


def _row(address: tuple[Any, ...]) -> str:
    """An address as /proc/net/tcp writes it: 32-bit words in this machine's byte order, in hex."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    packed = socket.inet_pton(family, address[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"
