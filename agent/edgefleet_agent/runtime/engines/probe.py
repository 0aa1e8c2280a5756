"""Which engines load on this board? Receives a limit in seconds, hands on one line of JSON for each that has an adapter here.

A child of :mod:`edgefleet_agent.board`. Each library is loaded in a process forked for it, so that one that dies or hangs takes no other
with it, and what all have in common is imported once. Not in the resident agent, which never learns what an entry point is.
"""

from __future__ import annotations

import os
import signal
import sys

import msgspec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.board import EngineProbe
from edgefleet_agent.runtime import engines
from edgefleet_agent.runtime.engines.port import Builder
from edgefleet_agent.sandbox import describe_exit


def probe(name: str) -> EngineProbe:
    """Load the engine's library and tell its version, or what is missing."""
    engine = engines.find(name)
    version = engine.available()
    if version is None:
        return EngineProbe(name, None, engine.missing())
    try:
        engine.load_library()
        build_key = engine.build_key() if isinstance(engine, Builder) else ""
    except EngineError as exc:
        return EngineProbe(name, None, str(exc))
    return EngineProbe(name, version, "", build_key)


def main(limit_s: int) -> None:
    # Libraries print as they load; what they print must not come between the reports.
    report_fd = os.dup(1)
    os.dup2(2, 1)
    for name in engines.names():
        child = os.fork()
        if child == 0:
            signal.alarm(limit_s)
            os.write(report_fd, msgspec.json.encode(probe(name)) + b"\n")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            told = f"did not load within {limit_s} s" if status == -signal.SIGALRM else describe_exit(status)
            died = EngineProbe(name, None, f"its library {told} when it was loaded")
            os.write(report_fd, msgspec.json.encode(died) + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
