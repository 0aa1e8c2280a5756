"""What a simulated board can be sent: real artifacts and real signatures, made once; kept in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
from edgefleet_controller.sign import DirectorSigner, ReleaseSigner, Repository, make_key
from edgefleet_shared import artifact
from edgefleet_shared.artifact import CHUNK_BYTES, SCHEMA, AgentConfig, Descriptor, Layout
from edgefleet_shared.assignment import AGENT, Assignment
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.fingerprint import Requirement
from support import artifacts
from support.disk import MemoryDisk

DEVICE, CLASS = "b1", "test-class"
CHUNK = 4096
BUILT = ("5", "6", "7")
LAYOUT = Path("/depot")


class Depot:
    """Versions 1 to 7 of one model, released one after the other; assignments signed on demand. From 5 on they are for an engine that
    builds (:attr:`built`).

    ``publications`` has the metadata as it was published with each version. Versions a1 to a3 of the agent come after them all; how
    they behave is the story's matter, their code is any bytes.

    Args:
        model_bytes: the size of each compiled model; chunks have 4 KiB.
    """

    def __init__(self, model_bytes: int = 6000) -> None:
        self.clock = ManualClock()
        self.disk = MemoryDisk()
        self.layout = Layout(LAYOUT, files=self.disk)
        self._model_bytes = model_bytes
        self._versions = 0
        with tempfile.TemporaryDirectory() as folder:
            online = Path(folder, "online")
            keys = [make_key(online / f"{n}.pem") for n in ("snapshot", "timestamp", "director")]
            signer = ReleaseSigner(Path(folder, "offline"), self.clock)
            repository = Repository(Path(folder, "repository"), keys[0], keys[1], self.clock)
            self._director = DirectorSigner(keys[2], self.clock)
            first = signer.begin(*keys, signers=1, threshold=1)
            self.root = first["1.root.json"]
            repository.publish(first)
            repository.publish(signer.add_class(_need(repository, "targets.json"), CLASS))
            self.releases: dict[str, Descriptor] = {}
            self.publications: dict[str, dict[str, bytes]] = {}
            self.built: set[str] = set()
            for version in ("1", "2", "3", "4", *BUILT):
                made = self._make(version)
                self.releases[version] = made
                self.built |= {made.digest} if version in BUILT else set()
                role = _need(repository, f"class-{CLASS}.json")
                requires = self.layout.config(self.layout.manifest(made.digest)).requires
                repository.publish(
                    signer.release(
                        role, device_class=CLASS, model="toy", version=version, manifest=made, requires=requires
                    )
                )
                self.publications[version] = repository.files()
            self.agents: dict[str, Descriptor] = {}
            requires = Requirement(provides={"launcher": ">=1"})
            for version in ("a1", "a2", "a3"):
                config = AgentConfig(
                    schema=SCHEMA, version=version, device_class=CLASS, requires=requires, chunk_bytes=CHUNK
                )
                made = artifact.build_agent(self.layout, config, f"code of {version} ".encode() * 500)
                self.agents[version] = made
                role = _need(repository, f"class-{CLASS}.json")
                repository.publish(
                    signer.release(
                        role, device_class=CLASS, model=AGENT, version=version, manifest=made, requires=requires
                    )
                )
            self.publications["agents"] = repository.files()

    def _make(self, version: str) -> Descriptor:
        def content(text: str, size: int) -> bytes:
            return (text.encode() * (size // len(text) + 1))[:size]

        return artifact.build(
            self.layout,
            artifacts.make_config(
                version=version,
                device_class=CLASS,
                chunk_bytes=CHUNK,
                engine="building" if version in BUILT else "onnxruntime",
            ),
            [
                (artifact.MODEL_LAYER, content(f"model {version} ", self._model_bytes)),
                (artifact.LABELS_LAYER, b'["labels that all versions share"]'),
                (artifact.GOLDEN_LAYER, content(f"golden {version} ", 300)),
            ],
        )

    def manifest(self, version: str) -> str:
        return self.releases[version].digest

    def chunk(self, digest: str, number: int, chunk_bytes: int) -> bytes:
        content = self.layout.read(digest, 1 << 30)
        return content[number * chunk_bytes : (number + 1) * chunk_bytes]

    def chunk_bytes_of(self, digest: str) -> int:
        """Layers travel in the chunks that the config names, manifests and configs in those of the protocol."""
        all_made = [*self.releases.values(), *self.agents.values()]
        layers = {blob.digest for made in all_made for blob in self.layout.manifest(made.digest).layers}
        return CHUNK if digest in layers else CHUNK_BYTES

    def assign(self, version: str, **changes: object) -> bytes:
        """The next assignment of the board, signed."""
        self._versions += 1
        made = self.agents.get(version) or self.releases[version]
        model = AGENT if version in self.agents else "toy"
        assignment = Assignment(
            id=f"a{self._versions}", device=DEVICE, device_class=CLASS, rollout="r", model=model, version=version,
            manifest=made.digest, size=made.size, issued_at=int(self.clock.now()), soak_s=0,
        )  # fmt: skip
        return self._director.sign(msgspec.structs.replace(assignment, **changes), self._versions)


def _need(repository: Repository, name: str) -> bytes:
    content = repository.read(name)
    assert content is not None
    return content
