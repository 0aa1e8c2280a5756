"""Enrolment by a stranger in the middle: the token names the CA, and nothing else is trusted with it."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from edgefleet_shared import enrolling
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.messages import Enrolled

ENROLLED = Enrolled(
    device="b1", device_class="c", site="", certificate="", ca="", root="", broker_host="b", broker_port=1, api_host="a", api_port=1,
)  # fmt: skip
NOW = datetime.now(timezone.utc)


class Authority:
    """A certificate authority."""

    def __init__(self, name: str, begins: datetime = NOW - timedelta(hours=1)) -> None:
        self.begins = begins
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.name, self.key, x509.BasicConstraints(ca=True, path_length=None))

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, what: x509.ExtensionType) -> x509.Certificate:
        return (
            x509.CertificateBuilder().subject_name(name).issuer_name(self.name).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(self.begins)
            .not_valid_after(self.begins + timedelta(days=1)).add_extension(what, critical=isinstance(what, x509.BasicConstraints))
            .sign(self.key, hashes.SHA256())
        )  # fmt: skip

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def token(self) -> str:
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        return f"efe.{hashlib.sha256(der).hexdigest()}.secret"

    def server(self, folder: Path) -> ssl.SSLContext:
        """What a server at 127.0.0.1 shows, if this authority is trusted."""
        key = ec.generate_private_key(ec.SECP256R1())
        shown = self._sign(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")]), key,
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]),
        )  # fmt: skip
        path = folder / "server.pem"
        path.write_bytes(
            shown.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


class Middle:
    """A server that answers ``/v1/ca`` with what it likes, and keeps what is sent to it."""

    def __init__(self, context: ssl.SSLContext, ca: str) -> None:
        self.heard: list[bytes] = []
        middle = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(ca.encode())

            def do_POST(self) -> None:
                middle.heard.append(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(msgspec.json.encode(ENROLLED))

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def begun() -> Iterator[list[Middle]]:
    running: list[Middle] = []
    yield running
    for middle in running:
        middle.server.shutdown()
        middle.server.server_close()


def padded(name: str) -> Authority:
    """An authority whose PEM ends with ``=``: what comes after that, base64 passes over."""
    return next(made for made in (Authority(f"{name}{'.' * n}") for n in range(64)) if "=\n-----END" in made.pem)


@pytest.mark.parametrize("order", ["after it", "before it", "alone"])
def test_attack_a_second_ca_beside_the_one_that_the_token_names_is_told_no_secret(
    tmp_path: Path, begun: list[Middle], order: str
) -> None:
    fleet, stranger = padded("fleet"), padded("stranger")
    shown = {"after it": fleet.pem + stranger.pem, "before it": stranger.pem + fleet.pem, "alone": stranger.pem}[order]
    begun.append(Middle(stranger.server(tmp_path), shown))
    url = f"https://127.0.0.1:{begun[0].server.server_port}"
    with pytest.raises(EdgefleetError):
        enrolling.ask(url, fleet.token, "b1", lambda: enrolling.new_key()[0])
    assert begun[0].heard == [], "the token went to a stranger"


def test_the_ca_that_is_kept_is_the_one_that_the_token_names_and_nothing_beside_it(
    tmp_path: Path, begun: list[Middle]
) -> None:
    fleet, stranger = padded("fleet"), padded("stranger")
    begun.append(Middle(fleet.server(tmp_path), fleet.pem + stranger.pem))
    url = f"https://127.0.0.1:{begun[0].server.server_port}"
    enrolled, ca = enrolling.ask(url, fleet.token, "b1", lambda: enrolling.new_key()[0])
    assert enrolled == ENROLLED
    assert ca == fleet.pem


def test_a_board_whose_clock_stands_before_the_fleet_began_is_enrolled(tmp_path: Path, begun: list[Middle]) -> None:
    fleet = Authority("fleet", begins=NOW + timedelta(days=3 * 365))  # which is what a board in the past sees
    begun.append(Middle(fleet.server(tmp_path), fleet.pem))
    url = f"https://127.0.0.1:{begun[0].server.server_port}"
    assert enrolling.ask(url, fleet.token, "b1", lambda: enrolling.new_key()[0]) == (ENROLLED, fleet.pem)


def test_attack_a_server_of_another_authority_is_told_no_secret_by_a_board_that_is_behind(
    tmp_path: Path, begun: list[Middle]
) -> None:
    fleet, stranger = (Authority(name, begins=NOW + timedelta(days=3 * 365)) for name in ("fleet", "stranger"))
    begun.append(Middle(stranger.server(tmp_path), fleet.pem))
    url = f"https://127.0.0.1:{begun[0].server.server_port}"
    with pytest.raises(EdgefleetError):
        enrolling.ask(url, fleet.token, "b1", lambda: enrolling.new_key()[0])
    assert begun[0].heard == []


def test_attack_an_old_server_certificate_is_told_no_secret_by_a_board_that_has_the_time(
    tmp_path: Path, begun: list[Middle]
) -> None:
    fleet = Authority("fleet", begins=NOW - timedelta(days=3))
    begun.append(Middle(fleet.server(tmp_path), fleet.pem))
    url = f"https://127.0.0.1:{begun[0].server.server_port}"
    with pytest.raises(EdgefleetError, match="expired"):
        enrolling.ask(url, fleet.token, "b1", lambda: enrolling.new_key()[0])
    assert begun[0].heard == []
