"""Identity: the board's enrolment. Receives a one-time token, hands on a certificate and the first trusted root.

The token names the fleet's CA by fingerprint, so the very first connection already knows whom it must meet: the CA certificate is
fetched unverified, held against the fingerprint, and only then is anything secret sent, over a connection that trusts that
CA alone. The private key is made here and never leaves the board. One-shot: cryptography is imported here.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_shared import atomic
from edgefleet_shared.errors import ConflictError, InputError, TransportError, TrustError, from_dict
from edgefleet_shared.messages import Enrolled, EnrolRequest

from edgefleet_agent import settings as board_settings
from edgefleet_agent.settings import Settings

TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024


def enroll(
    state: Path, url: str, token: str, device: str = "", *, threads: int = 1, health_period_s: float = 10.0
) -> Settings:
    """Enrol this board and keep what it was given.

    Args:
        url: the controller, ``https://host:port``.
        token: ``efe.<sha256 of the CA>.<secret>``, from ``fleet device token``.
        device: the wished name; empty when the token fixes it.

    Raises:
        InputError: the token or the URL can't be one. ConflictError: already enrolled.
        TrustError: the controller is not the one that the token names. TransportError: not reachable.
        EdgefleetError: the controller refuses, in its own words.
    """
    if (state / "agent.json").exists():
        raise ConflictError(f"{state} is enrolled already", hint="choose another --state, or remove that folder first")
    token = token.strip()  # a file ends with a newline
    fingerprint, host, port = _parse(url, token)
    ca = _fetch_ca(host, port, fingerprint)
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    question = EnrolRequest(token, device, request.public_bytes(serialization.Encoding.PEM).decode())
    context = ssl.create_default_context(cadata=ca)
    answer = _call(host, port, context, "POST", "/v1/enroll", msgspec.json.encode(question))
    try:
        enrolled = msgspec.json.decode(answer, type=Enrolled)
    except msgspec.DecodeError as exc:
        raise TransportError(f"the controller's answer can't be read: {exc}") from exc
    return _keep(state, enrolled, ca, key, threads, health_period_s)


def _parse(url: str, token: str) -> tuple[str, str, int]:
    kind, _, rest = token.partition(".")
    fingerprint, _, secret = rest.partition(".")
    if kind != "efe" or len(fingerprint) != 64 or not secret:
        raise InputError("this is no enrolment token", hint="make one with: fleet device token --class CLASS")
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise InputError(f"{url!r} is no controller's address", hint="it looks like https://fleet.example:8443")
    return fingerprint, parts.hostname, parts.port or 443


def _fetch_ca(host: str, port: int, fingerprint: str) -> str:
    # Unverified on purpose: what comes is held against the token's fingerprint, and nothing secret is sent.
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    pem = _call(host, port, blind, "GET", "/v1/ca", None).decode(errors="replace")
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")
    except ValueError as exc:
        raise TransportError("the controller sent no certificate") from exc
    if hashlib.sha256(der).hexdigest() != fingerprint:
        raise TrustError("controller", f"{host}:{port} is not the controller that the token was made by")
    return pem


def _call(host: str, port: int, context: ssl.SSLContext, method: str, path: str, body: bytes | None) -> bytes:
    link = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        link.request(method, path, body=body, headers={"Content-Type": "application/json"} if body else {})
        answer = link.getresponse()
        content = answer.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        raise TransportError(f"can't reach the controller at {host}:{port}: {exc}") from exc
    finally:
        link.close()
    if answer.status != 200:
        try:
            raise from_dict(msgspec.json.decode(content, type=dict[str, str]))
        except msgspec.DecodeError as exc:
            raise TransportError(f"the controller answered {answer.status}") from exc
    return content


def _keep(
    state: Path, enrolled: Enrolled, ca: str, key: ec.EllipticCurvePrivateKey, threads: int, health_period_s: float
) -> Settings:
    settings = Settings(
        device=enrolled.device,
        device_class=enrolled.device_class,
        site=enrolled.site,
        broker_host=enrolled.broker_host,
        broker_port=enrolled.broker_port,
        api_host=enrolled.api_host,
        api_port=enrolled.api_port,
        threads=threads,
        health_period_s=health_period_s,
    )
    for folder in ("identity", "trust", "metadata", "run"):
        atomic.make_folder(state / folder, 0o700)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    atomic.write(state / "identity" / "agent.key", pem, 0o600)
    atomic.write(state / "identity" / "agent.pem", enrolled.certificate.encode())
    atomic.write(state / "identity" / "ca.pem", ca.encode())
    atomic.write(state / "trust" / "root.json", enrolled.root.encode())
    # Last: this file says that the rest is there.
    board_settings.write(state, settings)
    return settings
