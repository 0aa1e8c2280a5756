"""Identity: the fleet's certificate authority. Receives a certificate request, hands on a certificate whose name *we* set.

Broker and API are reached by mutual TLS; the broker takes the certificate's common name as user and client id, so a board
can publish only below its own name (the access rules are in :mod:`edgefleet_controller.transport.broker`). Keys are ECDSA P-256.
"""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from edgefleet_shared import atomic
from edgefleet_shared.clock import Clock, utc
from edgefleet_shared.errors import InputError, NotFoundError, TrustError

CA_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=825)
DEVICE_LIFE = timedelta(days=365)
# A board without a clock must be able to use its certificate at once, so validity begins a day early.
BACKDATED = timedelta(days=1)
RENEWED_AFTER = 2 / 3  # of the life of the controller's own; boards have the same rule for theirs
# A certificate tells whole seconds, and is made a moment before its board is entered.
ENROLLED_SLACK_S = 5.0


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def common_name(certificate: x509.Certificate) -> str:
    """Whom a certificate is about."""
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(name.value)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def requested_key(request_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a certificate request, whose holder signed it.

    Raises:
        InputError: not a request, badly signed, or not a P-256 key.
    """
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, InvalidSignature) as exc:
        raise InputError(f"not a certificate request: {exc}") from exc
    if not valid:
        raise InputError("the certificate request is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError("the certificate request must carry a P-256 key")
    return key


def is_of_enrolment(certificate: x509.Certificate, enrolled_at: float) -> bool:
    """Whether a board's certificate was given to it since it was enrolled last: what an earlier enrolment gave counts for nothing."""
    given_at = (certificate.not_valid_before_utc + BACKDATED).timestamp()
    return given_at >= enrolled_at - ENROLLED_SLACK_S


class CertificateAuthority:
    """The fleet's own CA.

    Args:
        folder: holds ``ca.pem`` and ``ca.key``; made by :meth:`create`.

    Raises:
        NotFoundError: there is none in ``folder``.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder = folder
        self._clock = clock
        try:
            self.certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        except FileNotFoundError as exc:
            raise NotFoundError(f"no certificate authority in {folder}", hint="run fleet init first") from exc
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key

    @classmethod
    def create(cls, folder: Path, clock: Clock, name: str = "edgefleet fleet CA") -> CertificateAuthority:
        """Make a new CA in an empty folder."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = utc(clock.now())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        atomic.make_folder(folder, 0o700)
        atomic.write(folder / "ca.key", _pem(key), 0o600)
        atomic.write(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
        return cls(folder, clock)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the certificate; enrolment tokens carry it, so a board knows whom it talks to."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def issue_server(self, name: str, hosts: tuple[str, ...]) -> None:
        """Write ``<name>.pem`` and ``<name>.key`` for a server that is reached as one of ``hosts``."""
        alternatives: list[x509.GeneralName] = []
        for host in hosts:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                alternatives.append(x509.DNSName(host))
        self._issue(name, x509.SubjectAlternativeName(alternatives), ExtendedKeyUsageOID.SERVER_AUTH)

    def issue_client(self, name: str) -> None:
        """Write ``<name>.pem`` and ``<name>.key`` for a client of broker and API."""
        self._issue(name, None, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(self, name: str, alternatives: x509.SubjectAlternativeName | None, use: x509.ObjectIdentifier) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certify(name, key.public_key(), alternatives, use, SERVER_LIFE)
        atomic.write(self.folder / f"{name}.key", _pem(key), 0o600)
        atomic.write(self.folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM))

    def enroll(self, request_pem: bytes, device: str) -> x509.Certificate:
        """Certify a board. Of its request only the public key is used; name and rights come from us.

        Raises:
            InputError: not a request, badly signed, or not a P-256 key.
        """
        return self._certify(device, requested_key(request_pem), None, ExtendedKeyUsageOID.CLIENT_AUTH, DEVICE_LIFE)

    def renew_own(self, name: str) -> bool:
        """Replace ``<name>.pem``, one of the controller's own that :meth:`issue_server` or :meth:`issue_client` wrote, by one for a whole life
        again when two thirds of its life are over. Addresses and key stay, so that one file changes. Returns whether it did.

        Raises:
            EnvironmentProblem: it can't be read or written.
        """
        path = self.folder / f"{name}.pem"
        try:
            shown = x509.load_pem_x509_certificate(atomic.read(path))
            shown.verify_directly_issued_by(self.certificate)
            usage = shown.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except FileNotFoundError:
            return False
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return False  # an operator's own, from another authority
        begins, ends = shown.not_valid_before_utc, shown.not_valid_after_utc
        key = shown.public_key()
        if utc(self._clock.now()) < begins + RENEWED_AFTER * (ends - begins) or not isinstance(
            key, ec.EllipticCurvePublicKey
        ):
            return False
        alternatives = [e.value for e in shown.extensions if isinstance(e.value, x509.SubjectAlternativeName)]
        renewed = self._certify(
            common_name(shown), key, alternatives[0] if alternatives else None, next(iter(usage)), SERVER_LIFE
        )
        atomic.write(path, renewed.public_bytes(serialization.Encoding.PEM))
        return True

    def renew(self, certificate: x509.Certificate) -> x509.Certificate:
        """The same for a whole life again: one of our boards' certificates, whose holder has just shown that it has the key.

        Raises:
            TrustError: it is none of our boards'.
        """
        key, usage = certificate.public_key(), certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        if ExtendedKeyUsageOID.CLIENT_AUTH not in usage.value or not isinstance(key, ec.EllipticCurvePublicKey):
            raise TrustError("certificate", "this is no board's certificate")
        return self._certify(common_name(certificate), key, None, ExtendedKeyUsageOID.CLIENT_AUTH, DEVICE_LIFE)

    def _certify(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        alternatives: x509.SubjectAlternativeName | None,
        use: x509.ObjectIdentifier,
        life: timedelta,
    ) -> x509.Certificate:
        now = utc(self._clock.now())
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
