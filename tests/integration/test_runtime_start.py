"""The start of the runtime: orders that come while it tries what its slots name, one after the other, and a disk that takes nothing."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from edgefleet_agent.runtime import control
from edgefleet_agent.runtime.nursery import Nursery
from edgefleet_agent.runtime.orders import Orders
from edgefleet_agent.runtime.switchboard import Switchboard
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Layout
from support import artifacts
from support.broker import free_port
from support.runtimes import Runtime, until


class Board:
    """A runtime without clients: its active artifact dies while it is loaded, the previous one is good, and there is another."""

    def __init__(self, folder: Path) -> None:
        layout = Layout(folder)

        def made(version: int, **options: Any) -> str:
            return artifacts.make_artifact(layout, version=str(version), seed=version, **options).digest

        self.bad, self.previous, self.other = made(1, behaviour="crash"), made(2), made(3)
        self.nursery = Nursery(1)
        self.switchboard = Switchboard()
        self.orders = Orders(layout, 1, self.nursery, self.switchboard)

    async def started(self, *expected: str, orders: tuple[Callable[[Orders], Awaitable[Any]], ...]) -> None:
        """Start, with ``orders`` given in this order while the first artifact is loaded; the others are over when this returns."""
        self.orders.expect(list(expected))
        starting = asyncio.create_task(self.orders.serve_at_start())
        await asyncio.sleep(0)
        await asyncio.gather(*(order(self.orders) for order in orders))
        await starting

    def workers(self) -> int:
        spawner = next(iter(v.pid for v in self.switchboard.versions() if v.pid))
        parent = int(Path(f"/proc/{spawner}/stat").read_text().rpartition(")")[2].split()[1])
        return len(Path(f"/proc/{parent}/task/{parent}/children").read_text().split())

    async def end(self) -> None:
        await self.orders.close()
        self.nursery.close()


def told(story: Callable[[Board], Awaitable[None]], folder: Path) -> None:
    async def whole() -> None:
        board = Board(folder)
        try:
            await story(board)
        finally:
            await board.end()

    asyncio.run(whole())


def test_what_an_agent_has_loaded_meanwhile_is_not_loaded_a_second_time_beside_it(tmp_path: Path) -> None:
    """As one does that was interrupted while it rolled back; the second worker would never have been ended."""

    async def story(board: Board) -> None:
        await board.started(board.bad, board.previous, orders=(lambda s: s.load(board.previous),))
        assert board.orders.status().serving == board.previous
        assert board.switchboard.ready
        assert board.workers() == 1

    told(story, tmp_path)


@pytest.mark.parametrize("behind", ["a good one", "nothing"])
def test_what_an_agent_has_switched_to_meanwhile_goes_on_serving(tmp_path: Path, behind: str) -> None:
    async def story(board: Board) -> None:
        expected = [board.bad, board.previous] if behind == "a good one" else [board.bad]
        orders = (lambda s: s.load(board.other), lambda s: s.switch(board.other))
        await board.started(*expected, orders=orders)
        assert board.orders.status().serving == board.other
        assert board.switchboard.ready

    told(story, tmp_path)


def test_what_was_loaded_in_place_meanwhile_is_started(tmp_path: Path) -> None:
    async def story(board: Board) -> None:
        await board.started(board.bad, board.previous, orders=(lambda s: s.load(board.previous, "in-place"),))
        assert board.orders.status().serving == board.previous
        assert board.switchboard.ready
        assert board.workers() == 1

    told(story, tmp_path)


def test_a_disk_that_takes_nothing_keeps_no_client_from_being_served_and_orders_are_taken_once_it_does(
    tmp_path: Path,
) -> None:
    """It was full, or had gone read-only, when the board started: the model that is on it did not serve any more."""
    runtime = Runtime(tmp_path / "state")
    runtime.install(runtime.add("1"))
    # What is in the way refuses a file and a socket their names, to root too: where a folder can't be put aside either.
    asides = [f"http.addr.damaged{f'-{number}' if number > 1 else ''}" for number in range(1, atomic.ASIDES + 1)]
    refusing = [runtime.state / "run" / name for name in ("http.addr", *asides, "control.sock")]
    for name in refusing:
        (name / "in the way").mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "edgefleet_agent.runtime.app", "--state", str(runtime.state)]
    with subprocess.Popen([*command, "--http", f"127.0.0.1:{port}"]) as process:
        try:
            until(lambda: asked(port, "/v2/health/ready") == 200, what="it serving")
            for name in refusing:
                shutil.rmtree(name)
            until(lambda: control.socket_path(runtime.state).exists(), what="orders being taken")
            assert runtime.client.ping().pid == process.pid
        finally:
            process.terminate()
        assert process.wait(20) == 0


def asked(port: int, path: str) -> int:
    """The status of the answer, 0 for none."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
