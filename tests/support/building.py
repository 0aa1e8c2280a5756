"""A public fake of an engine that builds (the port's ``Builder``): well or as badly behaved as its model says; and how a board gets it.

Its model is a line of JSON (:class:`Does`) and the tests' classifier as ONNX; its plan is a line that says what it was made by, and that ONNX,
which onnxruntime then runs. The engine's version is that of its distribution: :class:`Installed` makes one, in a folder for ``PYTHONPATH``, and
changes it as an upgrade of the package does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
from edgefleet_agent.runtime.engines.onnxruntime import OnnxruntimeEngine, OnnxruntimeSession
from edgefleet_agent.runtime.engines.port import installed_version
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError

from support import artifacts

DISTRIBUTION = "edgefleet-test-engine"
TESTS = Path(__file__).resolve().parents[1]
_HEAD = b"a plan by "


class Does(msgspec.Struct, frozen=True):
    """How building goes. ``linger_s`` is how long a good build takes; ``plan_bytes`` how large its plan is at least."""

    building: Literal["good", "refuse", "hang", "eat", "crash", "flood", "fork", "empty"] = "good"
    linger_s: float = 0.0
    plan_bytes: int = 0


class BuildingEngine:
    """Registered under the name ``building`` by :class:`Installed`."""

    name = "building"

    def available(self) -> str | None:
        return installed_version(DISTRIBUTION)

    def missing(self) -> str:
        return "" if self.available() else f"the Python package {DISTRIBUTION} is not installed"

    def load_library(self) -> Any:
        return OnnxruntimeEngine().load_library()

    def build_key(self) -> str:
        return f"building {importlib.metadata.version(DISTRIBUTION)}"

    def build(
        self,
        source: Path,
        config: ModelConfig,
        memory_bytes: int,
        plan: BinaryIO,
        told: Callable[[str, int, int], None],
    ) -> None:
        try:
            line, network = source.read_bytes().split(b"\n", 1)
            does = msgspec.json.decode(line, type=Does)
        except (ValueError, msgspec.DecodeError) as exc:
            raise EngineError(f"not a model to build: {exc}") from exc
        if does.building == "empty":
            return
        _DEEDS[does.building](plan)
        end = time.monotonic() + does.linger_s
        while time.monotonic() < end:
            told("trying tactics", int((does.linger_s - (end - time.monotonic())) * 10), int(does.linger_s * 10))
            time.sleep(0.05)
        head = _HEAD + self.build_key().encode() + b"\n"
        plan.write(head + network)
        plan.write(bytes(max(0, does.plan_bytes - len(head) - len(network))))

    def load(self, path: Path, config: ModelConfig, threads: int) -> OnnxruntimeSession:
        head, _, network = path.read_bytes().partition(b"\n")
        if head != _HEAD + self.build_key().encode():
            raise EngineError(f"not a plan of this engine: {head[:80]!r}")
        options = self.load_library().SessionOptions()
        options.intra_op_num_threads = threads
        session = self.load_library().InferenceSession(network, options, providers=["CPUExecutionProvider"])
        return OnnxruntimeSession(session, config)


def _refuse(plan: BinaryIO) -> None:
    raise EngineError("an operator of this network is not supported")


def _hang(plan: BinaryIO) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def _eat(plan: BinaryIO) -> None:
    eaten = []
    while True:
        eaten.append(bytearray(b"x") * (4 << 20))
        time.sleep(0.001)


def _flood(plan: BinaryIO) -> None:
    while True:
        plan.write(bytes(1 << 16))


def _fork(plan: BinaryIO) -> None:
    try:
        os.fork()
    except OSError as exc:
        raise EngineError(f"no other process: {exc.strerror}") from exc


_DEEDS: dict[str, Callable[[BinaryIO], None]] = {
    "good": lambda plan: None, "refuse": _refuse, "hang": _hang, "eat": _eat, "flood": _flood, "fork": _fork,
    "crash": lambda plan: os.kill(os.getpid(), signal.SIGSEGV),
}  # fmt: skip


def model(seed: int, **does: Any) -> bytes:
    """The classifier of ``seed`` as this engine's model."""
    return msgspec.json.encode(Does(**does)) + b"\n" + artifacts.onnx_model(seed)


class Installed:
    """The engine's distribution in a folder; for child processes by :attr:`environment`, for this one by :meth:`import_here`."""

    def __init__(self, folder: Path, version: str = "1.0") -> None:
        self.folder = folder
        self.upgrade(version)

    def upgrade(self, version: str) -> None:
        """Another version of the package is there now."""
        info = self.folder / f"{DISTRIBUTION.replace('-', '_')}-1.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "entry_points.txt").write_text("[edgefleet.engines]\nbuilding = support.building:BuildingEngine\n")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n")

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join([str(self.folder), str(TESTS)])}

    def import_here(self, monkeypatch: Any) -> None:
        """For the rest of a test, here and in what is started from here."""
        monkeypatch.setattr(sys, "path", [str(self.folder), *sys.path])
        monkeypatch.setenv("PYTHONPATH", self.environment["PYTHONPATH"])
        importlib.invalidate_caches()
