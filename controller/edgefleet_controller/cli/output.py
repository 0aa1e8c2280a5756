"""What the command line shows: one JSON document on stdout with ``--json``, else tables; progress and errors go to stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edgefleet_controller.settings import default_home

LOG_WIDTH = (
    150  # columns of a table in a file or a pipe, which have no edge; COLUMNS in the environment comes before it
)


def _console() -> Console:
    made = Console()
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = LOG_WIDTH
    return made


console = _console()
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
    console.print(grid(columns, rows, title))


def grid(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """A table as all commands show it; None and empty values are a dash, rich's own renderables stay what they are."""
    shown = Table(title=title or None, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(value) for value in row))
    return shown


def _cell(value: Any) -> str | Text:
    if isinstance(value, Text):
        return value
    return "-" if value is None or value == "" else str(value)


def say(text: str) -> None:
    """A line, wrapped at words on a terminal; elsewhere nothing breaks it."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


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


def megabytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def milliseconds(value: float) -> str:
    """With digits enough for what takes microseconds."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
