"""``fleet worker token | run | list | revoke``. A face, no logic."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from edgefleet_shared import logs
from edgefleet_shared.faces import told

from edgefleet_controller.cli.output import document, home_option, json_option, say, table
from edgefleet_controller.client import FleetClient
from edgefleet_controller.settings import CACHE_LIMIT_BYTES, default_cache


@click.group()
def worker() -> None:
    """Machines that compile for the fleet, and boards that measure for the compiler."""


@worker.command()
@home_option
@click.option("--name", required=True, help="The worker's name.")
@click.option(
    "--class", "device_class", default="", help="A builder board of this class: it measures, it does not compile."
)
@click.option("--ttl", default=3600.0, show_default=True, help="Seconds that the token is valid.")
@json_option
@told
def token(home: Path, name: str, device_class: str, ttl: float, as_json: bool) -> None:
    """Make a one-time enrolment token for one worker.

    A machine that compiles takes it by `fleet worker run`, a builder board by `fleet-agent enroll`, then `fleet-agent measure`.
    """
    made = FleetClient(home).token(device_class, device=name, ttl_s=ttl, role="worker")
    if as_json:
        document({"token": made})
    else:
        click.echo(made)


@worker.command()
@click.option(
    "--controller",
    "url",
    envvar="EDGEFLEET_CONTROLLER",
    default="",
    help="The controller, https://host:port; with the token, the first time.",
)
@click.option(
    "--token",
    envvar="EDGEFLEET_TOKEN",
    default="",
    help="From fleet worker token; the first time, and another one after it was revoked.",
)
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path("worker"), show_default=True,
    help="The worker's identity and blobs.",
)  # fmt: skip
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="How many jobs at once.")
@click.option(
    "--cache-limit-bytes", envvar="EDGEFLEET_CACHE_LIMIT_BYTES", default=CACHE_LIMIT_BYTES, show_default=True, type=click.IntRange(1),
    help="Compiled models in the cache that were not used for a day go, oldest first, above this.",
)  # fmt: skip
@told
def run(url: str, token: str, folder: Path, jobs: int, cache_limit_bytes: int) -> None:
    """Compile for a controller on another machine, until SIGTERM. Needs no fleet's home."""
    from edgefleet_controller.compile import remote

    logs.configure()
    if token and not remote.is_of(folder, token):
        if not url:
            raise click.UsageError("--token goes with --controller")
        remote.enrol(folder, url, token)
    remote.run(folder, default_cache(), cache_limit_bytes, workers=jobs)


@worker.command("list")
@home_option
@json_option
@told
def list_workers(home: Path, as_json: bool) -> None:
    """List workers: what they do, which edgefleet they run, when they last asked for work."""
    workers = FleetClient(home).workers()
    if as_json:
        document(workers)
        return
    rows = [
        (w["name"], f"measures for {w['device_class']}" if w["device_class"] else "compiles", _version(w),
         "revoked" if w["revoked"] else _seen(w["last_seen"]))
        for w in workers
    ]  # fmt: skip
    table("workers", ("worker", "what it does", "edgefleet", "last seen"), rows)


@worker.command()
@home_option
@click.argument("name")
@told
def revoke(home: Path, name: str) -> None:
    """Take a worker's rights, at once. What it was doing is given to others when its lease ends."""
    FleetClient(home).revoke_worker(name)
    say(f"worker {name} is revoked")


def _version(worker: dict[str, Any]) -> str:
    told = worker["edgefleet"]
    return str(told) if worker["fits"] else f"{told or 'unknown'}: not the controller's, gets no work"


def _seen(at: float) -> str:
    return f"{time.time() - at:.0f} s ago" if at else "never"
