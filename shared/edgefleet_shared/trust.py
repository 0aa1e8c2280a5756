"""Stage 6, verify: the numbered checks on metadata and assignment. Receives bytes, hands on an admission or raises.

Two signed sources must agree (Uptane): the image repository (a TUF repository; targets keys offline, one delegated role per
device class) says what may run on a class, the director says what one board should run. Checks, in order, each failing
closed; a test named after its attack stands behind each:

==  =====================  ==========================================================================================
 1  root_chain             each newer root is signed by the threshold of the one before and by its own
 2  timestamp              signed by the timestamp role, not expired
 3  snapshot               signed, the one the timestamp names, not expired
 4  targets                signed by the offline targets keys, the one the snapshot names, not expired
 5  class_role             signed by the release keys of the board's class, the one the snapshot names, not expired
 6  floor                  no version of any of them below what this board has already accepted
 7  assignment_signature   signed by the director, a role that the offline targets keys delegate
 8  assignment_device      made out to this board and its class, about what it was sent as, exactly one artifact
 9  assignment_fresh       version above what was accepted before (or the very same bytes), not expired, issued while the
                           metadata held
10  agreement              path, length and sha256 equal to the image repository's
11  fingerprint            the board can run it; said before a byte is downloaded
==  =====================  ==========================================================================================

The bytes of manifest and blobs are checked by digest from there on (:mod:`edgefleet_shared.artifact`). python-tuf's pure
core does 1-5; its client is not used, because its store is not crash-safe and forgets floors (ADR 0005). Not handled here:
keeping the floors durable (:mod:`edgefleet_agent.verify`), reading a clock.

:class:`Incomplete` is no verdict: metadata that has not arrived yet, or two publications mixed; the caller waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from securesystemslib.exceptions import Error as SecuresystemslibError
from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Targets
from tuf.api.serialization import DeserializationError
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import (
    DIRECTOR,
    MAX_ASSIGNMENT_BYTES,
    Admission,
    Assignment,
    Floors,
    Incomplete,
    Subject,
    class_role,
    target_path,
)
from edgefleet_shared.clock import iso, utc
from edgefleet_shared.errors import TrustError
from edgefleet_shared.fingerprint import Fingerprint, Requirement, mismatches

MAX_METADATA_BYTES = 8 * 1024 * 1024
MAX_ROOT_ROTATIONS = 64

__all__ = [
    "Admission",
    "Assignment",
    "Floors",
    "ImageRepository",
    "Incomplete",
    "admit",
    "check_assignment",
    "newest_root",
]


class ImageRepository:
    """The image repository after checks 1-6.

    Args:
        root: the newest root that the board trusts (its first one came with the enrolment).
        read: a metadata file's bytes by name, or None when it has not arrived.
        now: UTC seconds; the board's clock, never below its floor.

    Raises:
        TrustError: a check failed. Incomplete: wait.
    """

    def __init__(
        self, root: bytes, read: Callable[[str], bytes | None], device_class: str, floors: Floors, now: float
    ) -> None:
        self.root = root
        try:
            self._trusted = TrustedMetadataSet(root, EnvelopeType.METADATA)
        except (RepositoryError, DeserializationError) as exc:
            raise TrustError("root_chain", f"the trusted root can't be used: {exc}") from exc
        self._trusted.reference_time = utc(max(now, floors.clock))
        for _ in range(MAX_ROOT_ROTATIONS):
            newer = read(f"{self._trusted.root.version + 1}.root.json")
            if newer is None:
                break
            _load("root_chain", self._trusted.update_root, newer)
            self.root = newer
        role = class_role(device_class)
        _load("timestamp", self._trusted.update_timestamp, _need(read, "timestamp.json"))
        _load("snapshot", self._trusted.update_snapshot, _need(read, "snapshot.json"))
        _load("targets", self._trusted.update_targets, _need(read, "targets.json"))
        delegations = self._trusted.targets.delegations
        if delegations is None or role not in (delegations.roles or {}):
            raise TrustError("class_role", f"the image repository knows no device class {device_class}")
        _load("class_role", self._trusted.update_delegated_targets, _need(read, f"{role}.json"), role, "targets")
        self.targets: Targets = self._trusted.targets
        self.releases: Targets = self._trusted[role]  # type: ignore[assignment]
        self.versions = {
            name: self._trusted[name].version for name in ("root", "timestamp", "snapshot", "targets", role)
        }
        self.valid_until = min(self._trusted[name].expires for name in self.versions).timestamp()
        for name, version in self.versions.items():
            if version < floors.versions.get(name, 0):
                raise TrustError("floor", f"{name} version {version} is below {floors.versions[name]}, accepted before")


def newest_root(root: bytes, read: Callable[[str], bytes | None]) -> bytes:
    """The last of the roots that follow from ``root``, each signed by its predecessor's keys too; ``root`` itself where none does.

    A board keeps it whatever comes of the rest (TUF 5.3.8): it has to go through all of them that it missed, each brought one by one, and only
    under the newest is the other metadata good. Arguments as of :class:`ImageRepository`.
    """
    try:
        trusted = TrustedMetadataSet(root, EnvelopeType.METADATA)
        for _ in range(MAX_ROOT_ROTATIONS):
            newer = read(f"{trusted.root.version + 1}.root.json")
            if newer is None:
                break
            _load("root_chain", trusted.update_root, newer)
            root = newer
    except (TrustError, RepositoryError, DeserializationError):
        pass  # told by whoever needs what can't be used
    return root


def admit(
    repository: ImageRepository,
    desired: bytes,
    *,
    device: str,
    device_class: str,
    board: Fingerprint,
    floors: Floors,
    now: float,
    subject: Subject = Subject.MODEL,
) -> Admission:
    """Checks 7-11 on an assignment's bytes, which came as one about ``subject``.

    Returns:
        the admission, with the floors to persist before anything is done for it.

    Raises:
        TrustError: naming the check that failed.
    """
    assignment, version = check_assignment(repository.targets, desired, now=max(now, floors.clock))
    if assignment.device != device or assignment.device_class != device_class:
        raise TrustError("assignment_device", f"made out to {assignment.device} of class {assignment.device_class}")
    if assignment.subject is not subject:
        raise TrustError(
            "assignment_device", f"it is about the {assignment.subject.value}, sent as one about the {subject.value}"
        )
    digest = digest_of(desired)
    floor, accepted = floors.of(subject)
    if version < floor or (version == floor and digest != accepted):
        raise TrustError("assignment_fresh", f"version {version} is not above {floor}")
    # It becomes the floor of the clock, for good: past the metadata's end it would make all of them look expired, also what is signed next.
    if assignment.issued_at >= repository.valid_until:
        raise TrustError(
            "assignment_fresh",
            f"issued at {assignment.issued_at}, when metadata of now have expired, at {iso(repository.valid_until)}",
        )
    released = repository.releases.targets.get(target_path(device_class, assignment.model, assignment.version))
    if released is None:
        raise TrustError(
            "agreement", f"{assignment.model} {assignment.version} is not released for class {device_class}"
        )
    if f"sha256:{released.hashes.get('sha256')}" != assignment.manifest or released.length != assignment.size:
        raise TrustError("agreement", "the director's hash or length differs from the image repository's")
    requires = _custom(released.unrecognized_fields, "requires", Requirement, "agreement")
    differences = mismatches(requires, board)
    if differences:
        raise TrustError("fingerprint", "; ".join(differences))
    raised = msgspec.structs.replace(
        floors, versions=dict(floors.versions) | repository.versions, clock=max(floors.clock, assignment.issued_at)
    )
    return Admission(
        assignment=assignment,
        desired=digest,
        requires=requires,
        root=repository.root,
        floors=raised.raised(subject, version, digest),
    )


def check_assignment(delegator: Targets, desired: bytes, *, now: float) -> tuple[Assignment, int]:
    """Checks 7, expiry, and "exactly one artifact"; returns the assignment and its version."""
    if len(desired) > MAX_ASSIGNMENT_BYTES:
        raise TrustError("assignment_signature", f"{len(desired)} bytes are no assignment")
    try:
        metadata: Metadata[Targets] = Metadata.from_bytes(desired)
        delegator.verify_delegate(DIRECTOR, metadata.signed_bytes, metadata.signatures)
    except (DeserializationError, RepositoryError, SecuresystemslibError, ValueError, RecursionError) as exc:
        raise TrustError("assignment_signature", f"not signed by the director: {exc}") from exc
    signed = metadata.signed
    if not isinstance(signed, Targets) or len(signed.targets) != 1 or signed.delegations is not None:
        raise TrustError("assignment_device", "an assignment names exactly one artifact")
    if signed.is_expired(utc(now)):
        raise TrustError("assignment_fresh", f"expired at {signed.expires:%Y-%m-%dT%H:%M:%SZ}")
    path, target = next(iter(signed.targets.items()))
    assignment = _custom(target.unrecognized_fields, "assignment", Assignment, "assignment_device")
    named = target_path(assignment.device_class, assignment.model, assignment.version)
    if (
        path != named
        or f"sha256:{target.hashes.get('sha256')}" != assignment.manifest
        or target.length != assignment.size
    ):
        raise TrustError("agreement", "the assignment contradicts its own target")
    return assignment, signed.version


def _need(read: Callable[[str], bytes | None], name: str) -> bytes:
    content = read(name)
    if content is None:
        raise Incomplete(f"{name} has not arrived yet")
    return content


def _load(check: str, update: Callable[..., Any], content: bytes, *names: str) -> None:
    if len(content) > MAX_METADATA_BYTES:
        raise TrustError(check, f"{len(content)} bytes are more than metadata has")
    try:
        update(content, *names)
    except EqualVersionNumberError:
        return
    except UnsignedMetadataError as exc:
        raise TrustError(check, f"not signed by enough of its keys: {exc}") from exc
    except ExpiredMetadataError as exc:
        raise TrustError(
            check, str(exc), hint="the controller renews it when it runs; check the board's clock"
        ) from exc
    except (BadVersionNumberError, LengthOrHashMismatchError) as exc:
        if check == "root_chain":
            raise TrustError(check, str(exc)) from exc
        # The file belongs to another publication than the one that names it: the rest is still on its way.
        raise Incomplete(f"{check}: {exc}") from exc
    except (RepositoryError, SecuresystemslibError, DeserializationError, ValueError, RecursionError) as exc:
        raise TrustError(check, str(exc)) from exc


C = TypeVar("C")


def _custom(fields: dict[str, Any], key: str, kind: type[C], check: str) -> C:
    custom = fields.get("custom")
    try:
        return msgspec.convert(custom[key] if isinstance(custom, dict) else None, type=kind)
    except (KeyError, msgspec.ValidationError) as exc:
        raise TrustError(check, f"the signed field custom.{key} is missing or malformed: {exc}") from exc
