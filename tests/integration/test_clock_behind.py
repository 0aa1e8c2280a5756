"""A board without a clock of its own, at a site that tells it no time: it starts in the past, before all certificates of its fleet.

Seen from there the certificates begin in the future, which is how they are made here.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_controller.pki import SERVER_LIFE, CertificateAuthority
from edgefleet_shared.clock import ManualClock, SystemClock
from edgefleet_shared.mqtt import Endpoint
from edgefleet_shared.work_client import WorkClient

DAY_S = 86_400.0
NOW = SystemClock().now()
BEHIND_S = 3 * 365 * DAY_S


class Fleet:
    """A CA, a board's certificate, and a server that takes connections. Times are how far ahead of our clock each was made."""

    def __init__(self, folder: Path, *, ca_s: float, board_s: float, server_s: float, host: str = "127.0.0.1") -> None:
        made = CertificateAuthority.create(folder / "ca", ManualClock(NOW + ca_s))
        CertificateAuthority(made.folder, ManualClock(NOW + server_s)).issue_server("server", (host,))
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        board = CertificateAuthority(made.folder, ManualClock(NOW + board_s)).enroll(
            request.public_bytes(serialization.Encoding.PEM), "b1"
        )
        (folder / "b.pem").write_bytes(board.public_bytes(serialization.Encoding.PEM))
        (folder / "b.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.folder / "server.pem", made.folder / "server.key")
        self._listener, self._context = socket.create_server(("127.0.0.1", 0)), context
        self.endpoint = Endpoint(
            host="127.0.0.1", port=self._listener.getsockname()[1], ca=made.folder / "ca.pem",
            certificate=folder / "b.pem", key=folder / "b.key",
        )  # fmt: skip
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            with plain:
                try:
                    self._context.wrap_socket(plain, server_side=True).close()
                except OSError:
                    continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def greet(self, context: ssl.SSLContext | None = None) -> None:
        """Raises ssl.SSLError: the board does not take the server for the fleet's."""
        with (
            socket.create_connection(("127.0.0.1", self.endpoint.port), 5) as plain,
            (context or self.endpoint.tls()).wrap_socket(plain, server_hostname="127.0.0.1"),
        ):
            pass


@pytest.fixture
def begun() -> Iterator[list[Fleet]]:
    made: list[Fleet] = []
    yield made
    for fleet in made:
        fleet.close()


def test_a_board_whose_clock_stands_before_its_own_certificate_reaches_its_fleet(
    tmp_path: Path, begun: list[Fleet]
) -> None:
    begun.append(Fleet(tmp_path, ca_s=BEHIND_S, board_s=BEHIND_S + DAY_S, server_s=BEHIND_S))
    begun[0].greet()


def test_a_builder_board_whose_clock_stands_before_its_own_certificate_reaches_its_fleet(
    tmp_path: Path, begun: list[Fleet]
) -> None:
    begun.append(Fleet(tmp_path, ca_s=BEHIND_S, board_s=BEHIND_S + DAY_S, server_s=BEHIND_S))
    known = begun[0].endpoint
    begun[0].greet(WorkClient(known.host, known.port, ca=known.ca, certificate=known.certificate, key=known.key).tls)


def test_attack_a_server_of_another_fleet_or_name_is_met_by_no_board_that_is_behind(
    tmp_path: Path, begun: list[Fleet]
) -> None:
    begun.append(Fleet(tmp_path / "ours", ca_s=BEHIND_S, board_s=BEHIND_S, server_s=BEHIND_S))
    begun.append(Fleet(tmp_path / "another", ca_s=BEHIND_S, board_s=BEHIND_S, server_s=BEHIND_S))
    begun.append(Fleet(tmp_path / "name", ca_s=BEHIND_S, board_s=BEHIND_S, server_s=BEHIND_S, host="fleet.example"))
    with pytest.raises(ssl.SSLError, match=r"self-signed|issuer|signature"):
        begun[1].greet(begun[0].endpoint.tls())
    with pytest.raises(ssl.SSLError, match="mismatch"):
        begun[2].greet()


def test_attack_a_server_whose_certificate_has_ended_is_refused_by_a_board_that_has_the_time(
    tmp_path: Path, begun: list[Fleet]
) -> None:
    long_ago = -SERVER_LIFE.total_seconds() - 2 * DAY_S
    begun.append(Fleet(tmp_path, ca_s=long_ago, board_s=-10 * DAY_S, server_s=long_ago))
    with pytest.raises(ssl.SSLError, match="expired"):
        begun[0].greet()


def test_a_board_that_was_told_the_time_meanwhile_looks_at_it_in_the_next_connection(
    tmp_path: Path, begun: list[Fleet]
) -> None:
    begun.append(Fleet(tmp_path, ca_s=-10 * DAY_S, board_s=BEHIND_S, server_s=BEHIND_S))
    fleet = begun[0]
    context = fleet.endpoint.tls()
    fleet.greet(context)
    # The other way round, since nobody turns a clock here: the same board with a certificate that began before now.
    young = Fleet(tmp_path / "young", ca_s=-10 * DAY_S, board_s=-10 * DAY_S, server_s=-10 * DAY_S)
    begun.append(young)
    for name in ("b.pem", "b.key"):
        (tmp_path / name).write_bytes((tmp_path / "young" / name).read_bytes())
    fleet.endpoint.load_certificate(context)
    with pytest.raises(ssl.SSLError, match="not yet valid"):
        fleet.greet(context)
