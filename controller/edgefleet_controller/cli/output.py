"""What the command line shows: one JSON document on stdout with ``--json``, else tables; progress and errors go to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgefleet_controller.settings import default_home

console = Console()
errors = Console(stderr=True)

home_option = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="EDGEFLEET_HOME",
    default=default_home,
    show_default="~/.local/share/edgefleet",
    help="The fleet's home folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def document(value: Any) -> None:
    """Print a JSON document."""
    click.echo(json.dumps(value, indent=2, default=str))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; None and empty values are shown as a dash."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*("-" if v is None or v == "" else str(v) for v in row))
    console.print(shown)


@contextmanager
def progress() -> Iterator[Callable[[str, str, float], None]]:
    """Progress bars on stderr: call with (name, what it does, 0 to 1)."""
    with Progress(
        TextColumn("{task.fields[name]}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=errors, transient=True,
    ) as bars:  # fmt: skip
        tasks: dict[str, Any] = {}

        def show(name: str, doing: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(doing, total=1.0, name=name)
            bars.update(tasks[name], description=doing, completed=share)

        yield show


def number(value: float | None, digits: int = 1, unit: str = "") -> str | None:
    return None if value is None else f"{value:.{digits}f}{unit}"
