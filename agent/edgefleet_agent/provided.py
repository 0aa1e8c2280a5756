"""What does the board's package bring for agents of other versions? Receives nothing, hands on one JSON object: name to version.

A child of :mod:`edgefleet_agent.board`: reading the distributions' metadata costs memory that the resident agent need not hold. Python, the
launcher when one started us, and every installed distribution but our own: a later version may need what this one does not.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys

import msgspec

from edgefleet_agent.launcher import LAUNCHER_VARIABLE

OURS = ("edgefleet-agent", "edgefleet-shared", "edgefleet-controller")


def provided() -> dict[str, str]:
    """By names as PyPI normalises them."""
    found = {"python": platform.python_version()}
    if launcher := os.environ.get(LAUNCHER_VARIABLE):
        found["launcher"] = launcher
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and name not in OURS:
            found.setdefault(name, distribution.version)  # the first on the path is the one that is imported
    return found


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(provided()).decode() + "\n")
