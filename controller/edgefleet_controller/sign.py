"""Stage 3, sign: the image repository and the director. Receives an artifact's digest, hands on signed metadata.

Two sides that need not share a machine:

* :class:`ReleaseSigner` - the operator's side, with the offline keys: root, targets, one release key per device class.
* :class:`Repository` and :class:`DirectorSigner` - the controller's side, with the online keys: snapshot, timestamp, director.

So a stolen controller can at worst choose between releases that the release signers already signed for a class. The metadata
is TUF 1.0 with fixed file names (ADR 0002); the director is a role that the targets keys delegate (ADR 0003).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Descriptor, hex_of
from edgefleet_shared.assignment import DIRECTOR, Assignment, class_role, target_path
from edgefleet_shared.clock import Clock, utc
from edgefleet_shared.errors import ConflictError, EnvironmentProblem, NotFoundError, TrustError
from edgefleet_shared.fingerprint import Requirement
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from edgefleet_controller import versions

# Offline roles change rarely and by hand; online ones are renewed at half their life by the running controller.
OFFLINE_LIFE = timedelta(days=365)
RELEASE_LIFE = timedelta(days=180)
ONLINE_LIFE = timedelta(days=14)
ASSIGNMENT_LIFE = timedelta(days=90)

_COMPACT = JSONSerializer(compact=True)


def make_key(path: Path) -> CryptoSigner:
    """Make an ed25519 key as PKCS8 PEM, mode 0600.

    Raises:
        ConflictError: a key lies there already; keys are never overwritten.
    """
    if path.exists():
        raise ConflictError(f"there is a key at {path} already", hint="keys are never overwritten")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    atomic.make_folder(path.parent, 0o700)
    atomic.write(path, pem, 0o600)
    return CryptoSigner(key)


def read_key(path: Path) -> CryptoSigner:
    """The key at ``path``.

    Raises:
        NotFoundError: no key there. EnvironmentProblem: not an ed25519 PKCS8 key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError as exc:
        raise NotFoundError(f"no signing key at {path}", hint="name the folder of the keys with --keys") from exc
    except (ValueError, TypeError) as exc:
        raise EnvironmentProblem(f"{path} is not a usable private key: {exc}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise EnvironmentProblem(f"{path} is not an ed25519 key")
    return CryptoSigner(key)


def _signed(metadata: Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp],
            signers: Iterable[CryptoSigner]) -> bytes:  # fmt: skip
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(_COMPACT)


