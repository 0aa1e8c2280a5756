"""The floor under the runtime: two blocking processes that pass a picture on and an answer back, and do nothing else.

What a front and a worker in processes of their own cost on this machine whatever they are written like: the picture goes through a Unix socket
into shared memory, a byte wakes whoever computes, the raw engine call is made there, a byte and an answer of fixed bytes come back. No HTTP,
no checks, no swap, one client.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from board import PICTURE, raw_session

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + bytes(200)
GO = b"."


class Bare:
    """Front and worker, forked from here. ``infer`` asks once and returns when the whole answer is there."""

    def __init__(self, content: bytes) -> None:
        memory = mmap.mmap(-1, PICTURE.nbytes)
        ours, clients = socket.socketpair(socket.AF_UNIX)
        link, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._children = [
            _fork(lambda: _work(workers, memory, content), ours, clients, link),
            _fork(lambda: _pass_on(ours, link, memory), workers, clients),
        ]
        for end in (ours, link, workers):
            end.close()
        self._link, self._picture = clients, PICTURE.tobytes()

    def infer(self) -> None:
        self._link.sendall(self._picture)
        missing = len(ANSWER)
        while missing:
            piece = self._link.recv(missing)
            if not piece:
                raise ConnectionResetError("the bare front is gone")
            missing -= len(piece)

    def stop(self) -> None:
        self._link.close()  # the front ends, and with it the worker's link
        for pid in self._children:
            os.waitpid(pid, 0)


def _fork(run: Callable[[], None], *others: socket.socket) -> int:
    """A child that has all descriptors but ``others``; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for other in others:
            other.close()
        run()
        code = 0
    finally:
        os._exit(code)


def _work(link: socket.socket, memory: mmap.mmap, content: bytes) -> None:
    session = raw_session(content)
    picture: npt.NDArray[Any] = np.ndarray(PICTURE.shape, PICTURE.dtype, memory)
    while link.recv(1):
        session.run(None, {"x": picture})
        link.send(GO)


def _pass_on(clients: socket.socket, link: socket.socket, memory: mmap.mmap) -> None:
    target = memoryview(memory)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while True:
            filled = 0
            while filled < len(target):
                count = clients.recv_into(target[filled:])
                if not count:
                    return
                filled += count
            link.send(GO)
            link.recv(1)
            clients.sendall(ANSWER)
