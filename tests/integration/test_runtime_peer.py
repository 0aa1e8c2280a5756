"""Who is at the other end of a connection, and what its user may leave behind in shared memory."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgefleet_agent.runtime import regions
from edgefleet_agent.runtime.peer import Peer
from edgefleet_agent.runtime.protocol import RegionUse, RequestError
from edgefleet_agent.runtime.regions import Regions


def loopback(host: str) -> tuple[socket.socket, socket.socket]:
    """(the server's end, the client's end) of a TCP connection."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        client = socket.create_connection(server.getsockname()[:2])
        return server.accept()[0], client


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_tells_whose_a_loopback_connection_is(host: str) -> None:
    try:
        ours, theirs = loopback(host)
    except OSError as exc:
        pytest.skip(f"this machine has no {host}: {exc}")
    with ours, theirs:
        assert Peer(ours).uid == os.getuid()


def test_a_client_whose_ipv6_socket_speaks_ipv4_is_known_too() -> None:
    """As Java's and gRPC's do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            theirs = socket.socket(socket.AF_INET6)
            theirs.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            theirs.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
        except OSError as exc:
            pytest.skip(f"this machine has no IPv6: {exc}")
        ours = server.accept()[0]
    with ours, theirs:
        assert Peer(ours).uid == os.getuid()


def test_a_connection_that_its_owner_closed_is_nobodys_and_not_roots() -> None:
    ours, theirs = loopback("127.0.0.1")
    with ours:
        theirs.close()
        assert Peer(ours).uid is None


def test_a_unix_socket_knows_its_peer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Peer(ours).uid == os.getuid()


def test_without_a_connection_nobody_is_known() -> None:
    assert Peer(None).uid is None


class Someone:
    """A peer of a user that the test chooses."""

    def __init__(self, uid: int | None) -> None:
        self.uid = uid


@pytest.fixture
def place() -> Iterator[Path]:
    made = Path("/dev/shm", f"edgefleet-test-{uuid.uuid4().hex}")
    made.write_bytes(bytes(range(64)))
    yield made
    made.unlink(missing_ok=True)


def registration(place: Path) -> bytes:
    return json.dumps({"key": place.name, "byte_size": 64}).encode()


@pytest.mark.parametrize(
    ("uid", "mode", "taken"),
    [
        (os.getuid(), 0o600, True),
        (4711, 0o600, False),
        (4711, 0o604, False),
        (4711, 0o606, True),
        (None, 0o660, False),
        (None, 0o666, True),
    ],
)
def test_an_object_is_taken_only_from_who_could_open_it_anyway(
    place: Path, uid: int | None, mode: int, taken: bool
) -> None:
    place.chmod(mode)
    known = Regions()
    if taken:
        known.register(Someone(uid), "r", registration(place))
        target = memoryview(bytearray(8))
        known.find(Someone(uid), RegionUse("r", 4, 8)).read_into(RegionUse("r", 4, 8), target)
        assert bytes(target) == bytes(range(4, 12))
    else:
        with pytest.raises(RequestError, match=r"is another user's|is not everybody's"):
            known.register(Someone(uid), "r", registration(place))
    known.unregister(Someone(uid), None)


def test_memory_that_its_client_deleted_and_forgot_is_let_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, me = Regions(), Someone(os.getuid())
    known.register(me, "kept", registration(place))
    monkeypatch.setattr(regions, "UNLINKED_LIMIT_S", 0.0)
    known.tick()
    assert len(known) == 1
    place.unlink()
    known.tick()
    assert len(known) == 0
