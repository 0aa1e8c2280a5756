"""``fleet init``: receives a folder and addresses, hands on a fleet's home with CA, keys and a first signed image repository."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Layout
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import ConflictError, InputError

from edgefleet_controller import settings as controller_settings
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.settings import Settings
from edgefleet_controller.sign import ReleaseSigner, Repository, make_key
from edgefleet_controller.transport.broker import CONTROLLER


def create(
    home: Path,
    *,
    listen: str,
    public_url: str,
    broker_host: str,
    broker_port: int,
    hosts: tuple[str, ...],
    signers: int,
    threshold: int,
    clock: Clock,
) -> Settings:
    """Make a fleet.

    Args:
        hosts: names and addresses by which boards reach API and broker; they stand in the server's certificate.
        signers, threshold: how many root and targets keys there are, and how many must sign.

    Raises:
        ConflictError: there is a fleet already; nothing is overwritten. InputError: an address can't be one.
    """
    if (home / "controller.yaml").exists():
        raise ConflictError(f"there is a fleet in {home} already", hint="choose another --home; nothing was changed")
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--listen {listen!r} is not host:port")
    url = urlsplit(public_url or f"https://{listen}")
    if url.scheme != "https" or not url.hostname:
        raise InputError(f"{public_url!r} is not an https address")
    atomic.make_folder(home, 0o700)
    ca = CertificateAuthority.create(home / "ca", clock)
    reached = dict.fromkeys((*hosts, host, broker_host, url.hostname, "localhost", "127.0.0.1"))
    ca.issue_server("server", tuple(name for name in reached if name not in ("0.0.0.0", "::", "")))  # noqa: S104
    ca.issue_client(CONTROLLER)
    snapshot, timestamp, director = (
        make_key(home / "keys" / "online" / f"{name}.pem") for name in ("snapshot", "timestamp", "director")
    )
    signer = ReleaseSigner(home / "keys" / "offline", clock)
    first = signer.begin(snapshot, timestamp, director, signers=signers, threshold=threshold)
    Repository(home / "repository", snapshot, timestamp, clock).publish(first)
    Layout(home / "artifacts")
    token = secrets.token_urlsafe(32)
    operator = {"url": public_url or f"https://{listen}", "token": token, "ca": str((home / "ca" / "ca.pem").resolve())}
    atomic.write(home / "operator.yaml", yaml.safe_dump(operator).encode(), 0o600)
    made = Settings(
        home=home.resolve(),
        listen=listen,
        public_url=operator["url"],
        broker_host=broker_host,
        broker_port=broker_port,
        operator_sha256=hashlib.sha256(token.encode()).hexdigest(),
    )
    # Last: this file says that the rest is there.
    controller_settings.write(made)
    return made
