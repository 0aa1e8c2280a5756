"""Which engines load on this board? Receives a limit in seconds, hands on one line of JSON for each that has an adapter here.

A child of :mod:`edgefleet_agent.board`. Each library is loaded in a process forked for it, so that one that dies or hangs takes no other
with it, and what all have in common is imported once. Not in the resident agent, which never learns what an entry point is.

One after the other, for a board's memory; but what hangs must not add up, because the agent has to be there within the time that systemd gives it:
after a moment the next one begins beside it. One that a wedged driver holds can't even be killed: nobody waits for it, and it holds nothing that is ours.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import NamedTuple

import msgspec
from edgefleet_shared.errors import EngineError
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent.board import EngineProbe
from edgefleet_agent.runtime import engines
from edgefleet_agent.runtime.engines.port import Builder
from edgefleet_agent.sandbox import describe_exit

NEXT_AFTER_S = 5.0  # a large one on a slow card takes longer, and shares the board with the next then
LOOK_S = 0.01
ORPHAN_S = 5  # past its limit a load ends itself: only one whose parent has died gets that far
MOST_TOLD_BYTES = 64 * 1024  # what a pipe holds


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


class _Load(NamedTuple):
    """A process that loads an engine, where it tells what came of it, and until when it may (monotonic seconds)."""

    name: str
    pid: int
    told: int
    until_s: float


def main(limit_s: int) -> None:
    """Probe all, each within ``limit_s``."""
    waiting, running = list(engines.names()), list[_Load]()
    last_begun = 0.0
    while waiting or running:
        now = time.monotonic()
        if waiting and (not running or now - last_begun >= NEXT_AFTER_S):
            try:
                running.append(_begin(waiting.pop(0), limit_s))
            except BlockingIOError:  # the kernel has no room for another process: that says nothing of an engine
                sys.exit(os.EX_TEMPFAIL)
            last_begun = now
        for load in list(running):
            found = _ended(load)
            if found is None and now >= load.until_s:
                with suppress(ProcessLookupError):
                    os.kill(load.pid, signal.SIGKILL)
                found = _died(load.name, f"did not load within {limit_s} s")
            if found is not None:
                running.remove(load)
                os.write(1, msgspec.json.encode(found) + b"\n")
        time.sleep(LOOK_S)


def _begin(name: str, limit_s: int) -> _Load:
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(limit_s + ORPHAN_S)
        # Libraries print as they load, and leave daemons behind: neither must come between the reports, nor keep anybody waiting for their end.
        null = os.open(os.devnull, os.O_RDWR)
        for number in (1, 2):
            os.dup2(null, number)
        os.write(tell, msgspec.json.encode(probe(name)))
        os._exit(0)
    os.close(tell)
    os.set_blocking(told, False)
    return _Load(name, pid, told, time.monotonic() + limit_s)


def _ended(load: _Load) -> EngineProbe | None:
    """What came of it; None while it is at it."""
    pid, status = os.waitpid(load.pid, os.WNOHANG)
    if pid == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    with suppress(BlockingIOError, *MALFORMED):
        return msgspec.json.decode(os.read(load.told, MOST_TOLD_BYTES), type=EngineProbe)
    return _died(load.name, describe_exit(code))


def _died(name: str, how: str) -> EngineProbe:
    return EngineProbe(name, None, f"its library {how} when it was loaded")


if __name__ == "__main__":
    main(int(sys.argv[1]))
