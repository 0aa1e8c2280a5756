"""Artifacts that the controller compiles here for the shipped Raspberry Pi classes, and Debian userlands for Arm to prove them in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.manifests.files import load_manifests, of_kind
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import AcceptanceReport

from support import userland
from support.networks import classifier, decided
from support.userland import ARM64, ARMHF, Architecture, Userland

TOOLCHAINS = userland.CACHE.parent
CLASSES = of_kind(load_manifests(userland.ROOT / "manifests/classes/raspberry-pi.yaml"), DeviceClass)
_ACCEPT = (
    "import sys, msgspec; from pathlib import Path; from edgefleet_agent.accept import accept;"
    "print(msgspec.json.encode(accept(Path(sys.argv[1]), sys.argv[2])).decode())"
)
_FINGERPRINT = (
    "import msgspec; from edgefleet_agent.board import read_fingerprint;"
    "print(msgspec.json.encode(read_fingerprint()).decode())"
)


class Kind(NamedTuple):
    """A userland, and which classes' boards it is like."""

    architecture: Architecture
    lock: str
    engine: str

    def like(self, device_class: DeviceClass) -> bool:
        return (device_class.spec.arch, device_class.spec.engine) == (self.architecture.machine, self.engine)


KINDS = {
    "arm64, LiteRT": Kind(ARM64, "agent-litert", "tflite"),
    "arm64, tflite-runtime": Kind(ARM64, "agent-tflite", "tflite"),
    "arm64, onnxruntime": Kind(ARM64, "agent-onnxruntime", "onnxruntime"),
    "armhf, tflite-runtime": Kind(ARMHF, "agent-tflite", "tflite"),
}


class Board:
    """A userland with the agent installed: what a board of that kind is, but for its kernel and its speed."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        lock = userland.ROOT / "requirements" / f"{kind.lock}.txt"
        self.userland = Userland(kind.architecture, lock)

    def accept(self, layout: Layout, digest: str) -> AcceptanceReport:
        """The agent's own acceptance of an artifact, in there."""
        with self.userland.folder() as (here, inside):
            shutil.copytree(layout.root, here / "artifacts")
            return msgspec.json.decode(self._python(_ACCEPT, inside, digest), type=AcceptanceReport)

    def fingerprint(self) -> bytes:
        """What the agent says of the board that it finds itself on."""
        return self._python(_FINGERPRINT)

    def _python(self, code: str, *arguments: str) -> bytes:
        done = self.userland.run("python3", "-c", code, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.encode()


class Compiled:
    """The controller's compiler over one small network, which is sure of its answers."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.layout = Layout(folder / "layout")
        self._cache = folder / "cache"
        manifest = decided(folder, classifier(seed=seed))
        self.version: ModelVersion = import_model(manifest, folder, self.layout, cache=self._cache)
        self._made: dict[str, CompileResult] = {}

    def artifact(self, device_class: DeviceClass, **acceptance: float | None) -> CompileResult:
        """The class's artifact; a short search, for which its manifest is changed, and its acceptance where that is given."""
        spec = device_class.spec
        changed = {
            "search": spec.search.model_copy(update={"effort": "quick"}),
            "acceptance": spec.acceptance.model_copy(update=acceptance),
        }
        key = f"{device_class.name} {acceptance}"
        if key not in self._made:
            wanted = device_class.model_copy(update={"spec": spec.model_copy(update=changed)})
            self._made[key] = compile_version(
                self.version, wanted, self.layout, Toolchains(TOOLCHAINS), cache=self._cache
            )
        return self._made[key]
