"""A fleet for tests: the real ``fleet`` program as processes in a home of its own, and boards that speak the real protocol."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edgefleet_controller.client import FleetClient
from edgefleet_shared import topics
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ended, Presence, Reported, SlotReport, encode
from edgefleet_shared.mqtt import Endpoint, Link, Will
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.topics import Kind
from safetensors.numpy import save_file
from tuf.api.metadata import Metadata

from support import artifacts
from support.broker import free_port, until
from support.signing import BoardKey

FLEET = (sys.executable, "-m", "edgefleet_controller.cli.main")
START_TIMEOUT_S = 60.0


class Fleet:
    """A home made by ``fleet init``, and the controller that runs in it."""

    def __init__(self, folder: Path, *init: str) -> None:
        self.folder, self.home = folder, folder / "home"
        self.api_port, self.broker_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        addresses = ("--listen", f"127.0.0.1:{self.api_port}", "--broker-port", str(self.broker_port))
        done = self.run("init", *addresses, *init)
        assert done.returncode == 0, done.stderr

    def run(self, *arguments: str, timeout_s: float = 180.0, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FLEET, *arguments], capture_output=True, text=True, timeout=timeout_s,
            env=os.environ | {"EDGEFLEET_HOME": str(self.home), "COLUMNS": "200"} | environment,
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        """What a command prints with ``--json``; it must succeed."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def start(self, **environment: str) -> Fleet:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*FLEET, "serve", "--home", str(self.home)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | environment,
            )  # fmt: skip
        until(self._answers, f"the controller answers, see {self.log_file}", START_TIMEOUT_S)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            return bool(self.client().status()["broker_connected"])
        except EdgefleetError:
            return False

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.process = None
        return code

    def close(self) -> None:
        if self.process is not None:
            self.end()

    @property
    def log_file(self) -> Path:
        return self.folder / "controller.log"

    def log(self) -> str:
        return self.log_file.read_text()

    def client(self) -> FleetClient:
        return FleetClient(self.home)

    def http(self, *, operator: bool = False, certificate: tuple[str, str] | None = None) -> httpx.Client:
        """A raw HTTPS client, with whatever credentials are asked for."""
        import ssl

        told = yaml.safe_load((self.home / "operator.yaml").read_text())
        context = ssl.create_default_context(cafile=self.home / told["ca"])
        if certificate is not None:
            context.load_cert_chain(*certificate)
        headers = {"Authorization": f"Bearer {told['token']}"} if operator else {}
        return httpx.Client(base_url=told["url"], headers=headers, verify=context, timeout=30, trust_env=False)

    def enroll(self, token: str, device: str = "") -> tuple[httpx.Response, bytes]:
        """Enrol as a board does: a key, a request, one call without credentials. Returns the answer and the key's PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        pem = request.public_bytes(serialization.Encoding.PEM).decode()
        with self.http() as http:
            answer = http.post("/v1/enroll", json={"token": token, "device": device, "request": pem})
        return answer, key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def board(self, name: str, device_class: str = "pc", folder: str = "") -> FakeBoard:
        token = self.client().token(device_class, site="lab", device=name)
        answer, key = self.enroll(token)
        assert answer.status_code == 200, answer.text
        return FakeBoard(self.folder / (folder or name), answer.json(), key)


class FakeBoard:
    """A board of which only the connection is real: does at once what a verified assignment would lead to.

    Args:
        told: the enrolment's answer.
    """

    def __init__(self, folder: Path, told: dict[str, Any], key: bytes) -> None:
        folder.mkdir()
        self.name, self.device_class = str(told["device"]), str(told["device_class"])
        for file, content in (("ca.pem", told["ca"].encode()), ("b.pem", told["certificate"].encode()), ("b.key", key)):
            (folder / file).write_bytes(content)
        self.certificate = (str(folder / "b.pem"), str(folder / "b.key"))
        endpoint = Endpoint(
            host=told["broker_host"], port=told["broker_port"], ca=folder / "ca.pem", certificate=folder / "b.pem",
            key=folder / "b.key",
        )  # fmt: skip
        self._key = BoardKey(self.name, told["certificate"], key)
        self._presence = topics.of_device(self.name, Kind.PRESENCE)
        will = Will(self._presence, encode(Presence(False, "boot-1")))
        self.active: SlotReport | None = None
        self.outcome_of: Callable[[str], Outcome] = lambda version: Outcome.SUCCEEDED
        self.signs = True
        self.held = False  # an assignment that comes now is not answered
        self.assigned: list[str] = []  # ids, in order
        self._link = Link(endpoint, self.name, on_message=self._take, on_up=self._up, will=will)
        self._link.subscribe(topics.of_device(self.name, Kind.DESIRED))

    def start(self) -> FakeBoard:
        self._link.start()
        until(self._link.connected.is_set, f"{self.name} is connected")
        return self

    def stop(self) -> None:
        self._link.stop([(self._presence, encode(Presence(False, "boot-1")), True)])

    def present(self, boot: str) -> None:
        """Come online as that start of the agent."""
        self._link.publish(self._presence, encode(Presence(True, boot)), retain=True)

    def _up(self) -> None:
        self.present("boot-1")
        self._report()

    def _take(self, topic: str, payload: bytes) -> None:
        (target,) = Metadata.from_bytes(payload).signed.targets.values()  # type: ignore[attr-defined]
        wanted = target.unrecognized_fields["custom"]["assignment"]
        if wanted["id"] not in self.assigned:
            self.assigned.append(wanted["id"])
        if self.held:
            return
        outcome = self.outcome_of(wanted["version"])
        if outcome is Outcome.SUCCEEDED:
            self.active = SlotReport(
                manifest=wanted["manifest"], model=wanted["model"], version=wanted["version"], status="good"
            )
        ended = Ended(assignment=wanted["id"], manifest=wanted["manifest"], outcome=outcome, reason="as the test says")
        self._report(ended, digest_of(payload))

    def _report(self, ended: Ended | None = None, desired: str = "") -> None:
        board = Fingerprint(arch=platform.machine(), engines={"onnxruntime": "1.20.0"}, memory_bytes=1 << 34)
        report = Reported(
            device=self.name, device_class=self.device_class, boot="boot-1", at=0.0, state=State.IDLE,
            agent_version="test", fingerprint=board, active=self.active, ended=ended,
            result=self._key.sign(ended) if ended and self.signs else None, assignment=ended.assignment if ended else "",
            desired_seen=desired,
        )  # fmt: skip
        self._link.publish(topics.of_device(self.name, Kind.REPORTED), encode(report), retain=True)


def manifests(folder: Path) -> Path:
    """A device class of this machine, a tiny float model in three versions, a rollout; real files, valid."""
    folder.mkdir()
    (folder / "class.yaml").write_text(yaml.safe_dump(device_class("pc")))
    for version in (1, 2, 3):
        (folder / f"{version}.onnx").write_bytes(artifacts.onnx_model(version))
        pictures = artifacts.pictures(version, 48).astype(np.float32) / 127.5 - 1
        data = {}
        for n, split in enumerate(("calibration", "holdout", "golden")):
            save_file({"x": pictures[16 * n : 16 * (n + 1)]}, folder / f"{version}-{split}.safetensors")
            data[split] = {"path": f"{version}-{split}.safetensors"}
        spec = {
            "version": str(version), "source": {"path": f"{version}.onnx"}, "sizes": {"n": 1},
            "output": {"kind": "classification"}, **data,
        }  # fmt: skip
        write(folder / f"model-{version}.yaml", "Model", "toy", spec)
    write(folder / "rollout.yaml", "Rollout", "toy-1", {
        "model": "toy", "version": "1", "soak_s": 1.0, "timeout_s": 60.0, "reach_window_s": 60.0,
        "waves": [{"name": "canary", "per_class": 1}, {"name": "all", "percent": 100}],
    })  # fmt: skip
    return folder


def device_class(name: str, **spec: Any) -> dict[str, Any]:
    given = {
        "arch": platform.machine(), "engine": "onnxruntime", "precision": "fp32",
        "budgets": {"latency_p95_ms": 1000.0, "memory_bytes": 2_000_000_000},
    }  # fmt: skip
    return {
        "apiVersion": "edgefleet/v1",
        "kind": "DeviceClass",
        "metadata": {"name": name},
        "spec": given | spec,
    }


def write(path: Path, kind: str, name: str, spec: dict[str, Any]) -> Path:
    value = {"apiVersion": "edgefleet/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def broker_pid(fleet: Fleet) -> int:
    return int(fleet.client().status()["broker_pid"])


def workers_of(pid: int) -> list[int]:
    """The compile workers among a process' children."""
    children = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return [p for p in children if b"edgefleet_controller.compile.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]
