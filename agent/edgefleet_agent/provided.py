"""What does the board's package bring for agents of other versions? Receives nothing, hands on one JSON object: name to version.

A child of :mod:`edgefleet_agent.board`: reading the distributions' metadata costs memory that the resident agent need not hold. Python, the
launcher when one started us, and every installed distribution that the agent or the shared code says it needs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys

import msgspec

from edgefleet_agent.launcher import LAUNCHER_VARIABLE

OURS = ("edgefleet-agent", "edgefleet-shared")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def provided() -> dict[str, str]:
    """By names as PyPI normalises them. Engines are left out: they have a place of their own in the fingerprint."""
    found = {"python": platform.python_version()}
    if launcher := os.environ.get(LAUNCHER_VARIABLE):
        found["launcher"] = launcher
    for own in OURS:
        for requirement in importlib.metadata.requires(own) or ():
            match = _NAME.match(requirement)
            name = re.sub(r"[-_.]+", "-", match.group()).lower() if match else ""
            if name and name not in OURS:
                try:
                    found[name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    continue
    return found


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(provided()).decode() + "\n")