class ReleaseSigner:
    """The operator's side. Signs what may run on a device class; needs no connection.

    Args:
        keys: folder with ``root-N.pem``, ``targets-N.pem`` and ``class-<name>.pem``.
        clock: for expiry dates.
    """

    def __init__(self, keys: Path, clock: Clock) -> None:
        self.keys = keys
        self._clock = clock

    def _several(self, role: str) -> list[CryptoSigner]:
        paths = sorted(self.keys.glob(f"{role}-[0-9]*.pem"))
        if not paths:
            raise NotFoundError(f"no {role} key in {self.keys}", hint="name the folder of the keys with --keys")
        return [read_key(path) for path in paths]

    def begin(
        self, snapshot: CryptoSigner, timestamp: CryptoSigner, director: CryptoSigner, *, signers: int, threshold: int
    ) -> dict[str, bytes]:
        """Make the offline keys and the first root and targets metadata.

        Args:
            snapshot, timestamp, director: the online keys, of which only the public halves are used.
            signers: how many root and how many targets keys to make.
            threshold: how many of them must sign.

        Returns:
            file name -> signed bytes.
        """
        if not 1 <= threshold <= signers:
            raise ConflictError(f"a threshold of {threshold} can't be met by {signers} keys")
        root_keys = [make_key(self.keys / f"root-{n}.pem") for n in range(1, signers + 1)]
        targets_keys = [make_key(self.keys / f"targets-{n}.pem") for n in range(1, signers + 1)]
        expires = utc(self._clock.now()) + OFFLINE_LIFE
        root = Root(version=1, expires=expires, consistent_snapshot=False)
        for role, holders in (
            ("root", root_keys),
            ("targets", targets_keys),
            ("snapshot", [snapshot]),
            ("timestamp", [timestamp]),
        ):
            for holder in holders:
                root.add_key(holder.public_key, role)
        root.roles["root"].threshold = root.roles["targets"].threshold = threshold
        targets = Targets(version=1, expires=expires)
        key = director.public_key
        targets.delegations = Delegations(
            keys={key.keyid: key},
            roles={
                DIRECTOR: DelegatedRole(DIRECTOR, [key.keyid], threshold=1, terminating=True, paths=["assignments/*"])
            },
        )
        return {
            "1.root.json": _signed(Metadata(root), root_keys),
            "targets.json": _signed(Metadata(targets), targets_keys),
        }

    def add_class(self, targets: bytes, device_class: str) -> dict[str, bytes]:
        """Delegate a new role for a device class and sign its first, empty metadata. Makes the class's release key if there
        is none yet.

        Returns:
            file name -> signed bytes; empty when the class is delegated already.
        """
        metadata: Metadata[Targets] = Metadata.from_bytes(targets)
        delegations = metadata.signed.delegations
        role = class_role(device_class)
        if delegations is None or delegations.roles is None:
            raise TrustError("targets", "the targets metadata delegates no director")
        if role in delegations.roles:
            return {}
        path = self.keys / f"{role}.pem"
        signer = read_key(path) if path.exists() else make_key(path)
        key = signer.public_key
        delegations.keys[key.keyid] = key
        delegations.roles[role] = DelegatedRole(
            role, [key.keyid], threshold=1, terminating=True, paths=[f"{device_class}/*/*"]
        )
        now = utc(self._clock.now())
        metadata.signed.version += 1
        metadata.signed.expires = now + OFFLINE_LIFE
        first = Metadata(Targets(version=1, expires=now + RELEASE_LIFE))
        return {"targets.json": _signed(metadata, self._several("targets")), f"{role}.json": _signed(first, [signer])}

    def release(
        self,
        current: bytes,
        *,
        device_class: str,
        model: str,
        version: str,
        manifest: Descriptor,
        requires: Requirement,
    ) -> dict[str, bytes]:
        """Sign an artifact for its class.

        Args:
            current: the class role's metadata as it is published.
            manifest: the artifact's manifest, checked by the caller to be what is meant.

        Returns:
            file name -> signed bytes.
        """
        metadata: Metadata[Targets] = Metadata.from_bytes(current)
        path = target_path(device_class, model, version)
        metadata.signed.targets[path] = TargetFile(
            manifest.size,
            {"sha256": hex_of(manifest.digest)},
            path,
            {"custom": {"requires": msgspec.to_builtins(requires)}},
        )
        metadata.signed.version += 1
        metadata.signed.expires = utc(self._clock.now()) + RELEASE_LIFE
        role = class_role(device_class)
        return {f"{role}.json": _signed(metadata, [read_key(self.keys / f"{role}.pem")])}

    def renew(self, root: bytes, files: dict[str, bytes]) -> dict[str, bytes]:
        """Sign anew, with the same keys, what has less than half of its life left: root, targets, the classes' roles. Boards take nothing new
        once one of them has ended.

        Args:
            root: the newest one.
            files: ``targets.json`` and every ``class-<name>.json`` as they are published, by name; others are passed over.

        Returns:
            file name -> signed bytes; empty when nothing is due.

        Raises:
            NotFoundError: keys of what is due are not here; nothing was signed.
        """
        current: Metadata[Root] = Metadata.from_bytes(root)
        due = {f"{current.signed.version + 1}.root.json": (root, OFFLINE_LIFE, "root")}
        for name, content in files.items():
            if name == "targets.json":
                due[name] = (content, OFFLINE_LIFE, "targets")
            elif name.startswith(class_role("")):
                due[name] = (content, RELEASE_LIFE, name.removesuffix(".json"))
        renewed = {}
        for name, (content, life, role) in due.items():
            metadata: Metadata[Root] | Metadata[Targets] = Metadata.from_bytes(content)
            if metadata.signed.expires - utc(self._clock.now()) >= life / 2:
                continue
            metadata.signed.version += 1
            metadata.signed.expires = utc(self._clock.now()) + life
            offline = role in ("root", "targets")
            renewed[name] = _signed(metadata, self._several(role) if offline else [read_key(self.keys / f"{role}.pem")])
        return renewed


