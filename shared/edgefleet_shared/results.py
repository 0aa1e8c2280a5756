"""Stage 9, health: what a board signs with the key of its certificate. Receives how an assignment ended, hands on signed bytes; and back.

A result travels as a DSSE envelope (https://github.com/secure-systems-lab/dsse, v1.0.2): its payload, a :class:`Result` in JSON, goes
verbatim, and is read only after the signature was verified. With it goes the certificate, which says by whom it was made; that alone
makes it nobody's word: the controller holds it against its own CA and against what it knows of the board
(:mod:`edgefleet_controller.results`). Pure: the cryptography is done by one-shot children on the board and by the controller.
"""

from __future__ import annotations

import base64
import binascii

import msgspec

from edgefleet_shared.assignment import Subject
from edgefleet_shared.errors import TrustError
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.messages import Ended, Envelope

PAYLOAD_TYPE = "application/vnd.edgefleet.result.v1+json"
MAX_REASON = 2000  # characters
MAX_PAYLOAD_BYTES = 48 * 1024  # fits a pipe beside its request, and a message beside the rest of it


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed. It names the board, so that another board's can't be shown in its place, and what it is about: the board's model
    and its agent end in results of their own, counted apart."""

    device: str
    ended: Ended
    subject: Subject = Subject.MODEL


def encode(device: str, ended: Ended, subject: Subject) -> bytes:
    """The bytes to be signed."""
    return msgspec.json.encode(Result(device=device, ended=ended, subject=subject))


def fitting(device: str, ended: Ended, subject: Subject) -> Ended:
    """``ended``, shortened where it could not be signed: a candidate may make its own report as long as it likes."""
    ended = msgspec.structs.replace(ended, reason=ended.reason[:MAX_REASON])
    if len(encode(device, ended, subject)) <= MAX_PAYLOAD_BYTES:
        return ended
    return msgspec.structs.replace(ended, acceptance=None)


def payload(envelope: Envelope) -> bytes:
    """The signed bytes of an envelope, not verified.

    Raises:
        TrustError: it is not base64, too large, or of another kind.
    """
    if envelope.payload_type != PAYLOAD_TYPE:
        raise TrustError("result", f"the envelope holds {envelope.payload_type[:80]!r}, not a result")
    try:
        content = base64.b64decode(envelope.payload, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise TrustError("result", f"the envelope's payload is not base64: {exc}") from exc
    if len(content) > MAX_PAYLOAD_BYTES:
        raise TrustError("result", f"a result of {len(content)} bytes is larger than the {MAX_PAYLOAD_BYTES} allowed")
    return content


def decode(content: bytes) -> Result:
    """A result out of verified bytes.

    Raises:
        TrustError: it is none.
    """
    try:
        return msgspec.json.decode(content, type=Result)
    except MALFORMED as exc:
        raise TrustError("result", f"the signed bytes are not a result: {exc}") from exc
