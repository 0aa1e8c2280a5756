"""When a certificate begins and ends, as a lean process reads it: the same as OpenSSL says, and damaged ones are told."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from edgefleet_shared.certificates import validity
from edgefleet_shared.errors import EnvironmentProblem

DAY = datetime.timedelta(days=1)


def certificate(folder: Path, begins: datetime.datetime, ends: datetime.datetime, version_serial: int = 7) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "board" * 12)])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(version_serial)
        .not_valid_before(begins).not_valid_after(ends).sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / "board.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    "begins",
    [
        datetime.datetime(1970, 1, 2, tzinfo=datetime.timezone.utc),
        datetime.datetime(2026, 2, 28, 23, 59, 59, tzinfo=datetime.timezone.utc),
        datetime.datetime(2049, 12, 31, tzinfo=datetime.timezone.utc),
    ],
)
@pytest.mark.parametrize("life", [DAY, 365 * DAY, 40 * 365 * DAY])
@pytest.mark.parametrize("serial", [1, 2**150])
def test_times_are_those_that_openssl_reads(
    tmp_path: Path, begins: datetime.datetime, life: datetime.timedelta, serial: int
) -> None:
    path = certificate(tmp_path, begins, begins + life, serial)
    found: Any = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
    assert validity(path) == tuple(ssl.cert_time_to_seconds(found[name]) for name in ("notBefore", "notAfter"))


def test_of_a_chain_the_first_counts(tmp_path: Path) -> None:
    begins = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    other = certificate(tmp_path, begins, begins + 900 * DAY).read_text()
    path = certificate(tmp_path, begins, begins + DAY)
    path.write_text(path.read_text() + other)
    assert validity(path)[1] - validity(path)[0] == DAY.total_seconds()


@pytest.mark.parametrize("damage", ["empty", "zeros", "half", "no certificate", "folder", "another structure"])
def test_a_damaged_one_is_told(tmp_path: Path, damage: str) -> None:
    begins = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    path = certificate(tmp_path, begins, begins + DAY)
    der = ssl.PEM_cert_to_DER_cert(path.read_text())
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "zeros":
            path.write_bytes(bytes(700))
        case "half":
            path.write_text(ssl.DER_cert_to_PEM_cert(der[: len(der) // 2]))
        case "no certificate":
            path.write_text("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
        case "folder":
            path.unlink()
            path.mkdir()
        case "another structure":
            path.write_text(ssl.DER_cert_to_PEM_cert(bytes([0x30, 3, 2, 1, 5])))
    with pytest.raises(EnvironmentProblem, match=r"board\.pem can't be read"):
        validity(path)
