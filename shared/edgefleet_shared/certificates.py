"""Certificates as a lean process reads them: receives a PEM file, hands on when it begins and ends. The standard library alone."""

from __future__ import annotations

import ssl
from pathlib import Path

from edgefleet_shared.errors import EnvironmentProblem


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
