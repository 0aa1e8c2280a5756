"""The smallest controller that a real agent can be run against: real broker, real signatures, real sender, no rollout engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from edgefleet_agent import settings as board_settings
from edgefleet_agent.settings import Settings
from edgefleet_controller.sign import DirectorSigner, ReleaseSigner, Repository, make_key
from edgefleet_controller.transport.broker import CONTROLLER
from edgefleet_controller.transport.gateway import Gateway
from edgefleet_controller.transport.sender import BlobSender
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Descriptor, Layout
from edgefleet_shared.assignment import Assignment, Subject
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.messages import Ack, Event, OutcomeTold, Presence, Reported
from edgefleet_shared.outcomes import Outcome

from support.broker import TestBroker, until
from support.runtimes import Runtime


class Controller:
    """Signs and publishes by hand; keeps every report."""

    def __init__(self, folder: Path, device_class: str = "test-class", bytes_per_s: int = 100_000_000) -> None:
        self.folder, self.device_class = folder, device_class
        self.clock = SystemClock()
        self.broker = TestBroker(folder)
        self.broker.broker.start()
        online = folder / "online"
        keys = [make_key(online / f"{n}.pem") for n in ("snapshot", "timestamp", "director")]
        self.signer = ReleaseSigner(folder / "offline", self.clock)
        self.repository = Repository(folder / "repository", keys[0], keys[1], self.clock)
        self.director = DirectorSigner(keys[2], self.clock)
        first = self.signer.begin(*keys, signers=1, threshold=1)
        self.root = first["1.root.json"]
        self.repository.publish(first)
        self.repository.publish(self.signer.add_class(self.need("targets.json"), device_class))
        self.layout = Layout(folder / "artifacts")
        self.reports: dict[str, Reported] = {}
        self.presences: dict[str, bool] = {}
        self.events_seen: list[Event] = []
        self.gateway = Gateway(
            self.broker.endpoint(CONTROLLER), self, lambda d, w: self.sender.want(d, w), lambda: None
        )
        self._bytes_per_s = bytes_per_s
        self._versions: dict[str, int] = {}
        self._count = 0
        self.start_sender()
        self.gateway.start()
        until(self.gateway.link.connected.is_set, "the gateway is connected")
        self.gateway.publish_metadata(self.repository.files())

    def start_sender(self) -> None:
        """Send what boards want, from now on; anew after ``sender.stop()``."""
        self.sender = BlobSender(
            self.layout,
            self.gateway.publish_chunk,
            lambda: self.gateway.link.backlog,
            lambda device, digest: True,
            self.clock,
            bytes_per_s=self._bytes_per_s,
        )
        self.sender.start()

    def stop(self) -> None:
        self.sender.stop()
        self.gateway.stop()
        self.broker.broker.stop()

    # -- ReportSink

    def reported(self, device: str, message: Reported) -> None:
        self.reports[device] = message

    def presence(self, device: str, message: Presence) -> None:
        self.presences[device] = message.online

    def events(self, events: Sequence[Event]) -> list[tuple[str, Ack]]:
        self.events_seen.extend(events)
        return [(event.device, Ack(event.boot, event.sequence)) for event in events]

    # -- by hand

    def need(self, name: str) -> bytes:
        content = self.repository.read(name)
        assert content is not None
        return content

    def release(self, manifest: Descriptor, model: str, version: str) -> None:
        requires = self.layout.config(self.layout.manifest(manifest.digest)).requires
        changed = self.repository.publish(
            self.signer.release(
                self.need(f"class-{self.device_class}.json"),
                device_class=self.device_class, model=model, version=version, manifest=manifest, requires=requires,
            )
        )  # fmt: skip
        self.gateway.publish_metadata(changed)

    def assign(self, device: str, manifest: Descriptor, version: str, soak_s: int = 1, **more: object) -> str:
        self._count += 1
        assignment = Assignment(
            id=f"a{self._count}", device=device, device_class=self.device_class, rollout="r", model="toy",
            version=version, manifest=manifest.digest, size=manifest.size, issued_at=int(self.clock.now()),
            soak_s=soak_s,
        )  # fmt: skip
        assignment = msgspec.structs.replace(assignment, **more)
        publish = self.gateway.publish_desired
        if assignment.subject is Subject.AGENT:
            publish = self.gateway.publish_desired_agent
        publish(device, self.signed(assignment))
        return assignment.id

    def signed(self, assignment: Assignment) -> bytes:
        """The next assignment of its device, signed and not published."""
        self._versions[assignment.device] = self._versions.get(assignment.device, 0) + 1
        return self.director.sign(assignment, self._versions[assignment.device])

    def outcome(self, device: str, assignment: str, timeout_s: float = 60.0) -> Outcome:
        """Wait until the board tells how an assignment ended."""

        def ended() -> bool:
            report = self.reports.get(device)
            return report is not None and report.ended is not None and report.ended.assignment == assignment

        until(ended, f"{device} tells how {assignment} ended", timeout_s)
        told = self.reports[device].ended
        assert told is not None
        return told.outcome

    def reason(self, device: str) -> str:
        told = self.reports[device].ended
        return told.reason if told else ""

    def outcomes_told(self, device: str) -> list[Outcome]:
        return [
            e.body.ended.outcome for e in self.events_seen if e.device == device and isinstance(e.body, OutcomeTold)
        ]


class Board:
    """A board: state folder, enrolment, the real ``fleet-runtime`` and the real ``fleet-agent`` as processes.

    Args:
        python: the interpreter of the agent, in the environment that it is installed in.
    """

    def __init__(self, controller: Controller, name: str, folder: Path, python: str = sys.executable) -> None:
        self.controller, self.name, self.state, self.python = controller, name, folder, python
        for sub in ("identity", "trust", "metadata", "run"):
            atomic.make_folder(folder / sub)
        endpoint = controller.broker.endpoint(name)
        (folder / "identity" / "agent.key").write_bytes(endpoint.key.read_bytes())
        (folder / "identity" / "agent.pem").write_bytes(endpoint.certificate.read_bytes())
        (folder / "identity" / "ca.pem").write_bytes(endpoint.ca.read_bytes())
        (folder / "trust" / "root.json").write_bytes(controller.root)
        board_settings.write(
            folder,
            Settings(
                device=name, device_class=controller.device_class, site="", broker_host="127.0.0.1",
                broker_port=controller.broker.port, health_period_s=0.5,
            ),
        )  # fmt: skip
        self.runtime = Runtime(folder)
        self.agent: subprocess.Popen[bytes] | None = None

    def start(self) -> Board:
        self.runtime.start(ready=False)
        self.start_agent()
        return self

    def start_agent(self) -> None:
        with (self.state / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [self.python, "-m", "edgefleet_agent.cli", "run", "--state", str(self.state)],
                stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def kill_agent(self, number: int = signal.SIGKILL) -> None:
        if self.agent is not None:
            self.agent.send_signal(number)
            self.agent.wait(20)
            self.agent = None

    def stop(self) -> None:
        self.kill_agent(signal.SIGTERM)
        if self.runtime.process is not None:
            self.runtime.stop()

    def log(self) -> str:
        return (self.state / "agent.log").read_text()
