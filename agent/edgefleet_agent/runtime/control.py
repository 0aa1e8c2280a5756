"""Stage 8, swap: what the agent says to the runtime: receives a load, a switch, a question; hands on what the runtime answered.

JSON lines over ``<state>/run/control.sock`` (mode 0600), one request and one reply per line. The structs are the contract; the
client is synchronous and needs nothing but msgspec and the standard library, because the resident agent lives on small boards.
The order of a swap: ``load`` (never touches what serves) -> the agent flips the slots on disk -> ``switch`` -> soak ->
``retire`` the old one, or ``switch`` back and ``retire`` the new one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from edgefleet_shared.contract import ShadowFigures
from edgefleet_shared.drift import Drift
from edgefleet_shared.errors import EnvironmentProblem, TransportError, from_dict
from edgefleet_shared.malformed import MALFORMED

MAX_LINE_BYTES = 1 << 20
SwapMode = Literal["auto", "blue-green", "in-place"]


class VersionState(str, Enum):
    PREPARED = "prepared"  # bytes checked, no process: waits for an in-place switch
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # its worker died; a new one comes
    STOPPED = "stopped"


class Load(msgspec.Struct, frozen=True, tag="load", tag_field="op"):
    """Make an artifact ready to serve. ``manifest`` is its digest in the state's layout."""

    manifest: str
    mode: SwapMode = "auto"


class Switch(msgspec.Struct, frozen=True, tag="switch", tag_field="op"):
    """Let a loaded artifact serve. The one that served stays as standby (blue-green) or is gone (in-place)."""

    manifest: str


class Retire(msgspec.Struct, frozen=True, tag="retire", tag_field="op"):
    """Drain and stop an artifact that does not serve. Retiring what is not loaded is done already."""

    manifest: str


class Shadow(msgspec.Struct, frozen=True, tag="shadow", tag_field="op"):
    """Let a loaded artifact answer what the serving one is asked, unseen; until it is switched to or retired. Counts begin anew."""

    manifest: str


class Status(msgspec.Struct, frozen=True, tag="status", tag_field="op"):
    pass


class Ping(msgspec.Struct, frozen=True, tag="ping", tag_field="op"):
    pass


Request = Load | Switch | Shadow | Retire | Status | Ping


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded", tag_field="op"):
    """Ready (``blue-green``), or checked and waiting for the switch (``in-place``: ``providers`` are empty, times 0)."""

    manifest: str
    mode: Literal["blue-green", "in-place"]
    why: str
    providers: tuple[str, ...] = ()
    load_ms: float = 0.0
    first_ms: float = 0.0


class Switched(msgspec.Struct, frozen=True, kw_only=True, tag="switched", tag_field="op"):
    """``previous`` served before, None when nothing did; ``parked_ms`` is how long requests had to wait (in-place)."""

    manifest: str
    previous: str | None
    mode: Literal["blue-green", "in-place"]
    parked_ms: float = 0.0


class Shadowing(msgspec.Struct, frozen=True, tag="shadowing", tag_field="op"):
    """``beside`` is the manifest that serves."""

    manifest: str
    beside: str


class Retired(msgspec.Struct, frozen=True, tag="retired", tag_field="op"):
    manifest: str


class VersionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One loaded version. ``requests`` includes ``failed``; ``crashes`` counts workers that ended by themselves, but for the ``starved``, which the
    kernel ended for want of memory though they had taken no more than they may; latencies in ms over the last 1024 answers, None before the first; memory in bytes, 0 without a process."""

    manifest: str
    model: str
    version: str
    engine: str
    state: str
    serving: bool
    standby: bool
    requests: int
    failed: int
    crashes: int
    retried: int
    p50_ms: float | None
    p95_ms: float | None
    in_flight: int
    pid: int
    memory_bytes: int
    providers: tuple[str, ...]
    unconfined: tuple[str, ...]
    last_problem: str
    drift: Drift | None = None
    starved: int = 0


class StatusReport(msgspec.Struct, frozen=True, kw_only=True, tag="status", tag_field="op"):
    """The whole runtime. ``waiting`` requests have no worker yet; ``failed`` counts every request that was accepted and got no
    answer, whichever version it was meant for."""

    serving: str | None
    standby: str | None
    versions: tuple[VersionStatus, ...]
    waiting: int
    requests: int
    failed: int
    swaps: int
    pid: int
    memory_bytes: int
    uptime_s: float
    shadow: ShadowFigures | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong", tag_field="op"):
    pid: int


class Refused(msgspec.Struct, frozen=True, tag="refused", tag_field="op"):
    """An error as :meth:`EdgefleetError.as_dict` gives it."""

    error: dict[str, str]


Reply = Loaded | Switched | Shadowing | Retired | StatusReport | Pong | Refused
_ReplyT = TypeVar("_ReplyT", Loaded, Switched, Shadowing, Retired, StatusReport, Pong)


def socket_path(state: Path) -> Path:
    """Where the runtime of a state folder listens."""
    return state / "run" / "control.sock"


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """An address for a Unix socket at ``path``, however deep it lies: the kernel takes 107 bytes, so go by the folder's descriptor."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class RuntimeClient:
    """The agent's side of the control socket. One connection per call: a runtime that restarted is simply the next call's.

    Args:
        path: the control socket, see :func:`socket_path`.
        timeout_s: how long quick calls may take; loading and switching have their own.
    """

    def __init__(self, path: Path, timeout_s: float = 5.0) -> None:
        self._path, self._timeout_s = path, timeout_s

    def load(self, manifest: str, mode: SwapMode = "auto", timeout_s: float = 180.0) -> Loaded:
        """Start and warm a worker for an artifact; what serves is not touched.

        Raises:
            EdgefleetError: as the runtime says: bytes changed, engine refused, killed by a signal, too slow.
            EnvironmentProblem: no runtime listens there.
            TransportError: it went away, or did not answer in time.
        """
        return self._call(Load(manifest, mode), Loaded, timeout_s)

    def switch(self, manifest: str, timeout_s: float = 180.0) -> Switched:
        """Let a loaded artifact serve. When it fails (in-place only) the old one serves again. Raises like :meth:`load`."""
        return self._call(Switch(manifest), Switched, timeout_s)

    def shadow(self, manifest: str) -> Shadowing:
        """Let a loaded artifact follow what serves, see :class:`Shadow`. Raises like :meth:`load`."""
        return self._call(Shadow(manifest), Shadowing, self._timeout_s)

    def retire(self, manifest: str, timeout_s: float = 60.0) -> Retired:
        """Drain and stop an artifact that does not serve. Raises like :meth:`load`."""
        return self._call(Retire(manifest), Retired, timeout_s)

    def status(self) -> StatusReport:
        """Counters and processes. Raises like :meth:`load`."""
        return self._call(Status(), StatusReport, self._timeout_s)

    def ping(self) -> Pong:
        """Whether it lives. Raises like :meth:`load`."""
        return self._call(Ping(), Pong, self._timeout_s)

    def _call(self, request: Request, expected: type[_ReplyT], timeout_s: float) -> _ReplyT:
        try:
            line = self._exchange(msgspec.json.encode(request) + b"\n", timeout_s)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise EnvironmentProblem(
                f"no runtime listens at {self._path}", hint="start it: fleet-runtime --state ..."
            ) from exc
        except OSError as exc:
            raise TransportError(f"the runtime at {self._path} did not answer: {exc}") from exc
        try:
            reply = msgspec.json.decode(line, type=Reply)
        except MALFORMED as exc:
            raise TransportError(f"the runtime's answer can't be read: {exc}") from exc
        if isinstance(reply, Refused):
            raise from_dict(reply.error)
        if not isinstance(reply, expected):
            raise TransportError(f"the runtime answered {type(reply).__name__}, expected {expected.__name__}")
        return reply

    def _exchange(self, line: bytes, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as link:
            link.settimeout(self._timeout_s)
            with short_path(self._path) as address:
                link.connect(address)
            link.sendall(line)
            received = bytearray()
            while not received.endswith(b"\n"):
                link.settimeout(max(0.001, deadline - time.monotonic()))
                piece = link.recv(65536)
                if not piece:
                    raise ConnectionResetError("it closed the connection")
                received += piece
                if len(received) > MAX_LINE_BYTES:
                    raise ConnectionAbortedError("its answer has no end")
        return bytes(received)
