"""The composition root: the only module that knows every adapter. Receives settings, hands on a controller whose parts are wired."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from contextlib import ExitStack

from edgefleet_shared.artifact import Layout
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.mqtt import Endpoint

from edgefleet_controller import notify
from edgefleet_controller.compile.jobs import CompileQueue
from edgefleet_controller.enrolment import Enrolment
from edgefleet_controller.health import Intake
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.results import ResultVerifier
from edgefleet_controller.rollout.service import RolloutService
from edgefleet_controller.settings import Settings
from edgefleet_controller.sign import ASSIGNMENT_LIFE, DirectorSigner, Repository, read_key
from edgefleet_controller.store import devices, rollouts
from edgefleet_controller.store.database import Database
from edgefleet_controller.transport.broker import CONTROLLER, Broker, BrokerFiles
from edgefleet_controller.transport.gateway import Gateway
from edgefleet_controller.transport.sender import BlobSender

log = logging.getLogger(__name__)

RENEW_EVERY_S = 3600.0
FLUSH_EVERY_S = 1.0
REMEMBERED_ARTIFACTS = 256


class Controller:
    """Every part, wired. The HTTP API is a face on this.

    Raises:
        EdgefleetError: home incomplete, port taken, broker missing, database out of reach.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = SystemClock()
        home = settings.home
        self.ca = CertificateAuthority(home / "ca", self.clock)
        for name in ("server", CONTROLLER):
            # Now, because broker and API read them once, when they start.
            if self.ca.renew_own(name):
                log.info("certificate renewed", extra={"reason": f"two thirds of the life of {name}.pem are over"})
        online = home / "keys" / "online"
        self.repository = Repository(
            home / "repository", read_key(online / "snapshot.pem"), read_key(online / "timestamp.pem"), self.clock
        )
        self.layout = Layout(home / "artifacts")
        self.database = Database(settings.database)
        self.database.migrate()
        self.intake = Intake(self.database, self.clock, ResultVerifier(self.ca.certificate))
        self.enrolment = Enrolment(self.database, self.ca, self.repository, settings, self.clock)
        self.compiling = CompileQueue(
            self.database,
            self.layout,
            settings.cache_folder,
            settings.cache_limit_bytes,
            self.clock,
            settings.compile_workers,
            settings.work_lease_s,
        )
        host, port = settings.broker_address
        self.broker: Broker | None = None
        if settings.broker == "embedded":
            files = BrokerFiles(
                folder=home / "broker", ca=home / "ca" / "ca.pem",
                certificate=home / "ca" / "server.pem", key=home / "ca" / "server.key",
            )  # fmt: skip
            self.broker = Broker(files, host, port)
        endpoint = Endpoint(
            host=host, port=port, ca=home / "ca" / "ca.pem",
            certificate=home / "ca" / f"{CONTROLLER}.pem", key=home / "ca" / f"{CONTROLLER}.key",
        )  # fmt: skip
        self.gateway = Gateway(endpoint, self.intake, lambda d, w: self.sender.want(d, w), self._came_up)
        self.sender = BlobSender(
            self.layout, self.gateway.publish_chunk, lambda: self.gateway.link.backlog, self.may_have, self.clock,
            bytes_per_s=settings.blob_bytes_per_s,
        )  # fmt: skip
        director = DirectorSigner(read_key(online / "director.pem"), self.clock)
        self.rollouts = RolloutService(self.database, director, self.gateway, self.intake, self.clock)
        self.http_sent_bytes = 0
        self._blobs_of: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._running = ExitStack()
        self._stopping = threading.Event()
        self._publish_again = threading.Event()
        self._threads = [
            threading.Thread(target=self.rollouts.run, args=(self._stopping,), name="rollouts", daemon=True),
            threading.Thread(target=self._keep_fresh, name="keep-fresh", daemon=True),
        ]

    def start(self) -> None:
        """Start every part; each that runs is noted, so that :meth:`stop` undoes exactly that."""
        stops = self._running
        stops.callback(self.database.close)
        if self.broker is not None:
            stops.callback(self.broker.stop)
            self.broker.start()
        stops.callback(self.intake.flush)
        self.gateway.start()
        stops.callback(self.gateway.stop)
        self.sender.start()
        stops.callback(self.sender.stop)
        self.compiling.start()
        stops.callback(self.compiling.stop)
        for thread in self._threads:
            thread.start()
            stops.callback(thread.join, 10)

    def stop(self) -> None:
        self._stopping.set()
        self.rollouts.wake()
        self._running.close()

    def publish_metadata(self, new: dict[str, bytes]) -> None:
        """Check and take signed metadata, and tell every board.

        Raises:
            TrustError: it was not taken.
        """
        self.gateway.publish_metadata(self.repository.publish(new))

    def may_have(self, device: str, digest: str) -> bool:
        """Whether a board may fetch a blob: it is part of what it was assigned."""
        with self.database.read() as session:
            try:
                row = devices.get_device(session, device)
                if row.revoked:
                    return False
                named = [name for name in (row.assignment, row.agent_assignment) if name]
                manifests = [rollouts.get_assignment(session, name).manifest for name in named]
            except EdgefleetError:
                return False
        return any(digest in self._blobs(manifest) for manifest in manifests)

    def _blobs(self, manifest: str) -> frozenset[str]:
        """The digests of an artifact, its manifest's included; none when it can't be read."""
        blobs = self._blobs_of.get(manifest)
        if blobs is None:
            try:
                blobs = frozenset({manifest, *(b.digest for b in self.layout.manifest(manifest).blobs())})
            except EdgefleetError as exc:
                log.error("assigned artifact unreadable", extra={"digest": manifest, "reason": str(exc)})
                return frozenset()
            self._blobs_of[manifest] = blobs
            if len(self._blobs_of) > REMEMBERED_ARTIFACTS:
                self._blobs_of.popitem(last=False)
        return blobs

    def sent_bytes(self) -> int:
        """Payload bytes that left this process, over MQTT and HTTP."""
        return self.gateway.link.sent_bytes + self.http_sent_bytes

    def _came_up(self) -> None:
        """A broker that was killed has lost what it acknowledged: publish everything that must be retained again. Not here, on
        the gateway's thread, which must not wait for the database nor die with it."""
        self._publish_again.set()

    def _publish_everything(self) -> None:
        self._publish_again.clear()
        try:
            self.gateway.publish_metadata(self.repository.files())
            self.rollouts.publish_all_again()
        except EdgefleetError:
            self._publish_again.set()
            raise

    def _keep_fresh(self) -> None:
        renew_at, begun = self.clock.monotonic(), False
        while not self._stopping.wait(FLUSH_EVERY_S):
            try:
                if self._publish_again.is_set():
                    self._publish_everything()
                self.intake.flush()
                if self.clock.monotonic() >= renew_at:
                    renew_at = self.clock.monotonic() + RENEW_EVERY_S
                    self.gateway.publish_metadata(self.repository.renew(at_start=not begun))
                    begun = True
                    self.rollouts.renew_assignments(ASSIGNMENT_LIFE.total_seconds() / 2)
            except EdgefleetError as exc:
                log.error("upkeep failed", extra={"code": exc.code, "reason": str(exc)})
            notify.send("WATCHDOG=1")
