"""Stage 6, verify: the one-shot child. Receives one request on stdin, hands one answer back, then ends.

Run as ``python -m edgefleet_agent.verify_child REPORT_FD`` by :mod:`edgefleet_agent.verify`. It confines itself before it parses
anything: it can read the code and the one folder in question, write nothing, and has no network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Container
from pathlib import Path

import msgspec
from edgefleet_shared import trust
from edgefleet_shared.artifact import AGENT_TYPE, CODE_LAYER, GOLDEN_LAYER, MODEL_LAYER, Descriptor, Layout, Manifest
from edgefleet_shared.assignment import AGENT, Assignment, Incomplete, Subject, subject_of
from edgefleet_shared.errors import ArtifactError, EdgefleetError, TrustError
from edgefleet_shared.topics import check_name

from edgefleet_agent import confinement
from edgefleet_agent.verify import AdmitRequest, Admitted, Answer, Checked, CheckRequest, NotVerified


def main() -> int:
    report_fd = int(sys.argv[1])
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=AdmitRequest | CheckRequest)
    confinement.die_with_parent()
    folder = request.metadata if isinstance(request, AdmitRequest) else request.layout
    confinement.confine(confinement.Policy(readable=(folder,)))
    try:
        answer: Answer
        if isinstance(request, AdmitRequest):
            answer = _admit(request)
        else:
            answer = check(Layout(Path(request.layout), read_only=True), request.assignment)
    except Incomplete as exc:
        answer = NotVerified(exc.as_dict(), waits=True)
    except EdgefleetError as exc:
        answer = NotVerified(exc.as_dict(), assignment=_named(request), root=_newest_root(request))
    os.write(report_fd, msgspec.json.encode(answer) + b"\n")
    return 0


def _reader(folder: Path) -> Callable[[str], bytes | None]:
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def _repository(request: AdmitRequest) -> trust.ImageRepository:
    read = _reader(Path(request.metadata))
    return trust.ImageRepository(request.root, read, request.device_class, request.floors, request.now)


def _newest_root(request: AdmitRequest | CheckRequest) -> bytes:
    if isinstance(request, CheckRequest):
        return b""
    return trust.newest_root(request.root, _reader(Path(request.metadata)))


def _admit(request: AdmitRequest) -> Admitted:
    repository = _repository(request)
    return Admitted(
        trust.admit(
            repository,
            request.desired,
            device=request.device,
            device_class=request.device_class,
            board=request.board,
            floors=request.floors,
            now=request.now,
            subject=request.subject,
        )
    )


def _named(request: AdmitRequest | CheckRequest) -> str:
    """The assignment's id, if the director's signature on it is good; it may be named in the outcome then."""
    if isinstance(request, CheckRequest):
        return request.assignment.id
    try:
        repository = _repository(request)
        assignment, _ = trust.check_assignment(repository.targets, request.desired, now=request.now)
    except EdgefleetError:
        return ""
    return assignment.id if assignment.device == request.device else ""


def check(layout: Layout, assignment: Assignment) -> Checked:
    """Every byte of an artifact against its digest, and its config against the assignment.

    Raises:
        NotFoundError, ArtifactError, TrustError: it is not what was signed. EnvironmentProblem: the disk can't be read.
    """
    layout.check(Descriptor("", assignment.manifest, assignment.size))
    manifest = layout.manifest(assignment.manifest)
    blobs = manifest.blobs()
    for blob in blobs:
        layout.check(blob)
    named, chunked, layers = _described(layout, manifest)
    if named != (assignment.model, assignment.version, assignment.device_class):
        raise TrustError("agreement", f"the artifact is {' '.join(named)}, another one was assigned")
    for layer in layers:
        if manifest.layer(layer).digest not in chunked:
            raise ArtifactError(f"the config has no chunk hashes for its {layer} layer")
    check_name(assignment.model, "model")
    return Checked(len(blobs) + 1, sum(blob.size for blob in blobs) + assignment.size)


def _described(layout: Layout, manifest: Manifest) -> tuple[tuple[str, str, str], Container[str], tuple[str, ...]]:
    """What an artifact calls itself (name, version, class), the digests that it has chunk hashes for, the layers that need them."""
    if manifest.artifact_type == AGENT_TYPE:
        agent = layout.agent_config(manifest)
        return (AGENT, agent.version, agent.device_class), agent.chunks, (CODE_LAYER,)
    config = layout.config(manifest)
    if subject_of(config.model) is Subject.AGENT:
        raise TrustError("agreement", f"a model calls itself {config.model}")
    return (config.model, config.version, config.device_class), config.chunks, (MODEL_LAYER, GOLDEN_LAYER)


if __name__ == "__main__":
    sys.exit(main())
