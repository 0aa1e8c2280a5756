"""Stages 3-6: the artifact, an OCI image layout. Read, write, check by digest.

One artifact is one OCI manifest (``artifactType`` :data:`ARTIFACT_TYPE`) whose config is a :class:`ModelConfig` and whose
layers are the compiled model, labels, golden pictures with their float reference, quality report, provenance and ML-BOM.
The controller's blob store, a board's disk, a relay's cache and a USB bundle are all this same layout, so any OCI tool
can hold or copy it. Source: OCI image-spec v1.1, ``image-layout.md`` and ``manifest.md``.

Not handled here: who signed what (:mod:`edgefleet_shared.trust`), how bytes travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from edgefleet_shared import atomic
from edgefleet_shared.assignment import AGENT
from edgefleet_shared.contract import AcceptanceContract, PictureEncoding, TensorSpec
from edgefleet_shared.drift import Statistics
from edgefleet_shared.errors import ArtifactError, NotFoundError
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.fingerprint import Requirement
from edgefleet_shared.malformed import MALFORMED

ARTIFACT_TYPE = "application/vnd.edgefleet.model.v1+json"
AGENT_TYPE = "application/vnd.edgefleet.agent.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.edgefleet.model.config.v1+json"
AGENT_CONFIG_TYPE = "application/vnd.edgefleet.agent.config.v1+json"

# Layer media types. The compiled model's own format is named by ModelConfig.engine.
MODEL_LAYER = "application/vnd.edgefleet.model.compiled.v1"
LABELS_LAYER = "application/vnd.edgefleet.labels.v1+json"
GOLDEN_LAYER = "application/vnd.edgefleet.golden.v1+safetensors"
QUALITY_LAYER = "application/vnd.edgefleet.quality.v1+json"
PROVENANCE_LAYER = "application/vnd.in-toto+json"
MLBOM_LAYER = "application/vnd.cyclonedx+json"
CODE_LAYER = "application/vnd.edgefleet.agent.code.v1+zip"  # of an agent: pure Python, imported from the zip

# What there must be one of, by the artifact's type.
_LAYERS = {ARTIFACT_TYPE: (MODEL_LAYER, GOLDEN_LAYER), AGENT_TYPE: (CODE_LAYER,)}

SCHEMA = 1
CHUNK_BYTES = 256 * 1024  # what one MQTT message carries; boards hold one in memory
MAX_MANIFEST_BYTES = 64 * 1024
MAX_CONFIG_BYTES = 4 * 1024 * 1024  # chunk hashes of a 10 GB model fit


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A reference to a blob: media type, ``sha256:<hex>``, size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, rename="camel", kw_only=True, omit_defaults=True):
    """An OCI image manifest as edgefleet writes it."""

    schema_version: int
    media_type: str
    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}

    def layer(self, media_type: str) -> Descriptor:
        """The one layer of ``media_type``.

        Raises:
            ArtifactError: there is none, or more than one.
        """
        found = [entry for entry in self.layers if entry.media_type == media_type]
        if len(found) != 1:
            raise ArtifactError(f"the artifact has {len(found)} layers of type {media_type}, expected 1")
        return found[0]

    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers: every blob but the manifest itself."""
        return (self.config, *self.layers)


