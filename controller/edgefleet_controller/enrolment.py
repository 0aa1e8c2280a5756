"""Identity: enrolment. Receives a one-time token and a certificate request, hands on a certificate and where to find the fleet.

Boards and workers alike. The class and site of a board come from its token, its name from the token or its wish; of its request only the key is used.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from cryptography.hazmat.primitives import serialization
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import InputError
from edgefleet_shared.messages import Enrolled
from edgefleet_shared.topics import check_name
from edgefleet_shared.work import IDENTITY_PREFIX

from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.settings import Settings
from edgefleet_controller.sign import Repository
from edgefleet_controller.store import devices, workers
from edgefleet_controller.store.database import Database


class Enrolment:
    """Makes tokens and spends them."""

    def __init__(
        self, database: Database, ca: CertificateAuthority, repository: Repository, settings: Settings, clock: Clock
    ) -> None:
        self._database, self._ca, self._repository = database, ca, repository
        self._settings, self._clock = settings, clock

    def token(self, device_class: str, *, site: str, device: str, ttl_s: float, role: str = "device") -> str:
        """A one-time token: ``efe.<sha256 of our CA>.<secret>``, so that the board knows whom to meet.

        Args:
            device: the name that it is for; empty to let the board choose.
            role: ``device``, or ``worker``: a machine that compiles or, with a class, a builder board of it.

        Raises:
            NotFoundError: no such class. InputError: a name that can't be one.
        """
        if device:
            check_name(device, "device")
        if site:
            check_name(site, "site")
        with self._database.write() as session:
            secret = devices.new_token(
                session, device_class, site=site, label=device, ttl_s=ttl_s, now=self._clock.now(), role=role,
            )  # fmt: skip
        return f"efe.{self._ca.fingerprint}.{secret}"

    def enroll(self, token: str, device: str, request: str) -> Enrolled:
        """Take a board in. Token and name are spent only when all of it succeeds.

        Raises:
            TrustError: the token is not valid. ConflictError: the name is taken. InputError: a bad request.
        """
        secret = token.rpartition(".")[2]
        host, port = self._settings.broker_address
        api = urlsplit(self._settings.public_url)
        with self._database.write() as session:
            row = devices.use_token(session, secret, device, self._clock.now())
            name = row.label or device
            if not name:
                raise InputError("the board has no name", hint="give --name, or make the token with --name")
            if row.label and device and device != row.label:
                raise InputError(f"the token is for {row.label}, not for {device}")
            if row.role == "worker":
                # A prefix that no board's name can have: neither can be taken for the other, by the broker or by the API.
                certificate = self._ca.enroll(request.encode(), IDENTITY_PREFIX + check_name(name, "worker"))
                serial = f"{certificate.serial_number:x}"
                workers.enrol(session, name, row.device_class or "", certificate_serial=serial, now=self._clock.now())
            else:
                certificate = self._ca.enroll(request.encode(), check_name(name, "device"))
                serial = f"{certificate.serial_number:x}"
                devices.enrol(
                    session,
                    name,
                    row.device_class or "",
                    site=row.site,
                    certificate_serial=serial,
                    must_sign=not self._settings.trust_unsigned_results,
                    now=self._clock.now(),
                )
            return Enrolled(
                device=name,
                device_class=row.device_class or "",
                site=row.site,
                certificate=certificate.public_bytes(serialization.Encoding.PEM).decode(),
                ca=self._ca.pem.decode(),
                root=self._repository.root.decode(),
                broker_host=host,
                broker_port=port,
                api_host=api.hostname or "",
                api_port=api.port or 443,
            )
