"""The controller's own certificates: near their end it renews them when it starts, with the addresses and the keys that they had."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from edgefleet_controller.pki import SERVER_LIFE, CertificateAuthority
from edgefleet_controller.transport.broker import CONTROLLER
from edgefleet_shared.clock import ManualClock, SystemClock
from support.fleet import Fleet, device_class

NOW = datetime.now(timezone.utc)
HOSTS = ("127.0.0.1", "localhost", "fleet.example")


def aged(folder: Path, age: timedelta) -> CertificateAuthority:
    """A fleet's CA with certificates of its own of that age."""
    then = CertificateAuthority(folder, ManualClock((NOW - age).timestamp()))
    then.issue_server("server", HOSTS)
    then.issue_client(CONTROLLER)
    return CertificateAuthority(folder, SystemClock())


def read(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())


def names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_a_controller_whose_certificates_near_their_end_starts_with_new_ones(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    ca = fleet.home / "ca"
    aged(ca, SERVER_LIFE - timedelta(days=10))
    before = {name: read(ca, name) for name in ("server", CONTROLLER)}
    fleet.start()  # the gateway has connected to the broker by then
    try:
        fleet.client().put_class(device_class("pc"))
        for name, old in before.items():
            new = read(ca, name)
            assert new.not_valid_after_utc > NOW + timedelta(days=800)
            assert (new.subject, new.public_key()) == (old.subject, old.public_key())
        assert names(read(ca, "server")) == list(HOSTS)
        certificates = next(f for f in fleet.json("doctor") if f["what"] == "certificates")
        assert certificates["ok"]
    finally:
        fleet.close()


def test_what_is_young_or_from_another_authority_is_left_alone(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "ca", SystemClock())
    CertificateAuthority.create(tmp_path / "another", SystemClock())
    ca = aged(tmp_path / "ca", SERVER_LIFE * 0.6)
    aged(tmp_path / "another", SERVER_LIFE * 0.9)
    (tmp_path / "ca" / "server.pem").write_bytes((tmp_path / "another" / "server.pem").read_bytes())
    before = {name: read(ca.folder, name) for name in ("server", CONTROLLER)}
    assert not any(ca.renew_own(name) for name in (*before, "absent"))
    assert {name: read(ca.folder, name) for name in before} == before
