"""A real mosquitto under mutual TLS for tests, with certificates made at run time."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.transport.broker import CONTROLLER, Broker, BrokerFiles
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.mqtt import Endpoint


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Wait for a condition; fail by name when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.01)


class TestBroker:
    """A broker with a CA of its own; hands out endpoints by name."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.ca = CertificateAuthority.create(folder / "ca", SystemClock())
        self.ca.issue_server("server", ("127.0.0.1", "localhost"))
        self.ca.issue_client(CONTROLLER)
        files = BrokerFiles(
            folder=folder / "broker",
            ca=self.ca.folder / "ca.pem",
            certificate=self.ca.folder / "server.pem",
            key=self.ca.folder / "server.key",
        )
        self.port = free_port()
        self.broker = Broker(files, "127.0.0.1", self.port)

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint of ``name``, which gets a certificate if it has none; boards get theirs by a request."""
        if not (self.ca.folder / f"{name}.pem").exists():
            key = ec.generate_private_key(ec.SECP256R1())
            request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
            certificate = self.ca.enroll(request.public_bytes(serialization.Encoding.PEM), name)
            (self.ca.folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
            (self.ca.folder / f"{name}.key").write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
        return Endpoint(
            host="127.0.0.1",
            port=self.port,
            ca=self.ca.folder / "ca.pem",
            certificate=self.ca.folder / f"{name}.pem",
            key=self.ca.folder / f"{name}.key",
        )
