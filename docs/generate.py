"""Writes docs/generated/: receives the code's own tables, commands and schemas, hands on pages that cannot contradict it.

``python docs/generate.py`` writes what differs; ``--check`` writes nothing and ends with status 1 when a page is not what the
code says, is missing or is left over. A page whose source module does not exist is skipped when writing, an error when checking.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "generated"
WIDTH = 100  # of the help texts, whatever the terminal

PROGRAMS = (
    ("fleet", "edgefleet_controller.cli.main"),
    ("fleet-agent", "edgefleet_agent.cli"),
    ("fleet-runtime", "edgefleet_agent.runtime.app"),
    ("fleet-runtime-grpc", "edgefleet_agent.runtime.grpc_gateway"),
)


class Page(NamedTuple):
    """A source: the module it needs, and what makes its files (name below ``docs/generated`` -> text)."""

    module: str
    make: Callable[[], dict[str, str]]


class Pages(NamedTuple):
    """Every file that the code gives, and the modules that were not there."""

    files: dict[str, str]
    missing: list[str]


def states() -> dict[str, str]:
    """The board's life cycle as a diagram and as its table."""
    from edgefleet_shared.lifecycle import MAX_RESTARTS, TABLE, Event, State

    drawn: dict[tuple[str, str], list[str]] = {}
    for (state, event), row in TABLE.items():
        if row.effects and event not in (Event.RESTARTED, Event.LOOPING):
            label = event.value + (f" ({row.outcome.value})" if row.outcome else "")
            drawn.setdefault((state.value, row.to.value), []).append(label)
    diagram = ["stateDiagram-v2", f"    [*] --> {State.IDLE.value}"]
    diagram += [f"    {origin} --> {to}: {', '.join(labels)}" for (origin, to), labels in drawn.items()]
    rows = [
        (
            state.value,
            event.value,
            row.to.value,
            ", ".join(effect.value for effect in row.effects) or "nothing: looked at again in the next state",
            row.outcome.value if row.outcome else "",
        )
        for (state, event), row in TABLE.items()
    ]
    return {
        "states.md": _page(
            "edgefleet_shared.lifecycle",
            "The board's life cycle",
            "Left out of the drawing, but in the table: `restarted` (the agent came up in this state) and `looping` (it did so "
            f"more than {MAX_RESTARTS} times in a row). An event that a state has no row for is a bug and raises. The first effect "
            "of every transition is the journal write.",
            "```mermaid\n" + "\n".join(diagram) + "\n```",
            _table(("in state", "event", "goes to", "effects, in order", "outcome noted"), rows),
        )
    }


def starts() -> dict[str, str]:
    """Which version of the agent the launcher starts."""
    from edgefleet_agent.launcher import ALARM_FACTOR, LATE_STARTS, ORDER, SETTLED_S, STARTS

    rows = [
        (status, "yes" if is_open else "no", ", then ".join((*order, "the package's")))
        for (status, is_open), order in ORDER.items()
    ]
    return {
        "launcher.md": _page(
            "edgefleet_agent.launcher",
            "Which version of the agent is started",
            "By the status of the agent's active slot and whether it has starts left. The first version is taken of which every byte is "
            f"what its digest says; `previous` must be good. A version on trial (`unknown`) has {STARTS} starts, each written down before it "
            f"is made and ended by an alarm at {ALARM_FACTOR} times the trial's limit; a committed one (`good`) has {LATE_STARTS} in a row, "
            f"counted anew once it has run for {SETTLED_S:.0f} s. When the "
            "package is another one than the trial was made on, only the package's version is started. What a version does on trial is "
            "the [life cycle](states.md)'s `swapping` to `committing`, with the agent in the model's place.",
            _table(("active slot", "starts left", "started, in order"), rows),
        )
    }


