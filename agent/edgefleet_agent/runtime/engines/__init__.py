"""The registry of engines: receives an engine's name, hands on its adapter, found by entry point and imported lazily."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from edgefleet_shared.errors import EngineError

if TYPE_CHECKING:  # the port imports numpy; asking for names must not
    from edgefleet_agent.runtime.engines.port import Engine

GROUP = "edgefleet.engines"


def names() -> tuple[str, ...]:
    """Every engine that an adapter is installed for, whether or not this board has its library."""
    return tuple(sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)}))


def find(name: str) -> Engine:
    """The adapter of an engine.

    Raises:
        EngineError: no adapter of that name.
    """
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name == name:
            engine: Engine = entry.load()()
            return engine
    raise EngineError(f"no engine is called {name!r} here", hint=f"this program knows {', '.join(names()) or 'none'}")
