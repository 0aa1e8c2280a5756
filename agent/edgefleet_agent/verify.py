"""Stage 6, verify: one-shot children around the trust checks. Receives bytes, hands on an admission or a candidate that is good to the byte.

The parent's half. Two questions are asked, each of a fresh sandboxed child (:mod:`edgefleet_agent.verify_child`), so that the
resident agent never imports python-tuf or cryptography and hostile bytes are parsed where they can do nothing:

* :meth:`SandboxedChild.admit` - may this assignment be followed on this board? (checks 1-11 of :mod:`edgefleet_shared.trust`)
* :meth:`SandboxedChild.check` - is what lies on the disk to the byte what was signed?

The floors that checks 6 and 9 need are kept here: doubled, fsynced, the higher of both wins, and written *before* anything is
done for an assignment. A board that lost one copy to a power cut does not forget what it had accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Descriptor, Layout
from edgefleet_shared.assignment import Admission, Assignment, Floors, Incomplete, Subject
from edgefleet_shared.errors import (
    ArtifactError,
    EdgefleetError,
    EnvironmentProblem,
    NotFoundError,
    TrustError,
    from_dict,
)
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent import sandbox, slots
from edgefleet_agent.sandbox import Limits
from edgefleet_agent.settings import Settings

LIMITS = Limits(memory_bytes=192 * 1024 * 1024, time_s=60.0)
# Hashing is bound by the disk: the slowest SD card that is sold reads 10 MB/s.
SLOWEST_DISK_BYTES_PER_S = 5_000_000
MAX_METADATA_BYTES = 8 * 1024 * 1024
FLOOR_FILES = ("floors-a.json", "floors-b.json")


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
    subject: Subject = Subject.MODEL


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
    """``assignment`` when its signature was good and only a later check failed: then the outcome has a name to go by. ``root`` is the newest
    that the board may trust all the same, when its metadata was looked at."""

    error: dict[str, str]
    waits: bool = False
    assignment: str = ""
    root: bytes = b""


Answer = Admitted | Checked | NotVerified
_AnswerT = TypeVar("_AnswerT", Admitted, Checked)


class _Versioned(msgspec.Struct):
    version: int


class _RootFile(msgspec.Struct):
    """As much of root metadata as says its version."""

    signed: _Versioned


class Refusal(Exception):
    """An assignment that was decided against. ``assignment`` is empty when not even its signature was good; ``root`` as in
    :class:`NotVerified`."""

    def __init__(self, error: EdgefleetError, assignment: str, root: bytes = b"") -> None:
        super().__init__(str(error))
        self.error = error
        self.assignment = assignment
        self.root = root


class SandboxedChild:
    """The real examiner's first half: each question to a child of its own (:mod:`edgefleet_agent.verify_child`)."""

    def admit(self, request: AdmitRequest) -> Admission:
        """Checks 1-11 on an assignment.

        Raises:
            Refusal: decided against, with the check that failed.
            Incomplete: metadata is still on its way; ask again when more has arrived.
            EnvironmentProblem: the child could not do its work.
        """
        return _ask(request, LIMITS, Admitted).admission

    def check(self, state: Path, assignment: Assignment) -> Checked:
        """Every byte of the candidate against its digest, and its config against the assignment.

        Raises:
            Refusal: it is not what was signed.
            EnvironmentProblem: the child could not do its work.
        """
        layout = slots.artifacts(state)
        total = sum(blob.size for blob in _blobs(layout, assignment))
        limits = msgspec.structs.replace(LIMITS, time_s=LIMITS.time_s + total / SLOWEST_DISK_BYTES_PER_S)
        return _ask(CheckRequest(layout=str(layout.root.resolve()), assignment=assignment), limits, Checked)


def admit(
    state: Path,
    settings: Settings,
    board: Fingerprint,
    desired: bytes,
    now: float,
    ask: Callable[[AdmitRequest], Admission],
    files: FileSystem = DISK,
    subject: Subject = Subject.MODEL,
) -> Admission:
    """Have an assignment checked, then make the new root and floors durable: only then may anything be done for it. Of one that is refused
    the new root stays.

    Raises:
        Refusal, Incomplete: as ``ask`` does. EnvironmentProblem: the child or the disk could not do its part.
    """
    floors = read_floors(state, files=files)
    request = AdmitRequest(
        metadata=str((state / "metadata").resolve()),
        root=read_root(state, files=files),
        desired=desired,
        device=settings.device,
        device_class=settings.device_class,
        board=board,
        floors=floors,
        now=now,
        subject=subject,
    )
    try:
        admission = ask(request)
    except Refusal as exc:
        if exc.root not in (b"", request.root):
            atomic.write(state / "trust" / "root.json", exc.root, files=files)
        if isinstance(exc.error, TrustError) and exc.error.check == "root_chain":
            _discard_next_root(state, files)
        raise
    if admission.root != request.root:
        atomic.write(state / "trust" / "root.json", admission.root, files=files)
    write_floors(state, admission.floors, files=files)
    return admission


