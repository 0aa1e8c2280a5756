"""Stage 9, health: whose word a result is. Receives what a board, or somebody in its name, reported; hands on a proof, or why there is none.

The broker only carries results. One that a gate may count is signed with the key of a certificate that this fleet's CA gave to that very
board; ADR 0012 says why these checks and no others. In order, each failing closed:

1. the envelope holds a result;
2. the certificate that came with it is one of ours, for this board;
3. it was given to the board since it was enrolled last: a revoked board's key says nothing any more;
4. the signature over the bytes as they came is made by its key;
5. the signed bytes, read only now, are a result of this board, about what it is shown for: its model, or its agent;
6. they say what stands beside them in the open;
7. of the same assignment nothing newer is known: an old word can't be shown again.

A board has a result about its model and one about its agent; each is judged by itself, by the same checks.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from edgefleet_shared import results
from edgefleet_shared.assignment import Subject
from edgefleet_shared.errors import TrustError
from edgefleet_shared.messages import AgentReport, Ended, Reported, SignedResult
from securesystemslib import dsse, exceptions
from securesystemslib.signer import SSlibKey

from edgefleet_controller.pki import is_of_enrolment


class Standing(str, Enum):
    NONE = "none"  # nothing ended yet
    SIGNED = "signed"
    UNSIGNED = "unsigned"
    REFUSED = "refused"  # by one of the checks


class Known(msgspec.Struct, frozen=True):
    """The newest signed result of a board about one subject."""

    assignment: str
    number: int
    at: float


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a board's reported result: how it stands, why, and what was signed last. ``serial`` is the certificate's."""

    standing: Standing = Standing.NONE
    why: str = ""
    serial: str = ""
    known: Known | None = None


def stored(proof: str) -> Proof:
    """A proof as the database holds it (JSON); an empty one where nothing was ever known."""
    return msgspec.json.decode(proof, type=Proof) if proof else Proof()


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller knows of a board: when it was enrolled last (UTC seconds), and the proof of its last report about ``subject``."""

    device: str
    enrolled_at: float
    subject: Subject = Subject.MODEL
    proof: Proof = Proof()


class ResultVerifier:
    """Decides about reported results.

    Args:
        ca: the fleet's certificate authority.
    """

    def __init__(self, ca: x509.Certificate) -> None:
        self._ca = ca

    def judge(self, report: Reported | AgentReport | None, holder: Holder) -> Proof:
        """Whether the result in a report is the board's own word. ``report`` is the part of it about ``holder.subject``, if it has one."""
        known = holder.proof.known
        if report is None or report.ended is None:
            return Proof(known=known)
        ended = report.ended
        if report.result is None:
            return Proof(standing=Standing.UNSIGNED, why="its result is not signed", known=known)
        try:
            serial = self.check(report.result, ended, holder)
        except TrustError as exc:
            return Proof(standing=Standing.REFUSED, why=exc.message, known=known)
        said = Known(ended.assignment, ended.number, ended.at)
        # An older word about another assignment is the board's too, and harmless; but it must not make us forget the newer one.
        older = known is not None and said.number <= known.number and said.at <= known.at
        return Proof(standing=Standing.SIGNED, serial=serial, known=known if older else said)

    def check(self, signed: SignedResult, ended: Ended, holder: Holder) -> str:
        """The seven checks.

        Returns:
            the serial number (hex) of the certificate by which it was signed.

        Raises:
            TrustError: one of them failed.
        """
        content = results.payload(signed.envelope)
        certificate = self._certificate(signed.certificate, holder)
        _verify(signed, content, certificate)
        result = results.decode(content)
        if result.device != holder.device:
            raise TrustError("result", f"it is a result of {result.device[:80]}")
        if result.subject is not holder.subject:
            raise TrustError("result", f"it is a result about the board's {result.subject.value}")
        if result.ended != ended:
            raise TrustError("result", "what is signed is not what is said in the open")
        known = holder.proof.known
        if (
            known is not None
            and known.assignment == ended.assignment
            and ended.number <= known.number
            and ended.at <= known.at
            and known != Known(ended.assignment, ended.number, ended.at)
        ):
            raise TrustError("result", "it is older than what the board has said about the same assignment")
        return f"{certificate.serial_number:x}"

    def _certificate(self, pem: str, holder: Holder) -> x509.Certificate:
        try:
            certificate = x509.load_pem_x509_certificate(pem.encode())
            certificate.verify_directly_issued_by(self._ca)
            names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as exc:
            raise TrustError("result", f"its certificate is none of this fleet's: {exc}") from exc
        if [name.value for name in names] != [holder.device] or ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
            raise TrustError("result", "its certificate is another's")
        if not is_of_enrolment(certificate, holder.enrolled_at):
            raise TrustError("result", "its certificate is of an earlier enrolment")
        return certificate


def _verify(signed: SignedResult, content: bytes, certificate: x509.Certificate) -> None:
    try:
        key = SSlibKey.from_crypto(certificate.public_key())
        envelope = dsse.Envelope.from_dict(msgspec.to_builtins(signed.envelope))
        if envelope.payload != content:
            raise TrustError("result", "the envelope can be read in two ways")
        envelope.verify([key], 1)
    except (exceptions.Error, ValueError, TypeError, KeyError) as exc:
        raise TrustError("result", f"its signature is not good: {exc}") from exc
