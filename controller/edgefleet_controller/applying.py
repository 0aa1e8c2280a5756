"""``fleet apply``: receives manifests, hands on registered device classes, each with a delegated release role."""

from __future__ import annotations

from pathlib import Path

from edgefleet_shared.clock import SystemClock

from edgefleet_controller import release
from edgefleet_controller.client import FleetClient
from edgefleet_controller.manifest_files import load_manifests
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.sign import ReleaseSigner


def apply_manifests(home: Path, path: Path, keys: Path | None) -> list[dict[str, str]]:
    """Validate all, then register device classes.

    Returns:
        what was done, in the order of the manifests.

    Raises:
        ManifestError: a wrong field, with file and line; nothing was changed.
        EdgefleetError: the controller is not reachable, or keys are missing.
    """
    manifests = load_manifests(path)
    client = FleetClient(home)
    signer = ReleaseSigner(keys or home / "keys" / "offline", SystemClock())
    done = []
    for manifest in manifests:
        if isinstance(manifest, DeviceClass):
            client.put_class(manifest.model_dump(mode="json"))
            new = release.add_class(client, signer, manifest.name)
            told = "registered, its release role delegated" if new else "registered"
            told += f"; proven here: {manifest.spec.proven or 'not told'}"
        else:
            told = {
                "Model": "valid; add it with: fleet model add -f",
                "Rollout": "valid; start it with: fleet rollout create -f",
                "Site": "valid",
            }[manifest.kind]
        done.append({"kind": manifest.kind, "name": manifest.name, "done": told})
    client.close()
    return done
