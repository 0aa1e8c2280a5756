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
from pydantic import ValidationError

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
    broker: str = "embedded",
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
    begun = [str(path) for path in (home / "ca", home / "keys", home / "repository") if path.exists()]
    if begun:
        raise ConflictError(
            f"{', '.join(begun)} is there, but no controller.yaml: a fleet was begun here and not finished",
            hint="remove it if nobody needs those keys, or choose another --home; nothing was changed",
        )
    made = _settings(home, listen, public_url, broker, broker_host, broker_port)
    if not 1 <= threshold <= signers:
        raise InputError(f"a threshold of {threshold} can't be met by {signers} keys")
    atomic.make_folder(home, 0o700)
    ca = CertificateAuthority.create(home / "ca", clock)
    own = (made.listen_host, made.broker_address[0], urlsplit(made.public_url).hostname or "")
    reached = dict.fromkeys((*hosts, *own, "localhost", "127.0.0.1"))
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
    operator = {"url": made.public_url, "token": token, "ca": "ca/ca.pem"}
    atomic.write(home / "operator.yaml", yaml.safe_dump(operator).encode(), 0o600)
    made = made.model_copy(update={"operator_sha256": hashlib.sha256(token.encode()).hexdigest()})
    # Last: this file says that the rest is there.
    controller_settings.write(made)
    return made


def _settings(home: Path, listen: str, public_url: str, broker: str, broker_host: str, broker_port: int) -> Settings:
    try:
        return Settings(
            home=home.resolve(), listen=listen, public_url=public_url or f"https://{listen}", broker=broker,
            broker_host=broker_host, broker_port=broker_port,
        )  # fmt: skip
    except ValidationError as exc:
        told = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in exc.errors()
        )
        raise InputError(told) from exc