class Repository:
    """The controller's side of the image repository: a folder of signed metadata, kept fresh with the online keys.

    Args:
        folder: holds ``N.root.json``, ``targets.json``, ``class-*.json``, ``snapshot.json``, ``timestamp.json``.
        snapshot, timestamp: the online keys.

    Not handled here: sending the files to anybody (:mod:`edgefleet_controller.transport`).
    """

    def __init__(self, folder: Path, snapshot: CryptoSigner, timestamp: CryptoSigner, clock: Clock) -> None:
        self.folder = folder
        self._snapshot = snapshot
        self._timestamp = timestamp
        self._clock = clock
        self._lock = threading.Lock()
        atomic.make_folder(folder)

    def read(self, name: str) -> bytes | None:
        """A metadata file's bytes, or None."""
        path = self.folder / Path(name).name
        return path.read_bytes() if path.is_file() else None

    def files(self) -> dict[str, bytes]:
        """All metadata in publication order: a reader never sees a file before what it refers to."""
        names = sorted(p.name for p in self.folder.glob("*.json") if not p.name.startswith("."))
        last = ("targets.json", "snapshot.json", "timestamp.json")
        ordered = [n for n in names if n not in last] + [n for n in last if n in names]
        return {name: (self.folder / name).read_bytes() for name in ordered}

    @property
    def root(self) -> bytes:
        """The newest root."""
        newest = max(self.folder.glob("*.root.json"), key=lambda p: int(p.name.split(".")[0]), default=None)
        if newest is None:
            raise NotFoundError(f"no root metadata in {self.folder}", hint="run fleet init first")
        return newest.read_bytes()

    def publish(self, new: dict[str, bytes]) -> dict[str, bytes]:
        """Take signed root, targets or class metadata, check all of it, then renew snapshot and timestamp.

        Returns:
            every file that changed, in publication order.

        Raises:
            TrustError: a signature or version is wrong; nothing was changed.
        """
        with self._lock:
            self._check(new)
            for name, content in new.items():
                atomic.write(self.folder / name, content)
            changed = set(new) | self._renew(force_snapshot=True)
            return {name: content for name, content in self.files().items() if name in changed}

    def renew(self, *, at_start: bool = False) -> dict[str, bytes]:
        """Renew snapshot and timestamp when half of their life is over; returns what changed.

        Args:
            at_start: renew them anyway: the files may be a backup's, and boards took newer ones since.
        """
        with self._lock:
            changed = self._renew(force_snapshot=at_start)
            return {name: content for name, content in self.files().items() if name in changed}

    def _check(self, new: dict[str, bytes]) -> None:
        try:
            root = self._root_after(new)
            before = self.read("targets.json")
            content = new.get("targets.json") or before
            if content is None:
                raise TrustError("targets", "there is no targets metadata yet")
            targets: Metadata[Targets] = Metadata.from_bytes(content)
            root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
            self._check_version("targets", before, new.get("targets.json"))
            delegations = targets.signed.delegations
            known = (delegations.roles or {}) if delegations else {}
            for name, content in new.items():
                role = name.removesuffix(".json")
                if name == "targets.json" or name.endswith(".root.json"):
                    continue
                if role not in known or role == DIRECTOR:
                    raise TrustError("class_role", f"{name} belongs to no delegated device class")
                metadata: Metadata[Targets] = Metadata.from_bytes(content)
                targets.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
                self._check_version(role, self.read(name), content)
        except (RepositoryError, DeserializationError, ValueError) as exc:
            raise TrustError("signature", f"metadata was not taken: {exc}") from exc

    def _root_after(self, new: dict[str, bytes]) -> Metadata[Root]:
        """The root that is in force once ``new`` is taken: the first one of all, the one after that of now, or that of now."""
        named = [name for name in new if name.endswith(".root.json")]
        present: Metadata[Root] | None = (
            Metadata.from_bytes(self.root) if any(self.folder.glob("*.root.json")) else None
        )
        if present is not None and not named:
            return present
        version = present.signed.version + 1 if present is not None else 1
        if named != [f"{version}.root.json"]:
            raise TrustError("root_chain", f"the next root is {version}.root.json, not {', '.join(named) or 'none'}")
        root: Metadata[Root] = Metadata.from_bytes(new[named[0]])
        if not isinstance(root.signed, Root) or root.signed.version != version:
            raise TrustError("root_chain", f"{named[0]} is no root of version {version}")
        for holder in (present, root):
            if holder is not None:
                holder.signed.verify_delegate("root", root.signed_bytes, root.signatures)
        for role, signer in (("snapshot", self._snapshot), ("timestamp", self._timestamp)):
            if signer.public_key.keyid not in root.signed.roles[role].keyids:
                raise TrustError("root_chain", f"{named[0]} does not name the {role} key that this controller has")
        return root

    def _check_version(self, role: str, before: bytes | None, after: bytes | None) -> None:
        if before is None or after is None:
            return
        old, new = Metadata.from_bytes(before).signed.version, Metadata.from_bytes(after).signed.version
        if new != old + 1:
            raise TrustError(
                "floor", f"{role} must go from version {old} to {old + 1}, not to {new}",
                hint="someone else signed meanwhile; fetch the current metadata and sign again",
            )  # fmt: skip

    def _renew(self, *, force_snapshot: bool) -> set[str]:
        now = utc(self._clock.now())
        changed = set()
        before = self.read("snapshot.json")
        snapshot: Metadata[Snapshot] = Metadata.from_bytes(before) if before else Metadata(Snapshot(version=1))
        if force_snapshot or snapshot.signed.expires - now < ONLINE_LIFE / 2:
            meta = {}
            for path in sorted(self.folder.glob("*.json")):
                if path.name in ("snapshot.json", "timestamp.json") or ".root." in path.name or path.name[0] == ".":
                    continue
                meta[path.name] = MetaFile(Metadata.from_bytes(path.read_bytes()).signed.version)
            snapshot.signed.meta = meta
            snapshot.signed.version = versions.after(snapshot.signed.version, self._clock.now())
            snapshot.signed.expires = now + ONLINE_LIFE
            atomic.write(self.folder / "snapshot.json", _signed(snapshot, [self._snapshot]))
            changed.add("snapshot.json")
        before = self.read("timestamp.json")
        timestamp: Metadata[Timestamp] = Metadata.from_bytes(before) if before else Metadata(Timestamp(version=1))
        if changed or timestamp.signed.expires - now < ONLINE_LIFE / 2:
            timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
            timestamp.signed.version = versions.after(timestamp.signed.version, self._clock.now())
            timestamp.signed.expires = now + ONLINE_LIFE
            atomic.write(self.folder / "timestamp.json", _signed(timestamp, [self._timestamp]))
            changed.add("timestamp.json")
        return changed

    def released(self, device_class: str, model: str, version: str) -> str | None:
        """The manifest digest that the release signers signed for that path, or None."""
        content = self.read(f"{class_role(device_class)}.json")
        if content is None:
            return None
        metadata: Metadata[Targets] = Metadata.from_bytes(content)
        target = metadata.signed.targets.get(target_path(device_class, model, version))
        return f"sha256:{target.hashes['sha256']}" if target else None


