"""A rollout service on a real database that can be killed between any two steps, with boards that read what is retained and report."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
from edgefleet_controller.health import Intake
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.results import ResultVerifier
from edgefleet_controller.rollout.fakes import RetainingPublisher, UnsignedDirector, read_unsigned
from edgefleet_controller.rollout.service import RolloutService
from edgefleet_controller.rollout.views import (
    ENDED,
    Phase,
    Rollout,
    RolloutSpec,
    Standing,
)
from edgefleet_controller.store import catalog, devices
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import Artifact
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import AGENT, Subject
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.errors import TransportError, TrustError
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import AgentReport, Ended, Presence, Reported, SlotReport
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.trust import Assignment
from sqlalchemy import event

from support.signing import BoardKey
from support.simulated_boards import FINGERPRINT, REQUIREMENT, manifest, spec


class Killed(BaseException):
    """The process ends here. No handler may hold it up."""


class Chaos:
    """Counts the steps between which a controller can be killed, and kills at one of them."""

    def __init__(self) -> None:
        self.at, self.step = -1, 0

    def between(self) -> None:
        self.step += 1
        if self.step == self.at:
            raise Killed


class Director(UnsignedDirector):
    def __init__(self, chaos: Chaos) -> None:
        self.chaos, self.refuses = chaos, ""

    def sign(self, assignment: Assignment, version: int) -> bytes:
        self.chaos.between()
        if self.refuses:
            raise TrustError("director", self.refuses)
        return super().sign(assignment, version)


class Broker(RetainingPublisher):
    def __init__(self, chaos: Chaos) -> None:
        super().__init__()
        self.chaos, self.down = chaos, False

    def publish_desired(self, device: str, assignment: bytes) -> None:
        self.chaos.between()
        if self.down:
            raise TransportError("the broker is gone")
        super().publish_desired(device, assignment)
        self.chaos.between()

    def retained_about(self, subject: Subject) -> dict[str, bytes]:
        return self.retained if subject is Subject.MODEL else self.retained_agent


class Site:
    """Controller and boards. Boards outlive the controller.

    Args:
        subject: what is rolled out: a model, or the agent itself.
    """

    def __init__(
        self, folder: Path, boards: dict[str, str], bad_versions: tuple[str, ...] = (), subject: Subject = Subject.MODEL
    ) -> None:
        self.subject, self.model = subject, AGENT if subject is Subject.AGENT else "m"
        self.clock, self.chaos = ManualClock(), Chaos()
        self.director, self.broker = Director(self.chaos), Broker(self.chaos)
        self.url = f"sqlite:///{folder}/fleet.db"
        self.bad_versions = bad_versions
        self.given: dict[str, list[tuple[str, int]]] = {name: [] for name in boards}
        self.restored = False
        self.reports: dict[str, Reported] = {}
        self.kills = 0
        database = Database(self.url)
        database.migrate()
        with database.write() as session:
            for device_class in sorted(set(boards.values())):
                devices.put_class(session, device_class, "{}", 1.0)
                for version in ("1", "2", "3"):
                    catalog.add_version(session, self.model, version, f"sha256:{version}", "{}", 1.0)
                    catalog.put_artifact(
                        session,
                        Artifact(
                            manifest=manifest(device_class, version), model=self.model, version=version, device_class=device_class,
                            manifest_bytes=700, size_bytes=5000, state="signed", created_at=1.0,
                            requirement=msgspec.json.encode(REQUIREMENT).decode(),
                        ),
                    )  # fmt: skip
            for name, device_class in boards.items():
                devices.enrol(session, name, device_class, now=1.0)
        database.close()
        self.boards = boards
        self.ca = CertificateAuthority.create(folder / "ca", self.clock)
        self.keys = {name: BoardKey.enrolled(self.ca, name) for name in boards}
        self.start()
        for name, device_class in boards.items():
            report = Reported(
                device=name, device_class=device_class, boot="boot1", at=1.0, state=State.IDLE, agent_version="1",
                fingerprint=FINGERPRINT, agent=AgentReport(),
            )  # fmt: skip
            self.reports[name] = self.saying(report, active=self.slot(device_class, "1"))
            self.intake.presence(name, Presence(online=True, boot="boot1"))
            self.intake.reported(name, self.reports[name])

    def slot(self, device_class: str, version: str) -> SlotReport:
        return SlotReport(manifest=manifest(device_class, version), model=self.model, version=version, status="good")

    def said(self, report: Reported) -> Reported | AgentReport:
        """The part of a report that is about what is rolled out."""
        if self.subject is Subject.MODEL:
            return report
        assert report.agent is not None
        return report.agent

    def saying(self, report: Reported, **changes: object) -> Reported:
        """A report with other words in that part."""
        changed = msgspec.structs.replace(self.said(report), **changes)
        return changed if isinstance(changed, Reported) else msgspec.structs.replace(report, agent=changed)

    def start(self) -> None:
        """A controller process: all that it knows is in the database."""
        self.database = Database(self.url)
        event.listen(self.database.engine, "commit", lambda _connection: self.chaos.between())
        self.intake = Intake(self.database, self.clock, ResultVerifier(self.ca.certificate))
        self.service = RolloutService(self.database, self.director, self.broker, self.intake, self.clock)

    def hear(self) -> None:
        """What the broker retains comes again to a controller that connects."""
        for name, report in self.reports.items():
            self.intake.presence(name, Presence(online=True, boot="boot1"))
            self.intake.reported(name, report)

    def backup(self) -> Path:
        """What an operator copies while the controller is stopped."""
        self.database.close()
        source = Path(self.url.removeprefix("sqlite:///"))
        copy = Path(shutil.copy(source, source.with_name("backup.db")))
        self.start()
        self.hear()
        return copy

    def restore(self, copy: Path) -> None:
        """The backup runs, and has heard nothing yet."""
        self.database.close()
        source = Path(self.url.removeprefix("sqlite:///"))
        for left in source.parent.glob(f"{source.name}-*"):
            left.unlink()
        shutil.copy(copy, source)
        self.restored = True
        self.clock.advance(600)  # versions are numbered by the minute
        self.start()

    def tick(self) -> None:
        try:
            self.service.tick()
            self.chaos.between()
        except Killed:
            self.kills += 1
            self.database.close()
            self.start()
            self.hear()

    def work(self) -> None:
        """Every board looks at what is retained for it, and does it."""
        for name, payload in self.broker.retained_about(self.subject).items():
            report, device_class = self.reports[name], self.boards[name]
            if self.said(report).desired_seen == digest_of(payload):
                continue
            wanted, version = read_unsigned(payload)
            known = self.given[name]
            assert wanted.device == name
            if known and version <= known[-1][1]:
                assert self.restored, "an assignment's version must rise"
                self.reports[name] = self.saying(report, desired_seen=digest_of(payload), refusal="older than the last")
                self.intake.reported(name, self.reports[name])
                continue
            known.append((wanted.id, version))
            told = self.said(report).ended
            if told is not None and told.assignment == wanted.id:
                self.reports[name] = self.saying(report, desired_seen=digest_of(payload), refusal="")
                self.intake.reported(name, self.reports[name])
                continue
            good = wanted.version not in self.bad_versions
            active = self.slot(device_class, wanted.version) if good else self.said(report).active
            ended = Ended(
                assignment=wanted.id, manifest=wanted.manifest, reason="" if good else "agreement too low",
                outcome=Outcome.SUCCEEDED if good else Outcome.FAILED_NO_CHANGE, number=len(known),
            )  # fmt: skip
            report = self.saying(
                report, assignment=wanted.id, desired_seen=digest_of(payload), active=active, ended=ended,
                result=self.keys[name].sign(ended, self.subject),
            )  # fmt: skip
            self.reports[name] = report
            self.intake.reported(name, report)

    def run(self, name: str, rounds: int = 60) -> Rollout:
        for _ in range(rounds):
            self.tick()
            self.work()
            self.clock.advance(1)
            rollout = self.service.get(name)
            if rollout.phase in ENDED | {Phase.PAUSED}:
                return rollout
        return rollout

    def create(self, name: str = "r2", version: str = "2", **fields: object) -> RolloutSpec:
        wanted = spec(model=self.model, version=version, **fields)
        self.service.create(name, wanted)
        return wanted

    def versions(self) -> dict[str, str]:
        active = {name: self.said(report).active for name, report in self.reports.items()}
        return {name: slot.version if slot else "" for name, slot in active.items()}


BOARDS = {"a1": "x86", "a2": "x86", "a3": "x86", "b1": "arm", "b2": "arm"}


def standings(rollout: Rollout) -> dict[str, tuple[Standing, Outcome | None, str]]:
    return {d: (p.standing, p.outcome, numbered(p.assignment)) for d, p in rollout.boards.items()}


def numbered(assignment: str) -> str:
    """Its rollout, board and number; when it was given, which its name ends with, differs with what went wrong on the way."""
    return assignment.rpartition(".")[0]
