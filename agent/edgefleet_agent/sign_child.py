"""Stage 9, health: the one-shot child that signs. Receives a payload on stdin, hands back an envelope and the certificate, then ends.

``python -m edgefleet_agent.sign_child REPORT_FD`` with a :class:`~edgefleet_agent.results.SignRequest` on stdin. It confines itself to
the one folder with the board's certificate and key. The key is reached through securesystemslib's signers, by URI: a file today, a
PKCS#11 token or TPM by another scheme, once the confinement lets it reach its device.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
from cryptography import x509
from edgefleet_shared.messages import Envelope, SignedResult
from edgefleet_shared.results import PAYLOAD_TYPE
from securesystemslib import dsse
from securesystemslib.signer import Signer, SSlibKey

from edgefleet_agent import confinement
from edgefleet_agent.results import SignRequest


def main() -> int:
    report_fd = int(sys.argv[1])
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=SignRequest)
    confinement.die_with_parent()
    confinement.confine(confinement.Policy(readable=(request.identity,)))
    os.write(report_fd, msgspec.json.encode(sign(request)) + b"\n")
    return 0


def sign(request: SignRequest) -> SignedResult:
    """The payload, signed by the key that the board's certificate is about."""
    certificate = (Path(request.identity) / "agent.pem").read_bytes()
    public = SSlibKey.from_crypto(x509.load_pem_x509_certificate(certificate).public_key())
    envelope = dsse.Envelope(request.payload, PAYLOAD_TYPE, {})
    envelope.sign(Signer.from_priv_key_uri(request.key, public))
    return SignedResult(envelope=msgspec.convert(envelope.to_dict(), Envelope), certificate=certificate.decode())


if __name__ == "__main__":
    sys.exit(main())