def topics() -> dict[str, str]:
    """The MQTT topics."""
    from edgefleet_shared.topics import PREFIX, TABLE

    rows = [
        (f"`{row.pattern}`", row.by, "yes" if row.retained else "no", str(row.qos), row.message, row.what)
        for row in TABLE
    ]
    return {
        "topics.md": _page(
            "edgefleet_shared.topics",
            "MQTT topics",
            f"MQTT 5, all below `{PREFIX}/`. The broker's access rules are made from the same table: a board writes and reads only "
            "below the name in its certificate. The messages' schemas are in `schemas/`.",
            _table(("topic", "published by", "retained", "QoS", "message", "what"), rows),
        )
    }


def messages() -> dict[str, str]:
    """The JSON schema of each message that the topic table names."""
    import msgspec
    from edgefleet_shared import messages as wire
    from edgefleet_shared.topics import TABLE

    kinds = {row.message: getattr(wire, row.message) for row in TABLE if hasattr(wire, row.message)}
    return {f"schemas/message-{name}.json": _json(msgspec.json.schema(kind)) for name, kind in sorted(kinds.items())}


def manifests() -> dict[str, str]:
    """The JSON schema of each kind of manifest."""
    json_schemas = importlib.import_module("edgefleet_controller.manifests").json_schemas

    return {f"schemas/{kind}.json": _json(schema) for kind, schema in sorted(json_schemas().items())}


def errors() -> dict[str, str]:
    """The error tree: what a program may match on."""
    import edgefleet_shared
    from edgefleet_shared.errors import EdgefleetError

    for module in pkgutil.iter_modules(edgefleet_shared.__path__, "edgefleet_shared."):
        importlib.import_module(module.name)
    rows = [
        ("&nbsp;&nbsp;" * depth + kind.__name__, f"`{kind.code}`", str(kind.exit_status), f"`{kind.__module__}`")
        for depth, kind in _descend(EdgefleetError, 0)
    ]
    tree = (
        (importlib.import_module("edgefleet_shared.errors").__doc__ or "").partition("::\n\n")[2].partition("\n\n")[0]
    )
    return {
        "errors.md": _page(
            "edgefleet_shared.errors",
            "Errors",
            "Every error that a user can act on has a stable `code` (in `--json` output and over the HTTP API), a message, and a "
            "hint that says what to do next. A command ends with the exit status given here.",
            "```\n" + "\n".join(line[4:] for line in tree.splitlines()) + "\n```",
            _table(("error", "code", "exit status", "module"), rows),
        )
    }


def _descend(kind: Any, depth: int) -> Iterator[tuple[int, Any]]:
    yield depth, kind
    for child in sorted(kind.__subclasses__(), key=lambda one: one.__name__):
        # What tests or other parts define is not in the tree.
        if child.__module__.startswith("edgefleet_shared."):
            yield from _descend(child, depth + 1)


def tflite_operators() -> dict[str, str]:
    """What the ONNX to TFLite converter can write."""
    from edgefleet_controller.compile.children.tflite import folding, onnx_to_tflite, source

    types = {"float32": "float", "int32": "whole", "bool": "bool", "uint8": "uint8", "int8": "int8"}
    sections = [
        f"## {kind}\n\n"
        + _table(
            ("ONNX", "becomes", "of type", "refused"),
            [
                (
                    name,
                    ", ".join(row.makes) or "nothing of its own",
                    ", ".join(types[dtype.name] for dtype in row.types),
                    row.limits,
                )
                for name, row in sorted(table.items())
            ],
        )
        for kind, table in onnx_to_tflite.KINDS.items()
    ]
    return {
        "tflite-operators.md": _page(
            "edgefleet_controller.compile.children.tflite.onnx_to_tflite",
            "ONNX operators that the TFLite target can write",
            f"Operator sets {source.MIN_OPSET} and later, all sizes fixed, float32 between the operators; whole numbers are "
            "computed with 32 bits. Anything else is refused by node and operator before a board sees it. RESHAPE, TRANSPOSE and CAST "
            "are added where order or type ask for them. An activation that follows a convolution, a pool, a matrix product or "
            "arithmetic is fused into it.",
            *sections,
            "## Computed when compiling\n\nOver constants, and over shapes, which are fixed: "
            + ", ".join(sorted(folding.FOLDED))
            + ".",
        )
    }


