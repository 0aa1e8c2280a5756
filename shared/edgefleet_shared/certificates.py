"""Certificates as a lean process reads them: receives a PEM file, hands on when it begins, ends and is to be renewed, and what a wrong clock may judge. The standard library alone."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

from edgefleet_shared.errors import EnvironmentProblem

SHARE_OF_LIFE = 2 / 3  # after which a board's or a worker's is renewed
LOOK_S = 60.0  # between two looks: a machine that is never on for long must get to it, too
AGAIN_LAST_S = 6 * 3600.0  # the longest pause between two tries of what failed
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME of x509_vfy.h, for which Python has no name


def validity(certificate: Path) -> tuple[float, float]:
    """When a certificate begins and ends, in seconds since 1970.

    Raises:
        EnvironmentProblem: it can't be read.
    """
    try:
        # A private decoder, but the standard library has no other, and cryptography is too heavy to stay resident.
        fields = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
    except OSError as exc:  # ssl's own errors are of that kind
        raise EnvironmentProblem(f"{certificate} can't be read: {exc}", hint="enrol the board again") from exc
    return ssl.cert_time_to_seconds(fields["notBefore"]), ssl.cert_time_to_seconds(fields["notAfter"])


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