class PowerProfile(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a board's processor may run, and how deep it may sleep, while it serves. Empty, 0 and None: as the board is."""

    governor: str = ""
    max_clock_mhz: int = 0
    max_wake_us: int | None = None  # that a processor may take to wake up; 0: none sleeps


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The config blob: what the artifact is, what it needs, how it is accepted, what is normal for it, and the hash of every chunk of
    every layer.

    ``chunks`` maps a layer's digest to the sha256 (hex) of its consecutive pieces of ``chunk_bytes``; the last may be
    shorter. A board checks each chunk as it comes, so one flipped byte costs one chunk.
    """

    schema: int
    model: str
    version: str
    device_class: str
    engine: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    requires: Requirement
    contract: AcceptanceContract
    encoding: PictureEncoding | None = None
    swap: str = "auto"
    power: PowerProfile = PowerProfile()
    statistics: Statistics | None = None
    chunk_bytes: int = CHUNK_BYTES
    chunks: dict[str, tuple[str, ...]] = {}


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The config blob of an agent: which version, for which class, and what it needs of the board's package. ``chunks`` as above."""

    schema: int
    version: str
    device_class: str
    requires: Requirement
    chunk_bytes: int = CHUNK_BYTES
    chunks: dict[str, tuple[str, ...]] = {}


def digest_of(content: bytes | memoryview) -> str:
    """``sha256:<hex>`` of ``content``."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def digest_file(path: Path, *, files: FileSystem = DISK, alive: Callable[[], None] = lambda: None) -> str:
    """``sha256:<hex>`` of a file, read piece by piece, with a word to ``alive`` after each. Raises like
    :func:`edgefleet_shared.atomic.read`."""
    state = hashlib.sha256()
    for piece in atomic.pieces(path, files=files):
        state.update(piece)
        alive()
    return "sha256:" + state.hexdigest()


def hex_of(digest: str) -> str:
    """The hex part of ``sha256:<hex>``, checked: digests come from outside and become file names and topics.

    Raises:
        ArtifactError: not a sha256 digest.
    """
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or not _is_hex(value):
        raise ArtifactError(f"not a sha256 digest: {digest[:80]!r}")
    return value


def _is_hex(value: str) -> bool:
    return len(value) == 64 and set(value) <= set("0123456789abcdef")


def chunk_count(size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many chunks a blob of ``size`` bytes has; an empty blob has none."""
    return -(-size // chunk_bytes)


class Layout:
    """A folder that is an OCI image layout.

    Args:
        root: the folder; made when missing.
        read_only: leave the folder as it is; for confined readers.
        files: the disk.
    """

    def __init__(self, root: Path, *, read_only: bool = False, files: FileSystem = DISK) -> None:
        self.root, self.files = root, files
        self._blobs = root / "blobs" / "sha256"
        if read_only:
            return
        atomic.make_folder(self._blobs, files=files)
        marker = root / "oci-layout"
        if self._size_bytes(marker) is None:
            atomic.write_shared(marker, b'{"imageLayoutVersion":"1.0.0"}', files=files)

    def path(self, digest: str) -> Path:
        """Where a blob lies or would lie."""
        return self._blobs / hex_of(digest)

    def has(self, digest: str) -> bool:
        return self._size_bytes(self.path(digest)) is not None

    def _size_bytes(self, path: Path) -> int | None:
        with atomic.disk_errors(path, "read"):
            return self.files.size_bytes(path)

    def put(self, content: bytes) -> Descriptor:
        """Store a blob; what is there already is left alone. The descriptor's media type is left empty."""
        digest = digest_of(content)
        if not self.has(digest):
            atomic.write_shared(self.path(digest), content, files=self.files)
        return Descriptor("", digest, len(content))

    def put_file(self, source: Path) -> Descriptor:
        """Store a copy of a file as a blob, without holding it in memory."""
        state, size = hashlib.sha256(), 0
        with atomic.incoming(self._blobs, files=self.files) as temporary:
            atomic.write_piece(temporary, b"", 0, files=self.files)
            for piece in atomic.pieces(source):
                state.update(piece)
                atomic.write_piece(temporary, piece, size, files=self.files)
                size += len(piece)
            digest = "sha256:" + state.hexdigest()
            atomic.adopt(temporary, self.path(digest), files=self.files)
        return Descriptor("", digest, size)

    def read(self, digest: str, limit_bytes: int) -> bytes:
        """A blob's bytes, checked against its digest.

        Raises:
            NotFoundError: no such blob.
            ArtifactError: larger than ``limit_bytes``, or not what its digest says.
        """
        path = self.path(digest)
        size = self._size_bytes(path)
        if size is None:
            raise NotFoundError(f"no blob {digest} in {self.root}")
        if size > limit_bytes:
            raise ArtifactError(f"blob {digest} has {size} bytes, more than the {limit_bytes} allowed here")
        content = atomic.read(path, files=self.files)
        if digest_of(content) != digest:
            raise ArtifactError(f"blob {digest} was changed on disk: its bytes hash to {digest_of(content)}")
        return content

    def check(self, descriptor: Descriptor, *, alive: Callable[[], None] = lambda: None) -> None:
        """Check a blob on disk against size and digest, without holding it in memory; see :func:`digest_file`.

        Raises:
            NotFoundError: no such blob.
            ArtifactError: other size or other bytes.
        """
        path = self.path(descriptor.digest)
        size = self._size_bytes(path)
        if size is None:
            raise NotFoundError(f"no blob {descriptor.digest} in {self.root}")
        if size != descriptor.size:
            raise ArtifactError(f"blob {descriptor.digest} has {size} bytes on disk, {descriptor.size} were signed")
        self._check_bytes(path, descriptor.digest, alive)

    def checked_path(self, digest: str) -> Path:
        """Where a blob lies, for who reads it without holding it in memory; its bytes are the digest's.

        Raises:
            NotFoundError, ArtifactError: as :meth:`check`.
        """
        path = self.path(digest)
        if self._size_bytes(path) is None:
            raise NotFoundError(f"no blob {digest} in {self.root}")
        self._check_bytes(path, digest, lambda: None)
        return path

    def _check_bytes(self, path: Path, digest: str, alive: Callable[[], None]) -> None:
        actual = digest_file(path, files=self.files, alive=alive)
        if actual != digest:
            raise ArtifactError(f"blob {digest} was changed on disk: its bytes hash to {actual}")

    def manifest(self, digest: str) -> Manifest:
        """The manifest of that digest: bytes checked, then parsed, then its shape checked.

        Raises:
            NotFoundError, ArtifactError
        """
        return parse_manifest(self.read(digest, MAX_MANIFEST_BYTES))

    def config(self, manifest: Manifest) -> ModelConfig:
        """The config of a manifest: bytes checked, then parsed, then its contract checked."""
        return parse_config(self.read(manifest.config.digest, MAX_CONFIG_BYTES))

    def agent_config(self, manifest: Manifest) -> AgentConfig:
        """The config of an agent's manifest: bytes checked, then parsed."""
        return parse_agent_config(self.read(manifest.config.digest, MAX_CONFIG_BYTES))

    def digests(self) -> Iterator[str]:
        """Every blob that is here. What else lies among them is nobody's business: a disk's ``lost+found``, a note of an operator's, a folder
        whatever its name."""
        for name in self._names():
            if _is_hex(name) and not self._is_folder(self._blobs / name):
                yield f"sha256:{name}"

    def unfinished(self) -> Iterator[Path]:
        """Files that are no blob: what an interrupted fetch or copy left behind, and what it knew about that."""
        for path in (self._blobs / name for name in self._names() if name.startswith(".")):
            if not self._is_folder(path):
                yield path

    def _is_folder(self, path: Path) -> bool:
        with atomic.disk_errors(path, "read"):
            return self.files.is_folder(path)

    def _names(self) -> list[str]:
        with atomic.disk_errors(self._blobs, "read"):
            return self.files.names(self._blobs)

    def sync(self) -> None:
        """The names of all blobs survive a power cut from now on, also those that another process gave.

        That process may have been stopped between making the layout's folders and syncing them, so these too.
        """
        for folder in (self._blobs, self._blobs.parent, self.root, self.root.parent):
            with atomic.disk_errors(folder):
                atomic.sync_folder(folder, files=self.files)

    def remove(self, digest: str) -> None:
        """Remove a blob if it is there. A power cut may bring it back."""
        path = self.path(digest)
        with atomic.disk_errors(path, "remove"), suppress(FileNotFoundError):
            self.files.unlink(path)

    def write_index(self, manifests: Iterable[Descriptor]) -> None:
        """Write ``index.json``, so that any OCI tool finds the artifacts."""
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": list(manifests)}
        atomic.write_shared(self.root / "index.json", msgspec.json.encode(index), files=self.files)


def parse_manifest(content: bytes) -> Manifest:
    """Parse a manifest whose bytes are already checked.

    Raises:
        ArtifactError: not an edgefleet artifact's manifest.
    """
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except MALFORMED as exc:
        raise ArtifactError(f"not an OCI manifest: {exc}") from exc
    if manifest.artifact_type not in _LAYERS or manifest.schema_version != 2:
        raise ArtifactError(f"artifact type {manifest.artifact_type!r} is not one of {', '.join(_LAYERS)}")
    for descriptor in manifest.blobs():
        hex_of(descriptor.digest)
        if descriptor.size < 0:
            raise ArtifactError(f"blob {descriptor.digest} has a negative size")
    for layer in _LAYERS[manifest.artifact_type]:
        manifest.layer(layer)
    return manifest


def chunk_plan(manifest: Manifest, config: bytes) -> tuple[dict[str, tuple[str, ...]], int]:
    """The hashes of every layer's chunks, and how long a chunk is, out of a config whose bytes are already checked.

    Raises:
        ArtifactError: it is no config of such an artifact.
    """
    parsed = parse_agent_config(config) if manifest.artifact_type == AGENT_TYPE else parse_config(config)
    return parsed.chunks, parsed.chunk_bytes


def parse_config(content: bytes) -> ModelConfig:
    """Parse a config whose bytes are already checked, and check that its contract can fail.

    Raises:
        ArtifactError
    """
    try:
        config = msgspec.json.decode(content, type=ModelConfig)
    except MALFORMED as exc:
        raise ArtifactError(f"not a model config: {exc}") from exc
    _check_chunked(config)
    if not config.inputs or not config.outputs:
        raise ArtifactError("the model config names no input or no output")
    config.contract.check()
    return config


def parse_agent_config(content: bytes) -> AgentConfig:
    """Parse an agent's config whose bytes are already checked.

    Raises:
        ArtifactError
    """
    try:
        config = msgspec.json.decode(content, type=AgentConfig)
    except MALFORMED as exc:
        raise ArtifactError(f"not an agent's config: {exc}") from exc
    _check_chunked(config)
    return config


def _check_chunked(config: ModelConfig | AgentConfig) -> None:
    if config.schema != SCHEMA:
        raise ArtifactError(f"artifact format {config.schema} is not known here, this program knows {SCHEMA}")
    if not 4096 <= config.chunk_bytes <= 4 * 1024 * 1024:
        raise ArtifactError(f"chunks of {config.chunk_bytes} bytes are outside 4 KiB to 4 MiB")


def build(layout: Layout, config: ModelConfig, layers: Iterable[tuple[str, bytes | Path]]) -> Descriptor:
    """Write an artifact: each layer's blob, the config with its chunk hashes, the manifest.

    Args:
        config: everything but ``chunks``, which is filled in here.
        layers: (media type, content or file) in the order they will have; order and content decide the digest.

    Returns:
        the manifest's descriptor: its digest *is* the artifact's.

    Raises:
        ArtifactError: the contract is empty, or a layer is missing or double.
    """
    descriptors, chunks = _put_layers(layout, layers, config.chunk_bytes)
    encoded = msgspec.json.encode(msgspec.structs.replace(config, chunks=chunks))
    parse_config(encoded)
    return _put_manifest(layout, ARTIFACT_TYPE, CONFIG_TYPE, encoded, descriptors, config.model, config)


def build_agent(layout: Layout, config: AgentConfig, code: bytes) -> Descriptor:
    """Write an agent's artifact: its code as one zip, the config with its chunk hashes, the manifest. As :func:`build`."""
    descriptors, chunks = _put_layers(layout, [(CODE_LAYER, code)], config.chunk_bytes)
    encoded = msgspec.json.encode(msgspec.structs.replace(config, chunks=chunks))
    parse_agent_config(encoded)
    return _put_manifest(layout, AGENT_TYPE, AGENT_CONFIG_TYPE, encoded, descriptors, AGENT, config)


def _put_layers(
    layout: Layout, layers: Iterable[tuple[str, bytes | Path]], chunk_bytes: int
) -> tuple[list[Descriptor], dict[str, tuple[str, ...]]]:
    descriptors, chunks = [], {}
    for media_type, content in layers:
        stored = layout.put(content) if isinstance(content, bytes) else layout.put_file(content)
        descriptors.append(Descriptor(media_type, stored.digest, stored.size))
        pieces = atomic.pieces(layout.path(stored.digest), files=layout.files, size_bytes=chunk_bytes)
        chunks[stored.digest] = tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    return descriptors, chunks


def _put_manifest(
    layout: Layout, kind: str, config_type: str, encoded: bytes, layers: list[Descriptor], model: str,
    config: ModelConfig | AgentConfig,
) -> Descriptor:  # fmt: skip
    stored = layout.put(encoded)
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=kind,
        config=Descriptor(config_type, stored.digest, stored.size),
        layers=tuple(layers),
        annotations={
            "vnd.edgefleet.model": model,
            "vnd.edgefleet.version": config.version,
            "vnd.edgefleet.device-class": config.device_class,
        },
    )
    content = msgspec.json.encode(manifest)
    parse_manifest(content)
    stored = layout.put(content)
    return Descriptor(MANIFEST_TYPE, stored.digest, stored.size)
