"""Stage 7 for the agent itself: the one-shot child. Receives a candidate's zip and the state folder, hands on what the candidate says.

Run as ``python -m edgefleet_agent.rehearse_child REPORT_FD`` by :mod:`edgefleet_agent.rehearse`. This, the running version's code, confines
the process (no network, no writing, none of the board's keys) before anything of the candidate is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import msgspec

from edgefleet_agent import confinement
from edgefleet_agent.rehearse import Rehearsed, RehearseRequest

# Of the state folder: what an agent reads at its start, and not its private key.
READABLE = ("agent.json", "journal.json", "slots.json", "trust", "agent")


def main() -> int:
    report_fd = int(sys.argv[1])
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=RehearseRequest)
    confinement.die_with_parent()
    home = Path(request.state)
    confinement.confine(confinement.Policy(readable=(request.code, *(str(home / name) for name in READABLE))))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("edgefleet_agent", "edgefleet_shared"):
            del sys.modules[name]
    sys.path.insert(0, request.code)
    importlib.invalidate_caches()
    version = importlib.import_module("edgefleet_agent.rehearsal").rehearse(request.state)
    os.write(report_fd, msgspec.json.encode(Rehearsed(str(version))) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
