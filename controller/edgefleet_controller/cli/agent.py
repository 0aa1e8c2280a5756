"""``fleet agent add | list``. A face, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from edgefleet_shared.assignment import AGENT
from edgefleet_shared.faces import told

from edgefleet_controller.cli.model import keys_option
from edgefleet_controller.cli.output import document, home_option, json_option, say, table


@click.group()
def agent() -> None:
    """Versions of the agent itself: add, look at; `fleet rollout` brings them to boards."""


@agent.command()
@home_option
@click.argument("wheels", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--class", "classes", multiple=True, help="For this device class; default: every registered one.")
@click.option("--no-sign", is_flag=True, help="Only upload; boards take nothing that is not signed.")
@keys_option
@json_option
@told
def add(
    home: Path, wheels: tuple[Path, ...], classes: tuple[str, ...], no_sign: bool, keys: Path | None, as_json: bool
) -> None:
    """Add a version of the agent from its WHEELS (edgefleet-agent and edgefleet-shared), sign it with each class's release key."""
    from edgefleet_controller.agent_version import add as add_version

    added = add_version(home, wheels, classes, None if no_sign else keys or home / "keys" / "offline")
    if as_json:
        document(added)
    else:
        _show([added])
        say(f"bring it to boards with a rollout of model {AGENT}, version {added['version']}")


@agent.command("list")
@home_option
@json_option
@told
def list_agents(home: Path, as_json: bool) -> None:
    """List the versions of the agent."""
    from edgefleet_controller.client import FleetClient

    agents = FleetClient(home).agents()
    if as_json:
        document(agents)
    else:
        _show(agents)


def _show(agents: list[dict[str, Any]]) -> None:
    rows = [
        (a["version"], ", ".join(f"{made['class']} ({made['state']})" for made in a["artifacts"]),
         ", ".join(f"{name} {bounds}".strip() for name, bounds in sorted(a["requires"].items())))
        for a in agents
    ]  # fmt: skip
    table("agents", ("version", "for classes", "needs of the board's package"), rows)
