"""``fleet toolchain install | list | check``. A face, no logic."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click
import msgspec
from edgefleet_shared.faces import told

from edgefleet_controller.cli.output import document, home_option, json_option, megabytes, progress, say, table


@click.group()
def toolchain() -> None:
    """What models are compiled with: environments of their own, and vendors' programs."""


@toolchain.command()
@home_option
@click.argument("names", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every toolchain.")
@click.option("--again", is_flag=True, help="Remove it first, if it is there: mends a broken one.")
@json_option
@told
def install(home: Path, names: tuple[str, ...], every: bool, again: bool, as_json: bool) -> None:
    """Install toolchains from their hashed locks. A compile does it by itself when it first needs one."""
    from edgefleet_shared.errors import InputError

    from edgefleet_controller.compile import inventory

    wanted = tuple(inventory.by_toolchain()) if every else names
    if not wanted:
        raise InputError("name a toolchain, or say --all", hint="fleet toolchain list shows them")
    toolchains = _toolchains(home)
    done = []
    with progress() as show:
        for name in wanted:
            lock = inventory.lock(name)
            toolchains.ensure(lock, lambda doing, n, of, name=name: show(name, doing, n / (of or 1)), again=again)
            done.append(inventory.state(toolchains.root, name))
    if as_json:
        document([msgspec.to_builtins(state) for state in done])
    for state in done if not as_json else ():
        say(f"{state.name}: {len(state.packages)} packages, {megabytes(state.size_bytes)} in {state.folder}")


@toolchain.command("list")
@home_option
@json_option
@told
def list_toolchains(home: Path, as_json: bool) -> None:
    """List toolchains with their state, and vendors' programs."""
    from edgefleet_controller.compile import inventory

    root = _toolchains(home).root
    known = inventory.by_toolchain()
    states = [inventory.state(root, name) for name in known]
    programs = inventory.programs()
    if as_json:
        shown = [
            msgspec.to_builtins(s) | {"targets": [t.name for t in known[s.name]], "use": _use(s.name)} for s in states
        ]
        document(
            {
                "toolchains": shown,
                "programs": [msgspec.to_builtins(p) for p in programs],
                "broken_targets": inventory.broken_targets(),
            }
        )
        return
    rows = []
    for state in states:
        packages = {t.engine_package for t in known[state.name]}
        packages |= {inventory.BESIDE[state.name].package} if state.name in inventory.BESIDE else set()
        versions = ", ".join(f"{p} {state.packages[p]}" for p in sorted(packages & state.packages.keys()))
        size = megabytes(state.size_bytes) if state.size_bytes else f"about {megabytes(state.needs_bytes)}"
        targets = ", ".join(filter(None, [*(target.name for target in known[state.name]), _use(state.name)]))
        rows.append((state.name, targets, state.lock, size, state.problem or "installed", versions))
    table("toolchains", ("name", "targets, or use", "lock", "size", "state", "version"), rows)
    table(
        "vendors' programs",
        ("name", "targets", "version", "where, or what is missing"),
        [(p.name, ", ".join(p.targets), p.version, p.path or p.problem) for p in programs],
    )
    for problem in inventory.broken_targets().values():
        say(f"BAD {problem}")


@toolchain.command()
@home_option
@click.argument("name", required=False)
@json_option
@told
def check(home: Path, name: str | None, as_json: bool) -> None:
    """Look at every file of a toolchain (default: of each installed one), then compile a tiny network by it."""
    from edgefleet_shared.errors import ToolchainError

    from edgefleet_controller.compile import inventory

    toolchains = _toolchains(home)
    found: list[dict[str, Any]] = []
    with progress() as show:
        for one in (name,) if name else inventory.by_toolchain():
            show(one, "looking at every file", 0.0)
            state = inventory.state(toolchains.root, one, every_byte=True)
            if name and not state.installed:
                raise ToolchainError(f"the {name} toolchain is {state.problem}", hint=f"fleet toolchain install {name}")
            if not state.installed:
                continue
            tried = []
            for target in inventory.targets_of(one) if not state.problem else ():
                tried.append(
                    inventory.try_out(toolchains, target, lambda d, n, of, t=target: show(t.name, d, n / (of or 1)))  # type: ignore[misc]
                )
            if not state.problem:
                beside = inventory.try_out_beside(toolchains, one, lambda d, n, of, t=one: show(t, d, n / (of or 1)))  # type: ignore[misc]
                tried += [] if beside is None else [beside]
            found.append({"toolchain": msgspec.to_builtins(state), "targets": [msgspec.to_builtins(t) for t in tried]})
    if as_json:
        document(found)
    else:
        _report(found)
    if any(one["toolchain"]["problem"] or any(t["problem"] for t in one["targets"]) for one in found):
        sys.exit(1)


def _report(found: list[dict[str, Any]]) -> None:
    if not found:
        say("no toolchain is installed; a compile installs what it needs, or: fleet toolchain install NAME")
    for one in found:
        state = one["toolchain"]
        mend = f"; mend it: fleet toolchain install {state['name']} --again" if state["problem"] else ""
        say(f"{'BAD ' if state['problem'] else 'ok  '} {state['name']}: {state['problem'] or 'whole'}{mend}")
        for target in one["targets"]:
            say(
                f"{'BAD ' if target['problem'] else 'ok  '}   {target['target']}: {target['problem'] or target['told']} ({target['seconds']} s)"
            )


def _use(name: str) -> str:
    """What a toolchain without targets is for."""
    from edgefleet_controller.compile import inventory

    return inventory.BESIDE[name].use if name in inventory.BESIDE else ""


def _toolchains(home: Path) -> Any:
    """Those of the fleet's cache, where there is a fleet; Ctrl-C and SIGTERM end what is under way."""
    from edgefleet_shared.errors import NotFoundError

    from edgefleet_controller import settings
    from edgefleet_controller.compile.toolchains import Toolchains

    try:
        cache = settings.read(home).cache_folder
    except NotFoundError:
        cache = settings.default_cache()
    cancel = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: cancel.set())
    return Toolchains(cache, cancel=cancel)
