"""The front's side of the :mod:`spawner`: receives descriptors for a worker, hands on a running child, and hears how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from edgefleet_shared.errors import EngineError, StarvedError

from edgefleet_agent.runtime import spawner
from edgefleet_agent.runtime.output import Output
from edgefleet_agent.runtime.priority import Precedence
from edgefleet_agent.runtime.spawner import Ended, Kill, Spawn, Spawned
from edgefleet_agent.sandbox import child_environment

log = logging.getLogger("edgefleet.runtime")

# How often, and for how long each time, a fork is waited for: it takes milliseconds. A board that stood still meanwhile has used up one look.
FORK_LOOKS, FORK_LOOK_S = 15, 1.0


class Exit(NamedTuple):
    """How a worker ended: its exit status as :func:`subprocess.Popen.returncode` has it, and the most memory that it ever held, 0 where nobody
    knows."""

    code: int
    peak_bytes: int = 0


class Child:
    """A worker process. ``ended`` is how, ``output`` what it printed."""

    def __init__(
        self,
        number: int,
        pid: int,
        ended: asyncio.Future[Exit],
        output: Output,
        kill: Callable[[], None],
        precedence: Precedence,
    ) -> None:
        self.number, self.pid, self.ended, self.output = number, pid, ended, output
        self._kill, self._precedence = kill, precedence
        ended.add_done_callback(lambda _: precedence.leave(pid))

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        if not self.ended.done():
            self._kill()

    def step_back(self) -> None:
        """Nobody waits for its work any more: what serves must not feel it."""
        if not self.ended.done():
            self._precedence.step_back(self.pid)

    def come_forward(self) -> None:
        """It serves now, or has stood aside for too long."""
        if not self.ended.done():
            self._precedence.come_forward(self.pid)


class Nursery:
    """Starts the spawner when it is first needed, and again when it died.

    Args:
        threads: of one inference.
    """

    def __init__(self, threads: int) -> None:
        self._precedence = Precedence(apart=threads == 1)
        self._link: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._awaited: dict[int, asyncio.Future[int]] = {}
        self._ended: dict[int, asyncio.Future[Exit]] = {}
        self._outputs: set[Output] = set()  # of those that live

    def open(self) -> None:
        """Start the spawner.

        Raises:
            StarvedError: the board has no room for it.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as exc:
            raise StarvedError(f"no channel to what starts workers: {exc}") from exc
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgefleet_agent.runtime.spawner", str(theirs.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], cwd="/", env=child_environment(),
            )  # fmt: skip
        except OSError as exc:
            ours.close()
            raise StarvedError(f"no worker can be started: {exc}") from exc
        finally:
            theirs.close()
        self._precedence.join(self._process.pid, aside=False)
        ours.setblocking(False)
        self._link = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable)

    async def spawn(self, fds: list[int], *, aside: bool) -> Child:
        """Start a worker.

        Args:
            fds: its channel, inputs and answers; they stay the caller's.
            aside: others serve and must not feel it.

        Raises:
            EngineError: it could not be started; StarvedError when the board has no room for it.
        """
        if self._link is None:
            self.open()
        assert self._process is not None
        try:
            output = Output()
        except OSError as exc:
            raise StarvedError(f"the worker could not be started: {exc}") from exc
        self._outputs.add(output)
        try:
            # Forking takes milliseconds, in which the kernel lets nobody else onto that processor.
            with self._precedence.standing_aside(self._process.pid) if aside else contextlib.nullcontext():
                return await self._fork(fds, output, aside=aside)
        except BaseException:
            self._keep(output)
            raise

    async def _fork(self, fds: list[int], output: Output, *, aside: bool) -> Child:
        """Raises: EngineError."""
        assert self._link is not None
        loop = asyncio.get_running_loop()
        self._number += 1
        number = self._number
        pid, ended = loop.create_future(), loop.create_future()
        ended.add_done_callback(lambda _: self._keep(output))  # before anybody else hears of it
        self._awaited[number], self._ended[number] = pid, ended
        try:
            socket.send_fds(self._link, [spawner.encode(Spawn(number))], [*fds, output.given])
        except OSError as exc:
            self._awaited.pop(number)
            self._ended.pop(number)
            raise EngineError(f"the worker could not be started: {exc}") from exc
        finally:
            output.hand_over()
        child = Child(
            number, await self._forked(pid), ended, output, lambda: self._order(Kill(number)), self._precedence
        )
        self._precedence.join(child.pid, aside=aside)
        return child

    def look(self) -> None:
        """Take what workers printed. Call a few times a second."""
        for output in self._outputs:
            output.look()

    def _keep(self, output: Output) -> None:
        """Nothing more comes."""
        self._outputs.discard(output)
        output.close()

    async def _forked(self, pid: asyncio.Future[int]) -> int:
        """The worker's pid. A spawner that does not tell it is killed, its workers with it: it would start none any more.

        Raises:
            EngineError: there is no worker.
        """
        for _ in range(FORK_LOOKS):
            done, _ = await asyncio.wait({pid}, timeout=FORK_LOOK_S)
            if done:
                return pid.result()
        pid.cancel()
        log.error("spawner_hangs")
        if self._process is not None:
            self._process.kill()
        raise EngineError(
            f"the worker could not be started: the spawner did not fork within {FORK_LOOKS * FORK_LOOK_S:g} s"
        )

    def close(self) -> None:
        """End the spawner, and with it whatever it started."""
        self._close_link()
        if self._process is not None:
            self._process.wait()

    def _order(self, order: Kill) -> None:
        if self._link is not None:
            with contextlib.suppress(OSError):  # it has just died, and its workers with it
                self._link.send(spawner.encode(order))

    def _readable(self) -> None:
        while self._link is not None:
            try:
                message = self._link.recv(spawner.MAX_ORDER_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self._lost()
                return
            match spawner.decode_report(message):
                case Spawned(number, pid, problem):
                    awaited = self._awaited.pop(number)
                    if not pid:
                        self._ended.pop(number)
                        if not awaited.cancelled():
                            awaited.set_exception(StarvedError(f"the worker could not be started: {problem}"))
                    elif not awaited.cancelled():
                        awaited.set_result(pid)
                case Ended(number, code, peak_bytes):
                    ended = self._ended.pop(number)
                    if not ended.done():
                        ended.set_result(Exit(code, peak_bytes))

    def _lost(self) -> None:
        """The spawner died, and the kernel killed its workers after it."""
        log.error("spawner_ended")
        self._close_link()
        if self._process is not None:
            self._precedence.leave(self._process.pid)
            self._process.wait()
            self._process = None
        for pid in self._awaited.values():
            if not pid.done():
                pid.set_exception(EngineError("the worker could not be started: the spawner died"))
        for ended in self._ended.values():
            if not ended.done():
                ended.set_result(Exit(-signal.SIGKILL))
        self._awaited.clear()
        self._ended.clear()

    def _close_link(self) -> None:
        if self._link is not None:
            asyncio.get_running_loop().remove_reader(self._link.fileno())
            self._link.close()
            self._link = None
