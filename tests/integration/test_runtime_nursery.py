"""The front's side of what starts workers, when that dies at the worst moment."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

from edgefleet_agent.runtime import shm
from edgefleet_agent.runtime.nursery import Nursery
from support.runtimes import until


def test_a_worker_is_killed_when_what_started_it_has_died_and_nobody_has_heard_of_it_yet() -> None:
    async def story() -> int:
        nursery = Nursery(1)
        nursery.open()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [theirs.fileno(), shm.create(1, 4096), shm.create(1, 4096)]
        child = await nursery.spawn(fds, aside=False)
        spawner = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(spawner, signal.SIGKILL)
        until(lambda: " Z " in Path(f"/proc/{spawner}/stat").read_text(), what="its end")
        child.kill()
        code = await child.ended
        nursery.close()
        for fd in fds[1:]:
            os.close(fd)
        ours.close()
        theirs.close()
        return code

    assert asyncio.run(story()) == -signal.SIGKILL
