"""Systemd's readiness protocol, sd_notify(3): receives a state, hands on one datagram; without ``NOTIFY_SOCKET`` nothing.

The agent has its own, because neither program may import the other and the shared package does no I/O of this kind.
"""

from __future__ import annotations

import os
import socket


def send(state: str) -> None:
    """Send ``KEY=value`` to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
        try:
            client.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            return  # systemd notices the missing notice by itself
