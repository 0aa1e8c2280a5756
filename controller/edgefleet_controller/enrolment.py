"""Identity: enrolment. Receives a one-time token and a certificate request, hands on a certificate and where to find the fleet.

Boards and workers alike. The class and site of a board come from its token, its name from the token or its wish; of its request only the key is used.
A certificate is renewed for whoever shows it over TLS, and so has its key: the same name, the same key, a whole life again.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_shared import __version__
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import InputError, TrustError
from edgefleet_shared.messages import Enrolled, Renewed
from edgefleet_shared.topics import check_name
from edgefleet_shared.work import IDENTITY_PREFIX
from sqlmodel import Session

from edgefleet_controller.compile.leases import another_version
from edgefleet_controller.pki import CertificateAuthority, common_name, is_of_enrolment, requested_key
from edgefleet_controller.settings import Settings
from edgefleet_controller.sign import Repository
from edgefleet_controller.store import devices, workers
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import Device, EnrolmentToken, Worker
from edgefleet_controller.transport.broker import CONTROLLER


def _check_device_name(name: str) -> str:
    """``name``, if a board may have it.

    Raises:
        InputError: it can't be one, or the broker would take the board for the controller, which may write everything.
    """
    if name == CONTROLLER:
        raise InputError(f"{name} is the controller's own name", hint="choose another one for the board")
    return check_name(name, "device")


def _holder(session: Session, certificate: x509.Certificate) -> str:
    row = devices.get_device(session, common_name(certificate))
    if row.revoked:
        raise TrustError("certificate", f"device {row.name} was revoked")
    if not is_of_enrolment(certificate, row.enrolled_at):
        raise TrustError("certificate", f"device {row.name} was enrolled anew since it got this certificate")
    return row.name


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
            check_name(device, "worker") if role == "worker" else _check_device_name(device)
        if site:
            check_name(site, "site")
        with self._database.write() as session:
            secret = devices.new_token(
                session, device_class, site=site, label=device, ttl_s=ttl_s, now=self._clock.now(), role=role,
            )  # fmt: skip
        return f"efe.{self._ca.fingerprint}.{secret}"

    def enroll(self, token: str, device: str, request: str, *, edgefleet: str = "") -> Enrolled:
        """Take a board in. Token and name are spent only when all of it succeeds. Who shows a spent token once more, and the same key, gets
        the same answer: the power may have been cut before the first one was kept.

        Args:
            edgefleet: the version that it says it runs; empty when it does not say.

        Raises:
            TrustError: the token is not valid. ConflictError: the name is taken, or what would compile runs another version. InputError: a bad
                request.
        """
        secret = token.rpartition(".")[2]
        key = requested_key(request.encode())
        with self._database.write() as session:
            spent = devices.spent_token(session, secret, self._clock.now())
            if spent is not None and self._is_in_force(session, spent, key):
                return self._answer(spent)
            row = devices.use_token(session, secret, device, self._clock.now())
            name = row.label or device
            if not name:
                raise InputError("the board has no name", hint="give --name, or make the token with --name")
            if row.label and device and device != row.label:
                raise InputError(f"the token is for {row.label}, not for {device}")
            if row.role == "worker":
                if not row.device_class and edgefleet not in ("", __version__):
                    raise another_version(name, edgefleet)
                # A prefix that no board's name can have: neither can be taken for the other, by the broker or by the API.
                certificate = self._ca.enroll(request.encode(), IDENTITY_PREFIX + check_name(name, "worker"))
                serial = f"{certificate.serial_number:x}"
                workers.enrol(session, name, row.device_class or "", certificate_serial=serial, now=self._clock.now())
            else:
                certificate = self._ca.enroll(request.encode(), _check_device_name(name))
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
            row.certificate = certificate.public_bytes(serialization.Encoding.PEM).decode()
            session.add(row)
            return self._answer(row)

    def renew(self, shown: bytes) -> Renewed:
        """Another certificate for a board or a worker that shows one of ours (DER) which has not ended. It may show the old one again: the
        new one was perhaps cut off on its way.

        Raises:
            TrustError, NotFoundError: a board, as :meth:`holder`; a worker that is none any more; it is neither's.
        """
        certificate = x509.load_der_x509_certificate(shown)
        with self._database.write() as session:
            renewed = self._ca.renew(certificate)
            serial, name = f"{renewed.serial_number:x}", common_name(certificate)
            if name.startswith(IDENTITY_PREFIX):
                shown_serial = f"{certificate.serial_number:x}"
                workers.renew(session, name.removeprefix(IDENTITY_PREFIX), shown_serial, serial)
            else:
                devices.renew(session, _holder(session, certificate), serial)
        return Renewed(renewed.public_bytes(serialization.Encoding.PEM).decode())

    def holder(self, shown: bytes) -> str:
        """The board that a certificate of ours (DER), shown over TLS, makes its holder.

        Raises:
            TrustError: the board was revoked, or it got the certificate before it was enrolled anew. NotFoundError: no such board.
        """
        with self._database.read() as session:
            return _holder(session, x509.load_der_x509_certificate(shown))

    def _is_in_force(self, session: Session, spent: EnrolmentToken, key: ec.EllipticCurvePublicKey) -> bool:
        """Whether what was given for a token is this key's, and still the one certificate of its holder."""
        certificate = x509.load_pem_x509_certificate(spent.certificate.encode())
        name = spent.label or spent.used_by
        holder = session.get(Worker, name) if spent.role == "worker" else session.get(Device, name)
        return (
            certificate.public_key() == key
            and holder is not None
            and not holder.revoked
            and holder.certificate_serial == f"{certificate.serial_number:x}"
        )

    def _answer(self, spent: EnrolmentToken) -> Enrolled:
        host, port = self._settings.broker_address
        api = urlsplit(self._settings.public_url)
        return Enrolled(
            device=spent.label or spent.used_by,
            device_class=spent.device_class or "",
            site=spent.site,
            certificate=spent.certificate,
            ca=self._ca.pem.decode(),
            root=self._repository.root.decode(),
            broker_host=host,
            broker_port=port,
            api_host=api.hostname or "",
            api_port=api.port or 443,
        )
