"""Does an engine load on this board? Receives its name, hands on one line of JSON. A child of :mod:`edgefleet_agent.board`."""

from __future__ import annotations

import sys

import msgspec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.board import EngineProbe
from edgefleet_agent.runtime import engines


def probe(name: str) -> EngineProbe:
    """Load the engine's library and tell its version, or what is missing."""
    engine = engines.find(name)
    version = engine.available()
    if version is None:
        return EngineProbe(name, None, engine.missing())
    try:
        engine.load_library()
    except EngineError as exc:
        return EngineProbe(name, None, str(exc))
    return EngineProbe(name, version, "")


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(probe(sys.argv[1])).decode() + "\n")
