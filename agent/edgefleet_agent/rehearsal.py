"""Stage 7 for the agent itself, inside the candidate: receives a board's state folder, hands on its own version if it can read all of it.

Run by the *old* version's :mod:`edgefleet_agent.rehearse_child`, confined, out of the candidate's zip. What breaks here costs
nothing but the candidate. It is the one module that a version owes the one before it: ``rehearse(state)`` keeps its name and shape.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from edgefleet_shared.files import DISK

from edgefleet_agent import __version__, journal, launcher, slots, verify
from edgefleet_agent import settings as board_settings

# What a running agent needs sooner or later: a version that lacks one of them, or a library that one of them needs, is caught here.
PROGRAMS = (
    "edgefleet_agent.app",
    "edgefleet_agent.resident",
    "edgefleet_agent.cli",
    "edgefleet_agent.verify_child",
    "edgefleet_agent.build_child",
    "edgefleet_agent.accept_child",
    "edgefleet_agent.sign_child",
    "edgefleet_agent.renew_child",
    # Without these it would run, and no later version could take its place.
    "edgefleet_agent.rehearse_child",
    "edgefleet_agent.provided",
    "edgefleet_agent.runtime.engines.probe",
)


def rehearse(state: str) -> str:
    """Import everything, read everything that the board remembers.

    Returns:
        this version.

    Raises:
        whatever goes wrong.
    """
    for name in PROGRAMS:
        importlib.import_module(name)
    home = Path(state)
    board_settings.read(home)
    verify.read_root(home)
    verify.read_floors(home)
    for line in (home, launcher.folder(home)):
        journal.read(line, files=DISK)
        slots.read(line, files=DISK)
    return __version__
