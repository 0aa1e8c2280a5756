"""``fleet job list | show | cancel``. A face, no logic."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from edgefleet_shared.faces import told

from edgefleet_controller.cli.output import document, home_option, json_option, say, table
from edgefleet_controller.client import FleetClient

OWN = "the controller"


@click.group()
def job() -> None:
    """Compile jobs: who does which, who failed at it and how."""


@job.command("list")
@home_option
@click.option("--all", "everything", is_flag=True, help="Also those that have ended.")
@json_option
@told
def list_jobs(home: Path, everything: bool, as_json: bool) -> None:
    """List compile jobs that have not ended, the oldest first."""
    jobs = FleetClient(home).jobs(unfinished=not everything)
    if as_json:
        document(jobs)
        return
    rows = [
        (j["id"], f"{j['model']} {j['version']}", j["device_class"], j["state"], _worker(j), _doing(j)) for j in jobs
    ]
    table("compile jobs", ("job", "model", "class", "state", "worker", "what"), rows)


@job.command()
@home_option
@click.argument("name", metavar="JOB")
@json_option
@told
def show(home: Path, name: str, as_json: bool) -> None:
    """Show a compile job, and which workers failed at it by their own machine's fault."""
    found = FleetClient(home).job(name)
    if as_json:
        document(found)
        return
    say(f"{found['model']} {found['version']} for {found['device_class']}: {found['state']}")
    rows = [("worker", _worker(found)), ("tries", found["attempts"]), ("what", _doing(found))]
    if found["error"] and found["error"]["hint"]:
        rows.append(("what to do", found["error"]["hint"]))
    table("", ("", ""), rows)
    if found["failures"]:
        failed = [
            (f["worker"] or OWN, f"{time.time() - f['at']:.0f} s ago", f["error"]["message"], f["error"]["hint"])
            for f in found["failures"]
        ]
        table("failed at it", ("worker", "when", "how", "what to do there"), failed)


@job.command()
@home_option
@click.argument("name", metavar="JOB")
@told
def cancel(home: Path, name: str) -> None:
    """End a compile job, wherever it runs."""
    FleetClient(home).cancel_job(name)
    say(f"job {name} is cancelled")


def _worker(told: dict[str, Any]) -> str:
    return str(told["worker"]) or (OWN if told["started_at"] else "")


def _doing(told: dict[str, Any]) -> str:
    return str(told["error"]["message"] if told["error"] else told["step"])
