"""Model versions and artifacts in the database: get, list, put. Every function works in the caller's session."""

from __future__ import annotations

from edgefleet_shared.assignment import AGENT
from edgefleet_shared.errors import ConflictError, NotFoundError
from edgefleet_shared.topics import check_name
from sqlmodel import Session, col, select

from edgefleet_controller.store.tables import Artifact, ModelVersion


def add_version(session: Session, model: str, version: str, source_digest: str, spec: str, now: float) -> ModelVersion:
    """Add a model version. Adding the same once more changes nothing.

    Raises:
        ConflictError: that version exists with another source or manifest: versions are immutable.
    """
    check_name(model, "model")
    check_name(version, "version")
    row = session.get(ModelVersion, (model, version))
    if row is not None:
        if (row.source_digest, row.spec) != (source_digest, spec):
            raise ConflictError(
                f"{model} {version} exists and is something else", hint="give the changed model a new version"
            )
        return row
    row = ModelVersion(model=model, version=version, source_digest=source_digest, spec=spec, created_at=now)
    session.add(row)
    session.flush()
    return row


def get_version(session: Session, model: str, version: str) -> ModelVersion:
    """Raises:
    NotFoundError: there is no such model, or not in that version."""
    row = session.get(ModelVersion, (model, version))
    if row is None:
        known = ", ".join(v.version for v in list_versions(session, model))
        raise NotFoundError(f"no version {version!r} of model {model!r}", hint=f"known: {known or 'no such model'}")
    return row


def list_versions(session: Session, model: str = "") -> list[ModelVersion]:
    """Versions of one model, or of all; those of the agent only by its name."""
    query = select(ModelVersion).order_by(ModelVersion.model, col(ModelVersion.created_at))
    query = query.where(ModelVersion.model == model if model else ModelVersion.model != AGENT)
    return list(session.exec(query))


def put_artifact(session: Session, artifact: Artifact) -> Artifact:
    """Store what was compiled, in place of an earlier artifact of the same model version and class that no one has signed.

    Raises:
        ConflictError: another one was signed already.
    """
    old = session.exec(
        select(Artifact).where(
            Artifact.model == artifact.model,
            Artifact.version == artifact.version,
            Artifact.device_class == artifact.device_class,
        )
    ).one_or_none()
    if old is not None and old.manifest != artifact.manifest:
        if old.state == "signed":
            raise ConflictError(
                f"{artifact.model} {artifact.version} is signed for class {artifact.device_class} already",
                hint="what was signed does not change: give it a new version",
            )
        session.delete(old)
        session.flush()
    merged = session.merge(artifact)
    session.flush()
    return merged


def mark_signed(session: Session, manifest: str) -> Artifact:
    row = get_artifact(session, manifest)
    row.state = "signed"
    session.add(row)
    return row


def get_artifact(session: Session, manifest: str) -> Artifact:
    """Raises:
    NotFoundError: no artifact has that manifest digest."""
    row = session.get(Artifact, manifest)
    if row is None:
        raise NotFoundError(f"no artifact {manifest}")
    return row


def list_artifacts(session: Session, model: str = "", version: str = "", state: str = "") -> list[Artifact]:
    query = select(Artifact).order_by(Artifact.model, col(Artifact.created_at), Artifact.device_class)
    if model:
        query = query.where(Artifact.model == model)
    if version:
        query = query.where(Artifact.version == version)
    if state:
        query = query.where(Artifact.state == state)
    return list(session.exec(query))
