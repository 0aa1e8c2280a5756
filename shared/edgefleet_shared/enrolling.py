"""Identity: asking for a certificate. Receives a one-time token and a key, or the certificate that nears its end, hands on what the controller gives.

The token names the fleet's CA by fingerprint, so the very first connection already knows whom it must meet: the CA certificate is
fetched unverified, held against the fingerprint, and only then is anything secret sent, over a connection that trusts that
CA alone. The private key never leaves its machine. One-shot: cryptography is imported here.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgefleet_shared import __version__, atomic
from edgefleet_shared.certificates import mind_clock
from edgefleet_shared.errors import EnvironmentProblem, InputError, TransportError, TrustError, from_dict
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.messages import Enrolled, EnrolRequest, Renewed
from edgefleet_shared.work import AGENT

TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024


def new_key() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A P-256 key, and its PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key, pem


def kept_key(path: Path, *, files: FileSystem = DISK) -> ec.EllipticCurvePrivateKey:
    """The key that lies at ``path``, or one that is made and kept there, durably. One that an earlier try left is taken again: perhaps the
    controller knows it by now, and only its answer was cut off.

    Raises:
        EnvironmentProblem: the disk refused.
    """
    try:
        found = serialization.load_pem_private_key(atomic.read(path, files=files), password=None)
        if isinstance(found, ec.EllipticCurvePrivateKey) and isinstance(found.curve, ec.SECP256R1):
            return found
    except (FileNotFoundError, EnvironmentProblem, ValueError):
        pass  # none, or none that can be used
    key, pem = new_key()
    atomic.write(path, pem, 0o600, files=files)
    return key


def ask(url: str, token: str, name: str, make_key: Callable[[], ec.EllipticCurvePrivateKey]) -> tuple[Enrolled, str]:
    """(what the controller gives, the CA certificate that the token named, as PEM).

    Args:
        url: the controller, ``https://host:port``.
        token: ``efe.<sha256 of the CA>.<secret>``, from ``fleet device token`` or ``fleet worker token``.
        name: the wished name; empty when the token fixes it.
        make_key: called once the controller is known to be the right one, and before the token is used up.

    Raises:
        InputError: the token or the URL can't be one. TrustError: the controller is not the one that the token names.
        TransportError: not reachable. EdgefleetError: the controller refuses, in its own words.
    """
    host, port = address(url)
    token = token.strip()  # a file ends with a newline
    ca = _fetch_ca(host, port, named_ca(token))
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(make_key(), hashes.SHA256())
    question = EnrolRequest(token, name, request.public_bytes(serialization.Encoding.PEM).decode())
    context = ssl.create_default_context(cadata=ca)
    mind_clock(context, x509.load_pem_x509_certificate(ca.encode()).not_valid_before_utc.timestamp())
    answer = _call(host, port, context, "POST", "/v1/enroll", msgspec.json.encode(question))
    try:
        return msgspec.json.decode(answer, type=Enrolled), ca
    except MALFORMED as exc:
        raise TransportError(f"the controller's answer can't be read: {exc}") from exc


def renew(host: str, port: int, context: ssl.SSLContext, certificate: bytes, ca: bytes) -> str:
    """A certificate (PEM) like ``certificate``, which the controller gives to whoever shows that one: name and key are the same, its end is later.

    Args:
        context: shows ``certificate`` and trusts ``ca`` (PEM) alone.

    Raises:
        TransportError: the controller can't be reached, or its answer can't be read. TrustError: what it gave is not that.
        EdgefleetError: it refuses, in its own words.
    """
    answer = _call(host, port, context, "POST", "/v1/renew", None)
    try:
        given = x509.load_pem_x509_certificate(msgspec.json.decode(answer, type=Renewed).certificate.encode())
        shown = x509.load_pem_x509_certificate(certificate)
        given.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    except (*MALFORMED, ValueError, TypeError, InvalidSignature) as exc:
        raise TransportError(f"the controller's answer is no certificate of this fleet: {exc}") from exc
    if (given.subject, given.public_key()) != (shown.subject, shown.public_key()):
        raise TrustError("certificate", "the controller gave another's certificate")
    if given.not_valid_after_utc <= shown.not_valid_after_utc:
        raise TrustError("certificate", "the controller gave a certificate that ends no later")
    return given.public_bytes(serialization.Encoding.PEM).decode()


def address(url: str) -> tuple[str, int]:
    """Host and port of a controller.

    Raises:
        InputError: no https address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "https" or not host:
        raise InputError(f"{url!r} is no controller's address", hint="it looks like https://fleet.example:8443")
    return host, port or 443


def named_ca(token: str) -> str:
    """The sha256 (hex) of the CA certificate that a token names.

    Raises:
        InputError: the token can't be one.
    """
    kind, _, rest = token.strip().partition(".")
    fingerprint, _, secret = rest.partition(".")
    if kind != "efe" or len(fingerprint) != 64 or not secret:
        raise InputError("this is no enrolment token", hint="make one with: fleet device token --class CLASS")
    return fingerprint


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
    # Not what came: base64 ends at its padding, so another certificate after this one would be trusted too.
    return ssl.DER_cert_to_PEM_cert(der)


def _call(host: str, port: int, context: ssl.SSLContext, method: str, path: str, body: bytes | None) -> bytes:
    link = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        headers = {"User-Agent": f"{AGENT}/{__version__}"} | ({"Content-Type": "application/json"} if body else {})
        link.request(method, path, body=body, headers=headers)
        answer = link.getresponse()
        content = answer.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        raise TransportError(f"can't reach the controller at {host}:{port}: {exc}") from exc
    finally:
        link.close()
    if answer.status != 200:
        try:
            raise from_dict(msgspec.json.decode(content, type=dict[str, str]))
        except MALFORMED as exc:
            raise TransportError(f"the controller answered {answer.status}") from exc
    return content
