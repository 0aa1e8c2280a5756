"""Certificates as a lean process reads them: receives a PEM file, hands on when it begins, ends and is to be renewed, and what a wrong clock may judge. The standard library alone."""

from __future__ import annotations

import datetime
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from edgefleet_shared.errors import EnvironmentProblem

SHARE_OF_LIFE = 2 / 3  # after which a board's or a worker's is renewed
LOOK_S = 60.0  # between two looks: a machine that is never on for long must get to it, too
AGAIN_LAST_S = 6 * 3600.0  # the longest pause between two tries of what failed
_VERSION, _UTC_TIME = 0xA0, 0x17  # tags
_TIME = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})Z")
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME of x509_vfy.h, for which Python has no name


def validity(certificate: Path) -> tuple[float, float]:
    """When a certificate begins and ends, in seconds since 1970.

    Raises:
        EnvironmentProblem: it can't be read.
    """
    try:
        text = certificate.read_text(encoding="ascii")
        end = "-----END CERTIFICATE-----"
        der = ssl.PEM_cert_to_DER_cert(text[: text.index(end) + len(end)])
        # Certificate, in it what is signed, and there version, serial number, algorithm, issuer and then the times (RFC 5280, 4.1).
        signed = next(_values(next(_values(der))[1]))[1]
        fields = [value for tag, value in _values(signed) if tag != _VERSION]
        begins, ends = (_seconds(tag, value) for tag, value in _values(fields[3]))
    except (OSError, ValueError, IndexError, StopIteration) as exc:
        raise EnvironmentProblem(f"{certificate} can't be read: {exc}", hint="enrol the board again") from exc
    return begins, ends


def _values(der: bytes) -> Iterator[tuple[int, bytes]]:
    """(tag, content) of what follows each other. Python's own decoder is private and touches half a megabyte, cryptography much more: too heavy to stay resident."""
    while der:
        tag, length, head = der[0], der[1], 2
        if length & 0x80:
            head += length & 0x7F
            length = int.from_bytes(der[2:head], "big")
        if head + length > len(der):
            raise ValueError("it ends too early")
        yield tag, der[head : head + length]
        der = der[head + length :]


def _seconds(tag: int, value: bytes) -> float:
    """A UTCTime, whose years have two digits, or a GeneralizedTime (RFC 5280, 4.1.2.5)."""
    told = value.decode("ascii")
    if tag == _UTC_TIME:
        told = ("20" if told[:2] < "50" else "19") + told
    fields = _TIME.fullmatch(told)
    if fields is None:
        raise ValueError(f"{told!r} is no time")
    # strptime would bring calendar, locale and a table of patterns: a fifth of a megabyte that stays.
    return datetime.datetime(*map(int, fields.groups()), tzinfo=datetime.timezone.utc).timestamp()  # type: ignore[misc, arg-type]


def is_due(certificate: Path, now: float) -> bool:
    """Whether a certificate should be renewed.

    Args:
        now: seconds since 1970.

    Raises:
        EnvironmentProblem: it can't be read.
    """
    begins, ends = validity(certificate)
    return now >= begins + SHARE_OF_LIFE * (ends - begins)


def mind_clock(context: ssl.SSLContext, begins: float) -> None:
    """Let this machine's clock judge the times of certificates in connections that are made from here on, unless it is known to be wrong: it
    stands before a certificate's beginning that is surely over, as on a board without a clock where nobody tells the time. It would let an
    ended one pass anyhow, and refuse all that are good. Name and authority are looked at as always.

    Args:
        begins: seconds since 1970, of a certificate that is known to be ours.
    """
    if time.time() < begins:
        context.verify_flags |= _NO_CHECK_TIME
    else:
        context.verify_flags &= ~_NO_CHECK_TIME
