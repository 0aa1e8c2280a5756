"""``fleet-runtime``: the composition root of the board's inference server. Receives a state folder, serves what its slots name."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import click
import uvloop
from edgefleet_shared import atomic, logs
from edgefleet_shared.errors import ArtifactError, EdgefleetError, EnvironmentProblem, InputError

from edgefleet_agent import notify, slots
from edgefleet_agent.runtime import activation, control
from edgefleet_agent.runtime.body_room import room
from edgefleet_agent.runtime.control_server import KEEPS_FILE, bind_unix, serve_control
from edgefleet_agent.runtime.front import Front
from edgefleet_agent.runtime.http import MAX_CONNECTIONS, Server
from edgefleet_agent.runtime.memory import available_memory_bytes
from edgefleet_agent.runtime.nursery import Nursery
from edgefleet_agent.runtime.orders import Orders
from edgefleet_agent.runtime.regions import Regions
from edgefleet_agent.runtime.switchboard import Switchboard

log = logging.getLogger("edgefleet.runtime")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TICK_S = 0.25
DRAIN_LIMIT_S = 10.0
AGAIN_S = 5.0  # between two tries of what the disk refused


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--state", required=True, type=click.Path(path_type=Path, file_okay=False), help="The agent's state folder."
)
@click.option(
    "--http",
    default="127.0.0.1:8000",
    show_default=True,
    help="Loopback HOST:PORT of the Open Inference Protocol; port 0 picks a free one, 'off' serves none.",
)
@click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), help="Its Unix socket; default STATE/run/infer.sock."
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 256), help="Threads of one inference.")
def main(state: Path, http: str, socket_path: Path | None, threads: int) -> None:
    """Serve the board's model over the Open Inference Protocol (KServe v2)."""
    logs.configure()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, most)
    )  # each client takes one; shells and containers begin with 1,024
    try:
        run_folder = state.resolve() / "run"
        with atomic.lock(run_folder, "fleet-runtime"):
            uvloop.install()
            asyncio.run(serve(state.resolve(), parse_address(http), socket_path or run_folder / "infer.sock", threads))
    except EdgefleetError as exc:
        click.echo(f"fleet-runtime: {exc}", err=True)
        sys.exit(exc.exit_status)


def parse_address(text: str) -> tuple[str, int] | None:
    """``HOST:PORT`` on loopback, or None for ``off``.

    Raises:
        InputError: not an address, or one that other machines could reach: requests are not authenticated.
    """
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit() or int(port) > 65535:
        raise InputError(f"--http takes HOST:PORT, not {text!r}")
    if host not in LOOPBACK:
        raise InputError(
            f"{host!r} is not loopback", hint="requests carry no identity: put a proxy that checks one in front"
        )
    return host, int(port)


