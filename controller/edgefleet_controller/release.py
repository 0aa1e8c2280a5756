"""Stage 3, sign, on the operator's side: receives what the controller compiled, checks that it is what was meant, hands on signed metadata.

The release key of a class never leaves the operator. What is signed is not the controller's word but the bytes: manifest and config
are fetched and checked here first.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from edgefleet_shared.artifact import (
    AGENT_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    digest_of,
    parse_agent_config,
    parse_config,
    parse_manifest,
)
from edgefleet_shared.assignment import AGENT, class_role
from edgefleet_shared.errors import NotFoundError, TrustError
from edgefleet_shared.fingerprint import Requirement

from edgefleet_controller.client import FleetClient
from edgefleet_controller.sign import ReleaseSigner


def add_class(client: FleetClient, signer: ReleaseSigner, device_class: str) -> bool:
    """Delegate a class in the image repository; returns whether it was new.

    Raises:
        NotFoundError: the targets keys are not here.
    """
    changed = signer.add_class(client.metadata("targets.json"), device_class)
    client.publish(changed)
    return bool(changed)


def renew(client: FleetClient, signer: ReleaseSigner) -> list[str]:
    """Sign anew what has less than half of its life left, and hand it in.

    Returns:
        the names of what was signed.

    Raises:
        NotFoundError: keys of what is due are not here; nothing was signed.
    """
    root, number = client.metadata("1.root.json"), 1
    while True:
        try:
            root = client.metadata(f"{number + 1}.root.json")
        except NotFoundError:
            break
        number += 1
    classes = [f"{class_role(str(spec['metadata']['name']))}.json" for spec in client.classes()]
    files = {"targets.json": client.metadata("targets.json")}
    for name in classes:
        with suppress(NotFoundError):  # a class that was registered and never delegated
            files[name] = client.metadata(name)
    renewed = signer.renew(root, files)
    client.publish(renewed)
    return list(renewed)


def sign(client: FleetClient, signer: ReleaseSigner, model: str, version: str, artifact: dict[str, Any]) -> None:
    """Release one artifact for its class.

    Args:
        artifact: as the controller lists it (class, manifest, manifest_bytes).

    Raises:
        TrustError: what the controller holds is something else. NotFoundError: the class's release key is not here.
    """
    device_class, digest = str(artifact["class"]), str(artifact["manifest"])
    content = client.blob(digest)
    if digest_of(content) != digest:
        raise TrustError("release", f"the controller's bytes for {digest} are something else")
    manifest = parse_manifest(content)
    config_bytes = client.blob(manifest.config.digest)
    if digest_of(config_bytes) != manifest.config.digest:
        raise TrustError("release", f"the config of {digest} is something else")
    named, requires = _described(manifest.artifact_type, config_bytes)
    if named != (model, version, device_class):
        raise TrustError(
            "release",
            f"{digest} is {named[0]} {named[1]} for {named[2]}, not {model} {version} for {device_class}",
        )
    role = f"{class_role(device_class)}.json"
    try:
        current = client.metadata(role)
    except NotFoundError as exc:
        raise NotFoundError(f"class {device_class} has no release role", hint="fleet apply its manifest first") from exc
    client.publish(
        signer.release(
            current, device_class=device_class, model=model, version=version,
            manifest=Descriptor(MANIFEST_TYPE, digest, len(content)), requires=requires,
        )
    )  # fmt: skip


def _described(artifact_type: str, config: bytes) -> tuple[tuple[str, str, str], Requirement]:
    """(name, version, class) and what it needs, by its config."""
    if artifact_type == AGENT_TYPE:
        agent = parse_agent_config(config)
        return (AGENT, agent.version, agent.device_class), agent.requires
    model = parse_config(config)
    return (model.model, model.version, model.device_class), model.requires