def commands(program: str, module: str) -> dict[str, str]:
    """The help of a program and of all its commands, as it prints it.

    Raises:
        TypeError: its ``main`` is no click command.
    """
    import click

    main = importlib.import_module(module).main
    if not isinstance(main, click.Command):
        raise TypeError(f"{module}.main is {main!r}; its help can only be written out for a click command")
    sections = [f"## {' '.join(path)}\n\n```\n{text}\n```" for path, text in _helps(main, (program,), None)]
    return {f"cli/{program}.md": _page(module, program, *sections)}


def _helps(command: Any, path: tuple[str, ...], parent: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    import click

    # With the command's own settings: -h is an option of all that have it, and click remembers the first help that it makes of a command.
    settings = {"terminal_width": WIDTH, "max_content_width": WIDTH, **command.context_settings}
    context = click.Context(command, info_name=path[-1], parent=parent, **settings)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in sorted(command.list_commands(context)):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _helps(child, (*path, name), context)


def _page(source: str, title: str, *parts: str) -> str:
    return (
        "\n\n".join(
            (f"<!-- Written by docs/generate.py from {source}: change that, not this. -->", f"# {title}", *parts)
        )
        + "\n"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _json(value: object) -> str:
    return json.dumps(_without_margins(value), indent=2, ensure_ascii=False) + "\n"


def _without_margins(value: Any) -> Any:
    """A schema whose descriptions are docstrings without their margin, which Python takes away by itself from 3.13 on."""
    if isinstance(value, dict):
        return {
            key: inspect.cleandoc(one) if key == "description" and isinstance(one, str) else _without_margins(one)
            for key, one in value.items()
        }
    return [_without_margins(one) for one in value] if isinstance(value, list) else value


PAGES = (
    Page("edgefleet_shared.lifecycle", states),
    Page("edgefleet_agent.launcher", starts),
    Page("edgefleet_shared.topics", topics),
    Page("edgefleet_shared.messages", messages),
    Page("edgefleet_shared.errors", errors),
    Page("edgefleet_controller.manifests", manifests),
    Page("edgefleet_controller.compile.children.tflite.onnx_to_tflite", tflite_operators),
    *(Page(module, lambda p=program, m=module: commands(p, m)) for program, module in PROGRAMS),  # type: ignore[misc]
)


def generate() -> Pages:
    """All files as the code has them now."""
    files: dict[str, str] = {}
    missing = []
    for page in PAGES:
        if not _exists(page.module):
            missing.append(page.module)
            continue
        files |= page.make()
    return Pages(files, missing)


def _exists(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return (not parent or _exists(parent)) and importlib.util.find_spec(module) is not None


def differences(pages: Pages, folder: Path = FOLDER) -> list[str]:
    """What in ``folder`` is not as the code says, one line each."""
    found = []
    on_disk = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    for name, text in pages.files.items():
        if name not in on_disk:
            found.append(f"{name} is missing")
        elif on_disk[name].read_text() != text:
            found.append(f"{name} is not what the code says")
    found += [f"{name} is left over" for name in sorted(on_disk.keys() - pages.files.keys())]
    return found


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when something differs")
    check = parser.parse_args().check
    pages = generate()
    found = differences(pages) + [f"{module} does not exist: its pages are not made" for module in pages.missing]
    for line in found:
        sys.stdout.write(f"docs/generated: {line}\n")
    if check:
        if found:
            sys.stdout.write("run `make docs` and look at what changed\n")
        return 1 if found else 0
    for name, text in pages.files.items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file() and str(path.relative_to(FOLDER)) not in pages.files:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
