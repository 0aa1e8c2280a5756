"""The process that starts workers: receives orders and descriptors from the front, hands on forked workers and how they ended.

``python -m edgefleet_agent.runtime.spawner LINK_FD``, one per runtime. Starting a process stops the one that does it until the
new program runs, which takes a while on a busy board; the front, with every connection behind it, must not be that one. A
worker is a fork of this small process, which has imported what every worker needs and nothing of what it distrusts (numpy, engines).
It ends with the front, and the workers with it.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys

import msgspec

from edgefleet_agent import confinement
from edgefleet_agent.runtime import worker

MAX_ORDER_BYTES = 4096
WORKER_FDS = 4  # channel, inputs, answers, and what it prints to


class Spawn(msgspec.Struct, tag=1, array_like=True):
    """front -> spawner, with a worker's descriptors: start one."""

    number: int


class Kill(msgspec.Struct, tag=2, array_like=True):
    """front -> spawner: kill a worker, unless it has ended already."""

    number: int


class Spawned(msgspec.Struct, tag=3, array_like=True):
    """spawner -> front: it runs as ``pid``; 0 when it could not be started, then ``problem`` says why."""

    number: int
    pid: int
    problem: str = ""


class Ended(msgspec.Struct, tag=4, array_like=True):
    """spawner -> front: it ended; ``code`` is its exit status, or a signal's number below 0, ``peak_bytes`` the most memory that it ever held."""

    number: int
    code: int
    peak_bytes: int


encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Spawn | Kill).decode
decode_report = msgspec.msgpack.Decoder(Spawned | Ended).decode


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    confinement.die_with_parent()
    bell, ring = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ring)
    # Who stops a terminal's, a container's or a unit's processes means the front, which lets workers answer first. They inherit this.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # so that the collector of a worker does not touch, and so copy, what it shares with the others
    children: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([link.fileno(), bell], [], [])
        if bell in ready:
            os.read(bell, 4096)
            _reap(link, children)
        if link.fileno() in ready and not _obey(link, children, (bell, ring)):
            return


def _obey(link: socket.socket, children: dict[int, int], own: tuple[int, ...]) -> bool:
    """Carry out one order; False when the front is gone. ``own`` are descriptors that no worker may keep: one that read the bell could
    keep us from hearing that another has ended."""
    message, fds, _, _ = socket.recv_fds(link, MAX_ORDER_BYTES, WORKER_FDS)
    if not message:
        return False
    match decode_order(message):
        case Spawn(number):
            try:
                pid = os.fork()
                if pid == 0:
                    _be_worker(link, fds, own)
            except OSError as exc:
                report = Spawned(number, 0, exc.strerror or str(exc))
            else:
                children[pid] = number
                report = Spawned(number, pid)
            link.send(encode(report))
            for fd in fds:
                os.close(fd)
        case Kill(number):
            # Not reaped yet, so the pid is surely still this worker's.
            for pid, known in children.items():
                if known == number:
                    os.kill(pid, signal.SIGKILL)
    return True


def _reap(link: socket.socket, children: dict[int, int]) -> None:
    while children:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        link.send(encode(Ended(children.pop(pid), os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024)))


def _be_worker(link: socket.socket, fds: list[int], own: tuple[int, ...]) -> None:
    """What the forked process does; it never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        link.close()
        for standard in (1, 2):
            os.dup2(fds[3], standard)
        for fd in (*own, fds[3]):
            os.close(fd)
        code = worker.main(socket.socket(fileno=fds[0]), (fds[1], fds[2]))
    except BaseException:  # noqa: BLE001  # whatever it is, this process must not go on as a second spawner
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
