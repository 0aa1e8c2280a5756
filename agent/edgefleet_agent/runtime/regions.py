"""System shared memory of clients: receives their registrations, hands on the bytes of a tensor that lies there, and takes answers.

Source: Triton's system shared memory extension. A region is a POSIX shared memory object (shm_overview(7)); the front reads and
writes it as a file and never maps it, so a client that shrinks it gets an error and nobody a SIGBUS, and one that changes it while
it is computed changes its own next picture at most. The worker never sees it.

Who may register what: only an object that the client could open without our help, and under names that only this client's user
sees. Else the runtime would read other users' memory for whoever asks.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent.runtime.protocol import RegionUse, RequestError

FOLDER = Path("/dev/shm")  # noqa: S108  # where shm_open(3) puts objects; each is checked below
MAX_REGIONS, MAX_OF_ONE_USER = 256, 64
MAX_REGION_BYTES = 1 << 30
MAX_NAME_CHARACTERS = 255
UNLINKED_LIMIT_S = 60.0  # how long a region that was deleted and is not used any more is kept for its client
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_OTHERS = stat.S_IROTH | stat.S_IWOTH


class Register(msgspec.Struct):
    """The body of a register request: ``byte_size`` bytes from ``offset`` of the object called ``key``."""

    key: str
    byte_size: int
    offset: int = 0


class Client(Protocol):
    """Whose regions are meant, by the user that the kernel says; None when it does not tell."""

    @property
    def uid(self) -> int | None: ...


class Region:
    """A registered region. Owns its descriptor."""

    def __init__(self, name: str, request: Register, descriptor: int) -> None:
        self.name, self.key = name, request.key
        self.offset, self.size = request.offset, request.byte_size
        self._descriptor = descriptor
        self.used_at = time.monotonic()

    @property
    def deleted(self) -> bool:
        return os.fstat(self._descriptor).st_nlink == 0

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def read_into(self, use: RegionUse, target: memoryview) -> None:
        """Fill ``target``, which is as long as ``use`` says.

        Raises:
            RequestError: 400, the use lies outside the region, that was unregistered, or the object became smaller.
        """
        self._check(use)
        done = self._io(os.preadv, target, self.offset + use.offset)
        while done < len(target):
            count = self._io(os.preadv, target[done:], self.offset + use.offset + done)
            if not count:
                raise RequestError(400, f"shared memory region {self.name!r} became smaller than it was registered")
            done += count

    def write(self, use: RegionUse, data: bytes) -> None:
        """Put an answer there. Raises like :meth:`read_into`."""
        self._check(use)
        if len(data) > use.size:
            raise RequestError(
                400, f"shared memory region {self.name!r}: the answer has {len(data)} bytes, room is for {use.size}"
            )
        # Writing behind its end would make it larger again; between this look and the write only its own client can shrink it.
        if os.fstat(self._descriptor).st_size < self.offset + use.offset + len(data):
            raise RequestError(400, f"shared memory region {self.name!r} became smaller than it was registered")
        done = 0
        while done < len(data):
            done += self._io(os.pwritev, memoryview(data)[done:], self.offset + use.offset + done)

    def _check(self, use: RegionUse) -> None:
        if self._descriptor < 0:
            raise RequestError(
                400, f"shared memory region {self.name!r} was unregistered before the request had its turn"
            )
        if use.offset + use.size > self.size:
            raise RequestError(
                400, f"shared memory region {self.name!r} has {self.size} bytes, {use.offset + use.size} are asked for"
            )
        self.used_at = time.monotonic()

    def _io(self, call: Callable[[int, list[memoryview], int], int], piece: memoryview, offset: int) -> int:
        try:
            return call(self._descriptor, [piece], offset)
        except OSError as exc:
            raise RequestError(400, f"shared memory region {self.name!r}: {exc.strerror or exc}") from exc


class Regions:
    """Every client's regions, by user and name."""

    def __init__(self) -> None:
        self._regions: dict[tuple[int | None, str], Region] = {}

    def __len__(self) -> int:
        return len(self._regions)

    def register(self, peer: Client, name: str, body: bytes | bytearray | memoryview) -> None:
        """Take a registration. Registering the same again is done already.

        Raises:
            RequestError: 400, with what is wrong; 429, there are too many.
        """
        try:
            request = msgspec.json.decode(body, type=Register)
        except MALFORMED as exc:
            raise RequestError(400, f"not a registration: {exc}") from exc
        if not 0 < len(name) <= MAX_NAME_CHARACTERS:
            raise RequestError(400, f"a region's name has 1 to {MAX_NAME_CHARACTERS} characters")
        if not 0 < request.byte_size <= MAX_REGION_BYTES or not 0 <= request.offset <= MAX_REGION_BYTES:
            raise RequestError(400, f"a region has 1 to {MAX_REGION_BYTES} bytes")
        user = peer.uid  # asked for once: finding it may take milliseconds
        if (user, name) in self._regions:
            # Triton's clients rely on this error to find what an earlier run of theirs left behind.
            raise RequestError(400, f"shared memory region {name!r} is registered already; unregister it first")
        if len(self._regions) >= MAX_REGIONS or sum(uid == user for uid, _ in self._regions) >= MAX_OF_ONE_USER:
            raise RequestError(
                429,  # not 503, which clients try again: they have to give one back first
                f"too many regions: one user may have {MAX_OF_ONE_USER}, all together {MAX_REGIONS}",
            )
        self._regions[user, name] = Region(name, request, _open(user, request))

    def unregister(self, peer: Client, name: str | None) -> None:
        """Forget a region, or all of this client's user; one that is not there is forgotten already."""
        user = peer.uid
        for key in [k for k in self._regions if k[0] == user and name in (None, k[1])]:
            self._regions.pop(key).close()

    def status(self, peer: Client, name: str | None) -> list[dict[str, object]]:
        """This client's user's regions as the extension shows them.

        Raises:
            RequestError: 400, there is none called ``name``.
        """
        user = peer.uid
        found = [r for (uid, own), r in self._regions.items() if uid == user and name in (None, own)]
        if name is not None and not found:
            raise _unknown(name)
        return [{"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.size} for r in found]

    def find(self, peer: Client, use: RegionUse) -> Region:
        """Raises: RequestError: 400, there is none."""
        region = self._regions.get((peer.uid, use.name))
        if region is None:
            raise _unknown(use.name)
        return region

    def tick(self) -> None:
        """Let go of memory that its client deleted and left here. Call a few times a second."""
        horizon = time.monotonic() - UNLINKED_LIMIT_S
        for key in [k for k, region in self._regions.items() if region.used_at < horizon and region.deleted]:
            self._regions.pop(key).close()


def _unknown(name: str) -> RequestError:
    return RequestError(400, f"no shared memory region {name[:200]!r} is registered by this user")


def _open(uid: int | None, request: Register) -> int:
    """The object's descriptor, once it is known to be one and the client's own."""
    name = request.key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(name.encode("utf-8", "replace")) > 255:
        raise RequestError(400, f"{request.key[:200]!r} is no name of a shared memory object")
    try:
        descriptor = os.open(FOLDER / name, _OPEN)
    except OSError as exc:
        raise RequestError(400, f"shared memory object {request.key!r} can't be opened: {exc.strerror}") from exc
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise RequestError(400, f"{request.key!r} is no shared memory object")
        if uid not in (0, found.st_uid) and found.st_mode & _OTHERS != _OTHERS:
            whose = (
                "another user's"
                if uid is not None
                else "not everybody's, and this connection does not tell whose it is"
            )
            raise RequestError(400, f"shared memory object {request.key!r} is {whose}")
        if request.offset + request.byte_size > found.st_size:
            raise RequestError(
                400,
                f"shared memory object {request.key!r} has {found.st_size} bytes, {request.offset + request.byte_size} are registered",
            )
    except RequestError:
        os.close(descriptor)
        raise
    return descriptor
