"""Shared memory regions: whose they are is asked once for each call, however many there are."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from edgefleet_agent.runtime.protocol import RegionUse, RequestError
from edgefleet_agent.runtime.regions import Regions


class Client:
    """A client that counts how often the kernel would be asked who it is."""

    def __init__(self) -> None:
        self.asked = 0

    @property
    def uid(self) -> int | None:
        self.asked += 1
        return os.getuid()


@pytest.fixture
def key() -> Iterator[str]:
    name = f"edgefleet-test-{uuid.uuid4().hex}"
    path = Path("/dev/shm", name)
    path.write_bytes(bytes(64))
    yield name
    path.unlink()


def register(regions: Regions, client: Client, name: str, key: str) -> None:
    regions.register(client, name, msgspec.json.encode({"key": key, "offset": 0, "byte_size": 64}))


@pytest.mark.parametrize(
    "ask",
    [
        lambda regions, client, key: register(regions, client, "another", key),
        lambda regions, client, key: regions.status(client, None),
        lambda regions, client, key: regions.unregister(client, None),
    ],
    ids=["register", "status", "unregister"],
)
def test_who_asks_is_found_once_however_many_regions_there_are(
    ask: Callable[[Regions, Client, str], None], key: str
) -> None:
    regions = Regions()
    for number in range(20):
        register(regions, Client(), f"r{number}", key)
    client = Client()
    ask(regions, client, key)
    assert client.asked == 1
    regions.unregister(Client(), None)


def test_what_is_unregistered_while_a_request_waits_is_told_as_that(key: str) -> None:
    regions, use = Regions(), RegionUse("mine", 0, 64)
    register(regions, Client(), "mine", key)
    region = regions.find(Client(), use)
    regions.unregister(Client(), "mine")
    with pytest.raises(RequestError, match="'mine' was unregistered before the request had its turn"):
        region.read_into(use, memoryview(bytearray(64)))
    with pytest.raises(RequestError, match="'mine' was unregistered before the request had its turn"):
        region.write(use, bytes(64))