def _discard_next_root(state: Path, files: FileSystem) -> None:
    """As the TUF specification has it (5.3.4). Every other file that is not what it should be is written over by the right one, but of a next
    root there is none as a rule: what a broker in the wrong hands once said would be refused for ever. A disk that keeps it is asked again when that
    is refused the next time."""
    with suppress(EdgefleetError):
        atomic.remove(state / "metadata" / f"{root_version(state, files=files) + 1}.root.json", files=files)


def _blobs(layout: Layout, assignment: Assignment) -> tuple[Descriptor, ...]:
    try:
        return layout.manifest(assignment.manifest).blobs()
    except (NotFoundError, ArtifactError) as exc:
        raise Refusal(exc, assignment.id) from exc


def _ask(request: AdmitRequest | CheckRequest, limits: Limits, expected: type[_AnswerT]) -> _AnswerT:
    ended = sandbox.run("edgefleet_agent.verify_child", msgspec.json.encode(request), limits)
    answers = []
    for line in ended.reports:
        try:
            answers.append(msgspec.json.decode(line, type=Answer))
        except MALFORMED as exc:
            raise EnvironmentProblem(f"the verifying child answered nonsense: {exc}") from exc
    match answers:
        case [expected() as answer]:
            return answer
        case [NotVerified(error, waits, assignment, root)]:
            if waits:
                raise Incomplete(error.get("message", ""))
            found = from_dict(error)
            if isinstance(found, EnvironmentProblem):
                raise found  # the disk under the child: nothing was decided
            raise Refusal(found, assignment, root)
    raise EnvironmentProblem(
        f"the verifying child ended without an answer: {ended.problem or 'status 0'} {ended.output[-300:]}"
    )


def read_root(state: Path, *, files: FileSystem = DISK) -> bytes:
    """The newest root that this board trusts.

    Raises:
        TrustError: there is none. EnvironmentProblem: it can't be read.
    """
    try:
        return atomic.read(state / "trust" / "root.json", files=files)
    except FileNotFoundError as exc:
        raise TrustError("root_chain", "this board trusts no root", hint="enrol it again") from exc


def root_version(state: Path, *, files: FileSystem = DISK) -> int:
    """The version of the newest root that this board trusts, which says what metadata files are needed. It was verified when it was kept.

    Raises:
        TrustError: there is no root, or a damaged one. EnvironmentProblem: it can't be read.
    """
    try:
        return msgspec.json.decode(read_root(state, files=files), type=_RootFile).signed.version
    except MALFORMED as exc:
        raise TrustError("root_chain", f"the trusted root is damaged: {exc}", hint="enrol the board again") from exc


def read_floors(state: Path, *, files: FileSystem = DISK) -> Floors:
    """The floors, the higher of both copies; no copy is a board that has not accepted anything yet. Nothing was done before both copies were
    there, so that each alone says enough.

    Raises:
        EnvironmentProblem: every copy that is there is damaged or can't be read: to go on would forget the floors.
    """
    found, damaged = [], False
    unreadable: EnvironmentProblem | None = None
    for name in FLOOR_FILES:
        try:
            found.append(msgspec.json.decode(atomic.read(state / "trust" / name, files=files), type=Floors))
        except FileNotFoundError:
            pass
        except MALFORMED:
            damaged = True
        except EnvironmentProblem as exc:
            unreadable = exc
    if not found:
        if unreadable is not None:
            raise unreadable
        if damaged:
            raise EnvironmentProblem(
                f"the version floors in {state / 'trust'} are damaged", hint="enrol the board again, in a new folder"
            )
        return Floors()
    versions: dict[str, int] = {}
    for floors in found:
        for name, version in floors.versions.items():
            versions[name] = max(version, versions.get(name, 0))
    highest = Floors(versions=versions, clock=max(f.clock for f in found))
    for subject in Subject:
        highest = highest.raised(subject, *max(floors.of(subject) for floors in found))
    return highest


def write_floors(state: Path, floors: Floors, *, files: FileSystem = DISK) -> None:
    """Both copies, one after the other: a cut leaves at least one of them whole.

    When the first copy is as it should be and the second is not, an earlier start was stopped between the two, perhaps before
    the first was safe from a power cut: then both are written.
    """
    content = msgspec.json.encode(floors)
    if not all(_holds(state / "trust" / name, content, files) for name in FLOOR_FILES):
        for name in FLOOR_FILES:
            atomic.write(state / "trust" / name, content, files=files)


def _holds(path: Path, content: bytes, files: FileSystem) -> bool:
    """Whether a file is there, can be read, and has these bytes: else it is to be written."""
    try:
        return atomic.read(path, files=files) == content
    except (FileNotFoundError, EnvironmentProblem):
        return False


def take_metadata(state: Path, name: str, content: bytes, *, files: FileSystem = DISK) -> bool:
    """Keep a metadata file as it arrived, unverified; returns whether it is new. An empty one says that the broker has none.

    Raises:
        EnvironmentProblem: it can't be kept.
    """
    if not 0 < len(content) <= MAX_METADATA_BYTES:
        return False
    path = state / "metadata" / name
    if _holds(path, content, files):
        return False
    atomic.write(path, content, files=files)
    return True
