"""Stage 6, verify: one-shot children around the trust checks. Receives bytes, hands on an admission or a candidate that is good to the byte.

The parent's half. Two questions are asked, each of a fresh sandboxed child (:mod:`edgefleet_agent.verify_child`), so that the
resident agent never imports python-tuf or cryptography and hostile bytes are parsed where they can do nothing:

* :func:`admit` - may this assignment be followed on this board? (checks 1-11 of :mod:`edgefleet_shared.trust`)
* :func:`check_artifact` - is what lies on the disk to the byte what was signed?

The floors that checks 6 and 9 need are kept here: doubled, fsynced, the higher of both wins, and written *before* anything is
done for an assignment. A board that lost one copy to a power cut does not forget what it had accepted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Descriptor, Layout
from edgefleet_shared.assignment import Admission, Assignment, Floors, Incomplete
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem, TrustError, from_dict
from edgefleet_shared.fingerprint import Fingerprint

from edgefleet_agent import sandbox, slots
from edgefleet_agent.sandbox import Limits
from edgefleet_agent.settings import Settings

LIMITS = Limits(memory_bytes=192 * 1024 * 1024, time_s=60.0)
# Hashing is bound by the disk: the slowest SD card that is sold reads 10 MB/s.
SLOWEST_DISK_BYTES_PER_S = 5_000_000
MAX_METADATA_BYTES = 8 * 1024 * 1024


class AdmitRequest(msgspec.Struct, frozen=True, kw_only=True, tag="admit"):
    """parent -> child. ``trust`` and ``metadata`` are folders; ``desired`` the assignment's bytes."""

    metadata: str
    root: bytes
    desired: bytes
    device: str
    device_class: str
    board: Fingerprint
    floors: Floors
    now: float


class CheckRequest(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """parent -> child: hold the artifact in ``layout`` against the assignment."""

    layout: str
    assignment: Assignment


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    admission: Admission


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    blobs: int
    checked_bytes: int


class NotVerified(msgspec.Struct, frozen=True, tag="not_verified"):
    """``assignment`` when its signature was good and only a later check failed: then the outcome has a name to go by."""

    error: dict[str, str]
    waits: bool = False
    assignment: str = ""


Answer = Admitted | Checked | NotVerified
_AnswerT = TypeVar("_AnswerT", Admitted, Checked)


class Refusal(Exception):
    """An assignment that was decided against. ``assignment`` is empty when not even its signature was good."""

    def __init__(self, error: EdgefleetError, assignment: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.assignment = assignment


def admit(state: Path, settings: Settings, board: Fingerprint, desired: bytes, now: float) -> Admission:
    """Checks 1-11 on an assignment, then the new floors and root made durable.

    Raises:
        Refusal: decided against, with the check that failed.
        Incomplete: metadata is still on its way; ask again when more has arrived.
        EnvironmentProblem: the child could not do its work.
    """
    floors = read_floors(state)
    request = AdmitRequest(
        metadata=str((state / "metadata").resolve()),
        root=read_root(state),
        desired=desired,
        device=settings.device,
        device_class=settings.device_class,
        board=board,
        floors=floors,
        now=now,
    )
    admission = _ask(request, LIMITS, Admitted).admission
    if admission.root != request.root:
        atomic.write(state / "trust" / "root.json", admission.root)
    if admission.floors != floors:
        write_floors(state, admission.floors)
    return admission


def check_artifact(state: Path, assignment: Assignment) -> Checked:
    """Every byte of the candidate against its digest, and its config against the assignment.

    Raises:
        Refusal: it is not what was signed.
        EnvironmentProblem: the child could not do its work.
    """
    layout = slots.artifacts(state)
    total = sum(blob.size for blob in _blobs(layout, assignment))
    limits = msgspec.structs.replace(LIMITS, time_s=LIMITS.time_s + total / SLOWEST_DISK_BYTES_PER_S)
    return _ask(CheckRequest(layout=str(layout.root.resolve()), assignment=assignment), limits, Checked)


def _blobs(layout: Layout, assignment: Assignment) -> tuple[Descriptor, ...]:
    try:
        return layout.manifest(assignment.manifest).blobs()
    except EdgefleetError as exc:
        raise Refusal(exc, assignment.id) from exc


def _ask(request: AdmitRequest | CheckRequest, limits: Limits, expected: type[_AnswerT]) -> _AnswerT:
    ended = sandbox.run("edgefleet_agent.verify_child", msgspec.json.encode(request), limits)
    answers = []
    for line in ended.reports:
        try:
            answers.append(msgspec.json.decode(line, type=Answer))
        except msgspec.DecodeError as exc:
            raise EnvironmentProblem(f"the verifying child answered nonsense: {exc}") from exc
    match answers:
        case [expected() as answer]:
            return answer
        case [NotVerified(error, waits, assignment)]:
            if waits:
                raise Incomplete(error.get("message", ""))
            raise Refusal(from_dict(error), assignment)
    raise EnvironmentProblem(
        f"the verifying child ended without an answer: {ended.problem or 'status 0'} {ended.output[-300:]}"
    )


def read_root(state: Path) -> bytes:
    """The newest root that this board trusts.

    Raises:
        TrustError: there is none.
    """
    try:
        return (state / "trust" / "root.json").read_bytes()
    except FileNotFoundError as exc:
        raise TrustError("root_chain", "this board trusts no root", hint="enrol it again") from exc


def read_floors(state: Path) -> Floors:
    """The floors, the higher of both copies. A board with a journal but without any copy is refused by the caller's doctor."""
    found = []
    for name in ("floors-a.json", "floors-b.json"):
        try:
            found.append(msgspec.json.decode((state / "trust" / name).read_bytes(), type=Floors))
        except (FileNotFoundError, msgspec.DecodeError):
            continue
    if not found:
        return Floors()
    versions: dict[str, int] = {}
    for floors in found:
        for name, version in floors.versions.items():
            versions[name] = max(version, versions.get(name, 0))
    newest = max(found, key=lambda f: f.assignment_version)
    return msgspec.structs.replace(newest, versions=versions, clock=max(f.clock for f in found))


def write_floors(state: Path, floors: Floors) -> None:
    """Both copies, one after the other: a cut leaves at least one of them whole."""
    content = msgspec.json.encode(floors)
    atomic.write(state / "trust" / "floors-a.json", content)
    atomic.write(state / "trust" / "floors-b.json", content)


def take_metadata(state: Path, name: str, content: bytes) -> bool:
    """Keep a metadata file as it arrived, unverified; returns whether it is new."""
    if len(content) > MAX_METADATA_BYTES:
        return False
    path = state / "metadata" / name
    if path.is_file() and path.read_bytes() == content:
        return False
    atomic.write(path, content)
    return True
