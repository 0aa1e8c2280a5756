"""``fleet device token | list | show | label | revoke``. A face, no logic."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from edgefleet_shared.clock import iso
from edgefleet_shared.faces import told

from edgefleet_controller.cli.output import document, home_option, json_option, megabytes, say, table
from edgefleet_controller.client import FleetClient


@click.group()
def device() -> None:
    """Boards: enrol, look at."""


@device.command()
@home_option
@click.option("--class", "device_class", required=True, help="The board's device class.")
@click.option("--site", default="", help="Where it stands.")
@click.option("--name", default="", help="The board's name; without it the board may choose.")
@click.option("--ttl", default=3600.0, show_default=True, help="Seconds that the token is valid.")
@json_option
@told
def token(home: Path, device_class: str, site: str, name: str, ttl: float, as_json: bool) -> None:
    """Make a one-time enrolment token for one board."""
    made = FleetClient(home).token(device_class, site=site, device=name, ttl_s=ttl)
    if as_json:
        document({"token": made})
    else:
        click.echo(made)


@device.command("list")
@home_option
@json_option
@told
def list_devices(home: Path, as_json: bool) -> None:
    """List boards: what they serve, how their last assignment ended."""
    boards = FleetClient(home).devices()
    if as_json:
        document(boards)
        return
    rows = [
        (b["name"], b["class"], b["site"], _labels(b["labels"]), "online" if b["online"] else f"offline {_ago(b['last_seen'])}",
         f"{b['model']} {b['version']}".strip(), "revoked" if b["revoked"] else b["state"], b["outcome"], b["problem"] or b["result_refused"] or b["refusal"] or b["reason"])
        for b in boards
    ]  # fmt: skip
    table("devices", ("device", "class", "site", "labels", "line", "serves", "state", "outcome", "why"), rows)


@device.command()
@home_option
@click.argument("name")
@told
def revoke(home: Path, name: str) -> None:
    """Take a board out of the fleet: one that is lost, or whose card died.

    It gets no assignment and no blob any more, its results count for nothing, its certificate is not renewed, and its name is free
    for a board that is enrolled anew. The broker goes on letting the old certificate in until that ends: it can read what every
    board may read, and what is said to its name. A board that may be in wrong hands should be replaced under another name.
    """
    FleetClient(home).revoke_device(name)
    say(f"device {name} is revoked")


@device.command()
@home_option
@click.argument("name")
@click.argument("changes", metavar="[KEY=VALUE | KEY-]...", nargs=-1)
@json_option
@told
def label(home: Path, name: str, changes: tuple[str, ...], as_json: bool) -> None:
    """Label a board: KEY=VALUE sets a label, KEY- takes it away; without either its labels are shown.

    A rollout's selector may ask for labels. It is held against those that boards have when the rollout is created.
    """
    wished: dict[str, str | None] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals and not change.endswith("-"):
            raise click.BadParameter(f"{change!r} is neither KEY=VALUE nor KEY-")
        key = key if equals else change[:-1]
        if key in wished:
            raise click.BadParameter(f"label {key} is given twice")
        wished[key] = value if equals else None
    client = FleetClient(home)
    labels = client.label_device(name, wished) if wished else client.device(name)["labels"]
    if as_json:
        document(labels)
    else:
        say(f"device {name}: {_labels(labels) or 'no labels'}")


@device.command()
@home_option
@click.argument("name")
@json_option
@told
def show(home: Path, name: str, as_json: bool) -> None:
    """Show one board: slots, fingerprint, last acceptance, health."""
    board = FleetClient(home).device(name)
    if as_json:
        document(board)
        return
    report, health = board.pop("report") or {}, board.pop("health") or {}
    rows = [(key, _shown(key, value)) for key, value in board.items()]
    rows += [(slot, f"{s['model']} {s['version']} ({s['status']})") for slot in ("active", "candidate", "previous") if (s := report.get(slot))]  # fmt: skip
    fingerprint = report.get("fingerprint") or {}
    rows += [
        (key, _shown(key, fingerprint[key]))
        for key in ("arch", "engines", "memory_bytes", "agent_version", "provides")
        if key in fingerprint
    ]
    own = report.get("agent") or {}
    rows += [
        (f"agent {slot}", f"{s['version']} ({s['status']})")
        for slot in ("active", "candidate", "previous")
        if (s := own.get(slot))
    ]
    rows += [(f"agent {what}", own[what]) for what in ("state", "refusal", "problem") if own.get(what)]
    if ended := own.get("ended"):
        rows.append(("agent outcome", f"{ended['outcome']} {ended['reason']}".rstrip()))
    acceptance = (report.get("ended") or {}).get("acceptance") or {}
    rows += [(f"acceptance {kind}", what) for kind in ("unmeasured", "unconfined") for what in acceptance.get(kind, ())]
    for row in acceptance.get("measurements", ()):
        rows.append(
            (f"acceptance {row['name']}", f"{row['verdict']}: {row['value']} against {row['limit']} {row['unit']}")
        )
    drift = health.pop("drift", None)
    rows += [(f"health {key}", _shown(key, value)) for key, value in health.items() if key != "type"]
    rows += _drift(drift) if drift else []
    table(name, ("what", "value"), rows)


def _labels(labels: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in labels.items())


def _drift(drift: dict[str, Any]) -> list[tuple[str, str]]:
    """How far what the model sees and says is from its golden set."""
    if drift["psi"] is None:
        return [("drift", drift["note"])]
    rows = [
        ("drift", f"psi {drift['psi']:.2f} over {drift['samples']} requests; inputs repeated {drift['repeated']:.0%}")
    ]
    if drift["classes"] is not None:
        rows.append(("drift classes", f"divergence {drift['classes']:.2f}"))
    for tensor in drift["tensors"]:
        moved = "" if tensor["shift"] is None else f", mean moved by {tensor['shift']:.1f} sd"
        broken = f", {tensor['non_finite']:.1%} not finite" if tensor["non_finite"] else ""
        channels = " ".join(f"{channel['psi']:.2f}" for channel in tensor["channels"])
        by_channel = f", by channel {channels}" if channels else ""
        rows.append((f"drift {tensor['kind']} {tensor['name']}", f"psi {tensor['psi']:.2f}{by_channel}{moved}{broken}"))
    return rows


def _ago(at: float) -> str:
    return f"for {time.time() - at:.0f} s" if at else "never seen"


def _shown(key: str, value: Any) -> Any:
    """A value as people read it; ``--json`` gives it as it is."""
    if key in ("last_seen", "enrolled_at") and value:
        return iso(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {value[name]}" for name in sorted(value))
    if key.endswith("_bytes") and value:
        return megabytes(value)
    return f"{value:.3g}" if isinstance(value, float) else value