class DirectorSigner:
    """Signs one assignment per device with the online director key.

    Args:
        key: the director key.
    """

    def __init__(self, key: CryptoSigner, clock: Clock) -> None:
        self._key = key
        self._clock = clock

    def sign(self, assignment: Assignment, version: int) -> bytes:
        """The bytes that travel as ``desired``: TUF Targets metadata with exactly one target.

        Args:
            version: above every version that this device was ever sent; the caller persists it first.
        """
        path = target_path(assignment.device_class, assignment.model, assignment.version)
        target = TargetFile(
            assignment.size,
            {"sha256": hex_of(assignment.manifest)},
            path,
            {"custom": {"assignment": msgspec.to_builtins(assignment)}},
        )
        expires = utc(self._clock.now()) + ASSIGNMENT_LIFE
        return _signed(Metadata(Targets(version=version, expires=expires, targets={path: target})), [self._key])

    def renew(self, payload: bytes, version: int) -> bytes:
        """The same assignment, signed anew before it expires: a board that is away for longer still finds one that it can take.

        Args:
            payload: what :meth:`sign` made.
            version: above every version that this device was ever sent; the caller persists it first.
        """
        before: Metadata[Targets] = Metadata.from_bytes(payload)
        expires = utc(self._clock.now()) + ASSIGNMENT_LIFE
        return _signed(Metadata(Targets(version=version, expires=expires, targets=before.signed.targets)), [self._key])
