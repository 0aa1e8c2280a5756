"""Systemd's readiness and watchdog protocol: receives a state, hands on one datagram. Used by agent and runtime.

Source: sd_notify(3). Without ``NOTIFY_SOCKET`` (started by hand, in a container, in a test) every call does nothing.
"""

from __future__ import annotations

import os
import socket


def send(state: str) -> bool:
    """Send one or more ``KEY=value`` lines to the service manager; False when there is none to tell."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
            client.connect(address)
            client.sendall(state.encode())
    except OSError:
        # A manager that is away, or no descriptor to reach it by, must not stop a board; systemd itself notices the missing notice.
        return False
    return True


def ready(status: str = "") -> bool:
    """The service is up."""
    return send(f"READY=1\nSTATUS={status}" if status else "READY=1")


def status(text: str) -> bool:
    """One line for ``systemctl status``."""
    return send(f"STATUS={text}")


def stopping() -> bool:
    return send("STOPPING=1")


def alive() -> bool:
    """Feed the watchdog."""
    return send("WATCHDOG=1")


def watchdog_period_s() -> float | None:
    """How often :func:`alive` is due: half of what systemd allows this process, or None when no watchdog is set."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(os.environ["WATCHDOG_USEC"])
    except (KeyError, ValueError):
        return None
    return microseconds / 2e6 if microseconds > 0 else None
