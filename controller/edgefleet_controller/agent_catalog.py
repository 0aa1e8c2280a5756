"""Stage 3 for the agent itself, on the controller's side: receives uploaded manifests of one version, hands on rows of the catalogue.

The bytes were made on the operator's side (:mod:`edgefleet_controller.agent_version`); here they are checked to be whole and to be what
they say, so that a rollout can name them. Boards believe none of it: they go by the release keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from edgefleet_shared.artifact import AGENT_TYPE, CODE_LAYER, AgentConfig, Layout, Manifest
from edgefleet_shared.assignment import AGENT
from edgefleet_shared.errors import InputError
from edgefleet_shared.topics import check_name

from edgefleet_controller.store import catalog, devices
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import Artifact


def register(database: Database, layout: Layout, manifests: Sequence[str], now: float) -> str:
    """Take up the artifacts of one version. Taking up the same once more changes nothing.

    Args:
        manifests: digests of agent manifests that lie in ``layout`` with all their blobs.

    Returns:
        the version.

    Raises:
        InputError: not agents, or not all of one version. NotFoundError: a blob or a class is missing.
        ConflictError: the version exists and is something else.
    """
    found = {digest: _checked(layout, digest) for digest in manifests}
    versions = {(config.version, manifest.layer(CODE_LAYER).digest) for manifest, config in found.values()}
    if len(versions) != 1:
        raise InputError("the manifests are not all of one version with one code")
    ((version, code),) = versions
    check_name(version, "version")
    requires = {msgspec.json.encode(config.requires.provides, order="deterministic") for _, config in found.values()}
    if len(requires) != 1:
        raise InputError("the manifests of one version need different things")
    (spec,) = requires
    with database.write() as session:
        catalog.add_version(session, AGENT, version, code, spec.decode(), now)
        for digest, (manifest, config) in found.items():
            devices.get_class(session, config.device_class)
            known = {a.manifest for a in catalog.list_artifacts(session, AGENT, version)}
            if digest not in known:
                catalog.put_artifact(session, _row(layout, digest, manifest, config, now))
    return version


def _checked(layout: Layout, digest: str) -> tuple[Manifest, AgentConfig]:
    manifest = layout.manifest(digest)
    if manifest.artifact_type != AGENT_TYPE:
        raise InputError(f"{digest} is no version of the agent")
    for blob in manifest.blobs():
        layout.check(blob)
    return manifest, layout.agent_config(manifest)


def _row(layout: Layout, digest: str, manifest: Manifest, config: AgentConfig, now: float) -> Artifact:
    size = layout.path(digest).stat().st_size
    return Artifact(
        manifest=digest, model=AGENT, version=config.version, device_class=config.device_class, manifest_bytes=size,
        size_bytes=size + sum(blob.size for blob in manifest.blobs()), state="compiled",
        requirement=msgspec.json.encode(config.requires).decode(), created_at=now,
    )  # fmt: skip
