"""Stage 8, swap: receives the environment that systemd starts a service with, hands on its listening sockets.

Sockets that systemd holds outlive a restart of the runtime: a client that connects meanwhile waits in the backlog instead
of being refused; and the unit needs no network of its own. Source: sd_listen_fds(3), systemd.socket(5).
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from edgefleet_shared.errors import EnvironmentProblem

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


def inherited(environment: MutableMapping[str, str] | None = None) -> list[socket.socket]:
    """The listening stream sockets (TCP or Unix) that systemd handed to this very process; empty when it handed none.

    The variables are taken out of ``environment`` (default: this process's), so that no child takes the sockets for its own;
    the descriptors are closed on exec from here on.

    Raises:
        EnvironmentProblem: the variables are malformed, or a descriptor is no listening stream socket.
    """
    found = os.environ if environment is None else environment
    for_process, count = found.pop("LISTEN_PID", ""), found.pop("LISTEN_FDS", "")
    found.pop("LISTEN_FDNAMES", None)
    if for_process != str(os.getpid()):
        return []
    if not count.isdecimal():
        raise EnvironmentProblem(f"LISTEN_FDS is {count[:20]!r}, expected a number", hint="check the socket unit")
    sockets = []
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            taken = socket.socket(fileno=descriptor)
            listens = taken.type == socket.SOCK_STREAM and taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as exc:
            raise EnvironmentProblem(
                f"descriptor {descriptor} from systemd is no socket: {exc}", hint="check the socket unit"
            ) from exc
        if not listens:
            raise EnvironmentProblem(
                f"descriptor {descriptor} from systemd is no listening stream socket",
                hint="the socket unit needs ListenStream= and Accept=no",
            )
        sockets.append(taken)
    return sockets
