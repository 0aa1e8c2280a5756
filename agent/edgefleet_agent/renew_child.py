"""Identity: the one-shot child that asks for another certificate. Receives where the board's is on stdin, hands back the new one, then ends.

``python -m edgefleet_agent.renew_child REPORT_FD`` with a :class:`~edgefleet_agent.renewal.RenewRequest` on stdin. It speaks with the
controller by the board's key, as the agent does, and so is not confined; it writes nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
from edgefleet_shared import atomic, enrolling
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.messages import Renewed

from edgefleet_agent import confinement
from edgefleet_agent import settings as board_settings
from edgefleet_agent.renewal import NotRenewed, RenewRequest


def main() -> int:
    report_fd = int(sys.argv[1])
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=RenewRequest)
    confinement.die_with_parent()
    answer: Renewed | NotRenewed
    try:
        answer = Renewed(renew(Path(request.state), request.settings))
    except EdgefleetError as exc:
        answer = NotRenewed(exc.as_dict())
    os.write(report_fd, msgspec.json.encode(answer) + b"\n")
    return 0


def renew(state: Path, settings: board_settings.Settings) -> str:
    """Another certificate (PEM) for the board's key. Raises EdgefleetError."""
    endpoint = board_settings.endpoint(state, settings)
    return enrolling.renew(
        settings.api_host,
        settings.api_port,
        endpoint.tls(),
        atomic.read(endpoint.certificate),
        atomic.read(endpoint.ca),
    )


if __name__ == "__main__":
    sys.exit(main())
