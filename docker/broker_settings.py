"""Receives the fleet's home, hands on all that the broker's container needs: certificates, access rules, mosquitto.conf.

The broker gets copies in a folder of its own, because the rest of the home (the CA's key, the signing keys) is none of its business.
The settings are the embedded broker's own, so both are one broker to the boards.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgefleet_controller import settings
from edgefleet_controller.transport.broker import BrokerFiles, access_rules, configuration
from edgefleet_shared import atomic


def write(home: Path, port: int) -> None:
    """Write ``<home>/broker/``; mosquitto.conf last, because the broker waits for it.

    Args:
        port: where the broker listens, on every address of its container.
    """
    folder = home / "broker"
    files = BrokerFiles(
        folder=folder, ca=folder / "ca.pem", certificate=folder / "server.pem", key=folder / "server.key.pem"
    )
    atomic.make_folder(folder, 0o700)
    for source, target in (("ca.pem", files.ca), ("server.pem", files.certificate), ("server.key", files.key)):
        atomic.write(target, (home / "ca" / source).read_bytes(), 0o600)
    atomic.write(folder / "acl", access_rules().encode(), 0o600)
    atomic.write(folder / "mosquitto.conf", configuration(files, "0.0.0.0", port).encode(), 0o600)  # noqa: S104


if __name__ == "__main__":
    read = settings.read(Path(os.environ["EDGEFLEET_HOME"]))
    write(read.home, read.broker_address[1])
