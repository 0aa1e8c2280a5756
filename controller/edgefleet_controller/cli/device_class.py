"""``fleet class list | show``. A face, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from edgefleet_shared.errors import NotFoundError
from edgefleet_shared.faces import told

from edgefleet_controller.cli.output import document, home_option, json_option, table
from edgefleet_controller.client import FleetClient


@click.group("class")
def device_class() -> None:
    """Device classes: look at. `fleet apply` registers them."""


@device_class.command("list")
@home_option
@json_option
@told
def list_classes(home: Path, as_json: bool) -> None:
    """List the registered classes, and how far each was proven."""
    classes = FleetClient(home).classes()
    if as_json:
        document(classes)
        return
    rows = [(c["metadata"]["name"], _target(c["spec"]), c["spec"]["build"], c["spec"]["proven"]) for c in classes]
    table("device classes", ("class", "compiled for", "built by", "proven here"), rows)


@device_class.command()
@home_option
@click.argument("name")
@json_option
@told
def show(home: Path, name: str, as_json: bool) -> None:
    """Show one class: what it needs, its budgets, how far it was proven."""
    classes = {c["metadata"]["name"]: c for c in FleetClient(home).classes()}
    if name not in classes:
        raise NotFoundError(f"no device class {name!r}", hint=f"known: {', '.join(classes) or 'none'}")
    if as_json:
        document(classes[name])
        return
    table(name, ("what", "value"), list(_flat(classes[name]["spec"])))


def _target(spec: dict[str, Any]) -> str:
    return f"{spec['arch']}, {spec['engine']} {spec['engine_version']}".rstrip() + f", {spec['precision']}"


def _flat(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The fields that say something, one a row, nested ones by their path."""
    rows: list[tuple[str, Any]] = []
    for key, value in fields.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            rows.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else value))
    return rows
