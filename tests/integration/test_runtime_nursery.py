"""The front's side of what starts workers, when that dies at the worst moment."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from edgefleet_agent.runtime import shm
from edgefleet_agent.runtime.nursery import Nursery
from edgefleet_shared.errors import EngineError
from support.runtimes import until


@contextmanager
def descriptors() -> Iterator[list[int]]:
    """A worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = [theirs.fileno(), shm.create(1, 4096), shm.create(1, 4096)]
    try:
        yield fds
    finally:
        for fd in fds[1:]:
            os.close(fd)
        ours.close()
        theirs.close()


def spawner_of(worker: int) -> int:
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_worker_is_killed_when_what_started_it_has_died_and_nobody_has_heard_of_it_yet() -> None:
    async def story() -> int:
        nursery = Nursery(1)
        nursery.open()
        with descriptors() as fds:
            child = await nursery.spawn(fds, aside=False)
            spawner = spawner_of(child.pid)
            os.kill(spawner, signal.SIGKILL)
            until(lambda: " Z " in Path(f"/proc/{spawner}/stat").read_text(), what="its end")
            child.kill()
            code = (await child.ended).code
        nursery.close()
        return code

    assert asyncio.run(story()) == -signal.SIGKILL


def test_what_starts_workers_is_replaced_when_it_stands_still() -> None:
    """Nothing could be loaded, switched or brought back any more: one order at a time, and this one without end."""

    async def story() -> None:
        nursery = Nursery(1)
        nursery.open()
        with descriptors() as fds:
            child = await nursery.spawn(fds, aside=False)
            spawner = spawner_of(child.pid)
            os.kill(spawner, signal.SIGSTOP)
            with pytest.raises(EngineError, match="could not be started"):
                await asyncio.wait_for(nursery.spawn(fds, aside=False), 60)
            assert (await child.ended).code == -signal.SIGKILL
            child = await nursery.spawn(fds, aside=False)
            assert spawner_of(child.pid) != spawner
        nursery.close()

    asyncio.run(story())