async def serve(state: Path, address: tuple[str, int] | None, socket_path: Path, threads: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        EnvironmentProblem: port or socket can't be taken.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    nursery = Nursery(threads)
    nursery.open()  # while nobody waits for an answer
    switchboard = Switchboard()
    orders = Orders(slots.artifacts(state), threads, nursery, switchboard)
    server: Server
    regions = Regions()
    front = Front(switchboard, regions, lambda: _gauges(switchboard, orders, server, regions))
    server = Server(front, room(available_memory_bytes()))

    orders.expect(_serving(state))
    servers: list[asyncio.AbstractServer] = []
    where = []
    for listener in _listeners(address, socket_path):
        listener.setblocking(False)
        if listener.family == socket.AF_UNIX:
            servers.append(
                await loop.create_unix_server(server.connection, sock=listener, backlog=MAX_CONNECTIONS, **KEEPS_FILE)
            )
            bound = str(listener.getsockname())
            where.append(str(socket_path) if bound.startswith("/proc/self/") else bound)  # see control.short_path
            continue
        servers.append(await loop.create_server(server.connection, sock=listener, backlog=MAX_CONNECTIONS))
        host, port = listener.getsockname()[:2]
        _tell_address(state, f"{host}:{port}")
        where.append(f"http://{host}:{port}")
    # Last, so that whoever reaches the runtime there knows that its clients do.
    refused = await _take_orders(state, orders, servers)
    if refused:
        log.error("takes_no_orders", extra={"problem": refused})
    # What is here now stays; the collector need not look at it again in the middle of a request.
    gc.collect()
    gc.freeze()
    log.info("listening", extra={"addresses": where})
    notify.ready(f"listening at {' and '.join(where)}")

    starting = loop.create_task(orders.serve_at_start())
    ticking = loop.create_task(_tick(switchboard, orders, nursery, server, regions))
    retrying = loop.create_task(_take_orders_later(state, orders, servers)) if refused else None
    await stop.wait()

    log.info("stopping")
    notify.stopping()
    starting.cancel()
    if retrying is not None:
        retrying.cancel()
    for listening in servers:
        listening.close()
    if not switchboard.ready:  # nothing that waits would be answered in time: tell it so
        await _close(orders)
    await server.close(DRAIN_LIMIT_S)
    ticking.cancel()
    await _close(orders)
    nursery.close()


def _tell_address(state: Path, address: str) -> None:
    """Where it listens, for whoever has to find that out. A disk that is full or read-only keeps no client from being served."""
    try:
        atomic.write(state / "run" / "http.addr", f"{address}\n".encode())
    except EnvironmentProblem as exc:
        log.error("address_not_written", extra={"problem": exc.message})


async def _take_orders(state: Path, orders: Orders, servers: list[asyncio.AbstractServer]) -> str:
    """Open the control socket; why that is refused, empty when it is not. What serves needs no orders to go on."""
    try:
        listener = bind_unix(control.socket_path(state), 0o600)
    except OSError as exc:
        return exc.strerror or str(exc)
    servers.append(await serve_control(listener, orders))
    return ""


async def _take_orders_later(state: Path, orders: Orders, servers: list[asyncio.AbstractServer]) -> None:
    while await _take_orders(state, orders, servers):
        await asyncio.sleep(AGAIN_S)
    log.info("takes_orders")


async def _close(orders: Orders) -> None:
    try:
        await asyncio.wait_for(orders.close(), DRAIN_LIMIT_S)
    except asyncio.TimeoutError:
        log.warning("stopped_before_every_answer")


def _serving(state: Path) -> list[str]:
    """The artifacts to try at start, best first."""
    try:
        found = slots.read(state)
    except ArtifactError as exc:
        log.error("slots_damaged", extra={"problem": exc.message})
        return []
    wanted = [found.serving, found.active, found.previous]
    return list(dict.fromkeys(slot.manifest for slot in wanted if slot is not None))


async def _tick(switchboard: Switchboard, orders: Orders, nursery: Nursery, server: Server, regions: Regions) -> None:
    period = notify.watchdog_period_s()
    fed = 0.0
    while True:
        await asyncio.sleep(TICK_S)
        switchboard.tick()
        orders.tick()
        nursery.look()
        server.tick()
        regions.tick()
        if period is not None and time.monotonic() - fed >= period / 2:
            fed = time.monotonic()
            notify.alive()


def _gauges(switchboard: Switchboard, orders: Orders, server: Server, regions: Regions) -> dict[str, float]:
    return {
        "waiting_requests": switchboard.waiting,
        "free_slots": sum(version.free_slots for version in switchboard.versions()),
        "connections": len(server.connections),
        "held_body_bytes": server.bodies.held_bytes,
        "held_answer_bytes": server.untaken.held_bytes,
        "refused_connections": server.refused,
        "swaps": orders.swaps,
        "shared_memory_regions": len(regions),
    }


def _listeners(address: tuple[str, int] | None, socket_path: Path) -> list[socket.socket]:
    """Where clients reach the runtime: the sockets that systemd holds (ADR 0006), else a Unix socket and a port of its own.

    A socket unit without a port means no port: an operator closed it.
    """
    found = activation.inherited()
    for taken in found:
        if taken.family != socket.AF_UNIX and taken.getsockname()[0] not in LOOPBACK:
            raise EnvironmentProblem(
                f"systemd listens at {taken.getsockname()[0]}, which is not loopback",
                hint="requests carry no identity: put a proxy that checks one in front",
            )
    if address is not None and not found:
        found.append(_tcp(*address))
    if not any(taken.family == socket.AF_UNIX for taken in found):
        found.append(_unix(socket_path))
    return found


def _unix(path: Path) -> socket.socket:
    if len(str(path).encode()) > 107:
        log.warning(
            "socket_path_too_long", extra={"path": str(path), "hint": "clients can't connect to it; use --socket"}
        )
    try:
        return bind_unix(path, 0o660)
    except OSError as exc:
        raise EnvironmentProblem(f"can't listen at {path}: {exc.strerror or exc}") from exc


def _tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as exc:
        listener.close()
        raise EnvironmentProblem(
            f"can't listen at {host}:{port}: {exc.strerror}", hint="choose another with --http HOST:PORT"
        ) from exc
    return listener


if __name__ == "__main__":
    main()
