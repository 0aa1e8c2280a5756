"""``fleet rollout create | plan | watch | status | pause | resume | abort | rollback | list``. A face, no logic."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from edgefleet_shared.errors import InputError
from edgefleet_shared.faces import told
from rich.console import Group
from rich.live import Live
from rich.text import Text

from edgefleet_controller.cli.output import console, document, grid, home_option, json_option, say, table
from edgefleet_controller.client import FleetClient
from edgefleet_controller.manifests import Rollout
from edgefleet_controller.manifests.files import load_manifests, of_kind

F = TypeVar("F", bound=Callable[..., Any])

POLL_S = 0.5
_COLOURS = {
    "took": "green", "had_it": "green", "passed": "green", "succeeded": "green", "in_flight": "yellow",
    "failed": "red", "stuck": "red", "rolled_back": "magenta", "returned": "magenta", "returning": "magenta",
}  # fmt: skip


@click.group()
def rollout() -> None:
    """Rollouts: plan, start, watch, steer."""


def manifest_options(command: F) -> F:
    """``-f FILE``, and what may differ from it."""
    for option in (
        click.option("--version", "version", default="", help="Another model version than the manifest's."),
        click.option("--name", default="", help="Another name than the manifest's."),
        click.option(
            "-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="The Rollout manifest."
        ),
    ):
        command = option(command)
    return command


def _manifest(path: Path, name: str, version: str) -> dict[str, Any]:
    found = of_kind(load_manifests(path), Rollout)
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} Rollout manifests, expected 1")
    value = found[0].model_dump(mode="json", exclude_none=True)
    if name:
        value["metadata"]["name"] = name
    if version:
        value["spec"]["version"] = version
    return value


@rollout.command()
@home_option
@manifest_options
@json_option
@told
def create(home: Path, path: Path, name: str, version: str, as_json: bool) -> None:
    """Start a rollout. It runs in the controller; watch it with `fleet rollout watch`."""
    made = FleetClient(home).create_rollout(_manifest(path, name, version))
    if as_json:
        document(made)
    else:
        say(f"rollout {made['name']}: {len(made['boards'])} boards; watch it: fleet rollout watch {made['name']}")


@rollout.command()
@home_option
@manifest_options
@json_option
@told
def plan(home: Path, path: Path, name: str, version: str, as_json: bool) -> None:
    """Say for every board what it would get and in which wave, or why not. Changes nothing."""
    rows = FleetClient(home).plan_rollout(_manifest(path, name, version))
    if as_json:
        document(rows)
    else:
        shown = [(r["device"], r["device_class"], r["wave"], r["manifest"][:19], r["why"]) for r in rows]
        table("plan", ("device", "class", "wave", "artifact", "why"), shown)


@rollout.command("list")
@home_option
@json_option
@told
def list_rollouts(home: Path, as_json: bool) -> None:
    """List rollouts."""
    rows = FleetClient(home).rollouts()
    if as_json:
        document(rows)
    else:
        table("rollouts", ("rollout", "model", "version", "phase", "reason"),
              [(r["name"], r["model"], r["version"], r["phase"], r["reason"]) for r in rows])  # fmt: skip


@rollout.command()
@home_option
@click.argument("name")
@json_option
@told
def status(home: Path, name: str, as_json: bool) -> None:
    """Show a rollout as it is now: waves, gates, every board and why."""
    state = FleetClient(home).rollout(name)
    if as_json:
        document(state)
    else:
        console.print(render(state))


@rollout.command()
@home_option
@click.argument("name")
@click.option("--timeout", "timeout_s", default=0.0, help="Give up watching after so many seconds; 0 never.")
@json_option
@told
def watch(home: Path, name: str, timeout_s: float, as_json: bool) -> None:
    """Watch a rollout until it ends. Ends with 0 only when it succeeded, with 3 when the time is up."""
    client = FleetClient(home)
    state = client.rollout(name)
    end = time.monotonic() + timeout_s if timeout_s else float("inf")
    if as_json:
        while not state["ended"] and time.monotonic() < end:
            time.sleep(POLL_S)
            state = client.rollout(name)
        document(state)
    else:
        with Live(render(state), console=console, refresh_per_second=4) as live:
            while not state["ended"] and time.monotonic() < end:
                time.sleep(POLL_S)
                state = client.rollout(name)
                live.update(render(state))
    if state["phase"] != "succeeded":
        sys.exit(1 if state["ended"] else 3)


def _intent(kind: str, text: str) -> Callable[..., None]:
    @rollout.command(kind, help=text)
    @home_option
    @click.argument("name")
    @json_option
    @told
    def act(home: Path, name: str, as_json: bool) -> None:
        state = FleetClient(home).intend(name, kind)
        if as_json:
            document(state)
        else:
            say(f"rollout {name}: {kind} is noted; it is {state['phase']}")

    return act


pause = _intent("pause", "Send nothing to any board until it is resumed.")
resume = _intent("resume", "Go on with a paused rollout.")
abort = _intent("abort", "Stop here and leave the boards as they are.")
rollback = _intent("rollback", "Bring every touched board back to what it had, also those that took it.")


def render(state: dict[str, Any]) -> Group:
    """A rollout as a table of boards under its gates; used by the demo too."""
    boards = grid(
        ("wave", "board", "class", "state", "standing", "outcome", "signed", "why"),
        [
            (b["wave"], b["device"], b["device_class"], b["state"], Text(b["standing"], style=_COLOURS.get(b["standing"], "")),
             b["outcome"], {True: "yes", False: "no", None: ""}[b["signed"]], b["reason"] or b["back_reason"])
            for b in state["boards"]
        ],
    )  # fmt: skip
    head = Text.assemble(
        ("rollout ", "bold"), state["name"], "  ", state["model"], " ", state["version"], "  ",
        (state["phase"], _COLOURS.get(state["phase"], "bold")), "  ", state["reason"] or "",
    )  # fmt: skip
    gates = [
        Text.assemble("gate ", gate["wave"], " / ", gate["device_class"], ": ",
                      (gate["verdict"], _COLOURS.get(gate["verdict"], "")), "  ", gate["reason"] or "")
        for gate in state["gates"]
    ]  # fmt: skip
    return Group(head, boards, *gates)
