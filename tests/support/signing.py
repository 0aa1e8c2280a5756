"""A board's key and certificate, and results signed with it: for boards that are simulated."""

from __future__ import annotations

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_shared import results
from edgefleet_shared.assignment import Subject
from edgefleet_shared.messages import Ended, Envelope, SignedResult
from securesystemslib import dsse
from securesystemslib.signer import CryptoSigner


class BoardKey:
    """What a board signs with.

    Args:
        certificate: PEM. key: PEM, without a password.
    """

    def __init__(self, device: str, certificate: str, key: bytes) -> None:
        self.device, self.certificate = device, certificate
        private = load_pem_private_key(key, None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._signer = CryptoSigner(private)

    @classmethod
    def enrolled(cls, ca: CertificateAuthority, device: str) -> BoardKey:
        """A new key, certified by ``ca`` as enrolment does."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        certificate = ca.enroll(request.public_bytes(serialization.Encoding.PEM), device)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(device, certificate.public_bytes(serialization.Encoding.PEM).decode(), pem)

    def sign(self, ended: Ended, subject: Subject = Subject.MODEL) -> SignedResult:
        return self.sign_bytes(results.encode(self.device, ended, subject))

    def sign_bytes(self, content: bytes, kind: str = results.PAYLOAD_TYPE) -> SignedResult:
        envelope = dsse.Envelope(content, kind, {})
        envelope.sign(self._signer)
        return SignedResult(envelope=msgspec.convert(envelope.to_dict(), Envelope), certificate=self.certificate)
