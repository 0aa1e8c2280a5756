"""``fleet model add | compile | sign | list | show | compare | report | log``. A face, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from edgefleet_shared.faces import told

from edgefleet_controller.cli.output import (
    document,
    home_option,
    json_option,
    megabytes,
    milliseconds,
    progress,
    say,
    table,
)


@click.group()
def model() -> None:
    """Model versions: add, compile, sign, look at."""


keys_option = click.option("--keys", type=click.Path(path_type=Path), help="Offline keys; default HOME/keys/offline.")


@model.command()
@home_option
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="The Model manifest.")
@click.option("--version", "version", default="", help="Add it as this version, instead of the manifest's.")
@json_option
@told
def add(home: Path, path: Path, version: str, as_json: bool) -> None:
    """Add a model version: check the network and its data here, upload them. Versions never change."""
    from edgefleet_controller.adding import add_model

    with progress() as show:
        added = add_model(home, path, version, lambda doing, done, total: show(path.name, doing, done / (total or 1)))
    if as_json:
        document(added)
    else:
        say(f"{added['model']} {added['version']} added; compile it: fleet model compile {added['model']} {added['version']}")  # fmt: skip


@model.command("compile")
@home_option
@click.argument("name")
@click.argument("version")
@click.option("--class", "classes", multiple=True, help="For this device class; default: every registered one.")
@click.option("--ship-despite-quality", is_flag=True, help="Pack and sign it although it misses its budgets.")
@click.option("--no-sign", is_flag=True, help="Only compile; `fleet model sign` can follow elsewhere.")
@keys_option
@json_option
@told
def compile_model(
    home: Path,
    name: str,
    version: str,
    classes: tuple[str, ...],
    ship_despite_quality: bool,
    no_sign: bool,
    keys: Path | None,
    as_json: bool,
) -> None:
    """Compile a version per device class, measure each result, sign it with the class's release key."""
    from edgefleet_controller.adding import compile_and_sign

    with progress() as show:
        shown = compile_and_sign(
            home, name, version, classes, despite_quality=ship_despite_quality,
            keys=None if no_sign else keys or home / "keys" / "offline", show=show,
        )  # fmt: skip
    if as_json:
        document(shown)
    else:
        _artifacts(f"{name} {version}", shown["artifacts"])


@model.command()
@home_option
@click.argument("name")
@click.argument("version")
@keys_option
@json_option
@told
def sign(home: Path, name: str, version: str, keys: Path | None, as_json: bool) -> None:
    """Sign what was compiled and not signed yet, after checking that it is what was meant."""
    from edgefleet_controller.adding import sign_compiled

    signed = sign_compiled(home, name, version, keys or home / "keys" / "offline")
    if as_json:
        document({"signed": signed})
    else:
        say(f"signed for: {', '.join(signed) or 'nothing was left to sign'}")


@model.command("list")
@home_option
@json_option
@told
def list_models(home: Path, as_json: bool) -> None:
    """List model versions."""
    from edgefleet_controller.client import FleetClient

    models = FleetClient(home).models()
    if as_json:
        document(models)
    else:
        rows = [
            (m["model"], m["version"], ", ".join(f"{a['class']} ({a['state']})" for a in m["artifacts"]))
            for m in models
        ]
        table("models", ("model", "version", "artifacts"), rows)


@model.command()
@home_option
@click.argument("name")
@click.argument("version", required=False, default="")
@json_option
@told
def show(home: Path, name: str, version: str, as_json: bool) -> None:
    """Show a model's versions with every artifact's figures."""
    from edgefleet_shared.errors import NotFoundError

    from edgefleet_controller.client import FleetClient

    models = FleetClient(home).models(name, version)
    if not models:
        raise NotFoundError(f"no model {name} {version}".rstrip(), hint="fleet model list shows them")
    if as_json:
        document(models)
        return
    for one in models:
        _artifacts(f"{one['model']} {one['version']}  {one['digest'][:19]}", one["artifacts"])
        for failed in one["failed"]:
            say(f"the last compile for {failed['class']} failed: {failed['error']['message']}")


@model.command()
@home_option
@click.argument("name")
@click.argument("before")
@click.argument("after")
@json_option
@told
def compare(home: Path, name: str, before: str, after: str, as_json: bool) -> None:
    """Compare two versions of a model, class by class."""
    from edgefleet_controller.adding import compare_versions

    rows = compare_versions(home, name, before, after)
    if as_json:
        document([row._asdict() for row in rows])
    else:
        table(f"{name}: {before} and {after}", ("class", "figure", before, after, ""), rows)


@model.command()
@home_option
@click.argument("name")
@click.argument("version")
@click.argument("device_class")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the page (HTML) there.")
@json_option
@told
def report(home: Path, name: str, version: str, device_class: str, output: Path | None, as_json: bool) -> None:
    """The quality report of the last compile for a class, also of one that missed its budgets: every candidate, noise by layer, answers that changed."""
    import json

    from edgefleet_controller.adding import fetch_report

    if as_json:
        document(json.loads(fetch_report(home, name, version, device_class, page=False)))
        return
    target = output or Path(f"{name}-{version}-{device_class}.html")
    target.write_bytes(fetch_report(home, name, version, device_class, page=True))
    say(f"written to {target}")


@model.command()
@home_option
@click.argument("name")
@click.argument("version")
@click.argument("device_class")
@told
def log(home: Path, name: str, version: str, device_class: str) -> None:
    """What the toolchains printed when this was last compiled, wherever that was."""
    from edgefleet_controller.client import FleetClient

    click.echo(FleetClient(home).log(name, version, device_class))


def _artifacts(title: str, artifacts: list[dict[str, Any]]) -> None:
    rows = []
    for a in artifacts:
        q, t = a["quality"], a["timings"]
        agreement = latency = None
        if q.get("agreement") is not None:
            agreement = f"{q['agreement']:.3f} ({q['agreement_low']:.3f} to {q['agreement_high']:.3f})"
        if t.get("p50_ms") is not None:
            beside = "unmeasured" if t["float_p50_ms"] is None else milliseconds(t["float_p50_ms"])
            latency = f"{milliseconds(t['p50_ms'])} / {milliseconds(t['p95_ms'])} (float {beside})"
        size = f"{megabytes(q['float_bytes'])} -> {megabytes(q['compiled_bytes'])}"
        state = "; ".join(filter(None, [a["state"], q.get("recipe"), *q["misses"]]))
        rows.append((a["class"], a["engine"], a["arch"], size, agreement, latency, state))
    table(title, ("class", "engine", "arch", "size", "agreement (95 %)", "p50 / p95 ms", "state"), rows)
    for caution in dict.fromkeys(caution for a in artifacts for caution in a["quality"].get("cautions", [])):
        say(f"caution: {caution}")
