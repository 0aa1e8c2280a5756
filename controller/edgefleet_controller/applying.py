"""``fleet apply``: receives manifests, hands on registered device classes, each with a delegated release role."""

from __future__ import annotations

from pathlib import Path

from edgefleet_shared.clock import SystemClock

from edgefleet_controller import release
from edgefleet_controller.client import FleetClient
from edgefleet_controller.compile.port import check_class, installed_targets
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.manifests.files import load_manifests, of_kind
from edgefleet_controller.sign import ReleaseSigner


def apply_manifests(home: Path, path: Path, keys: Path | None) -> list[dict[str, str]]:
    """Validate all, then register device classes.

    Returns:
        what was done, in the order of the manifests.

    Raises:
        ManifestError: a wrong field, with file and line, or what a class's target does not make; nothing was changed.
        EdgefleetError: the controller is not reachable, or keys are missing.
    """
    manifests = load_manifests(path)
    targets = installed_targets()
    for one in of_kind(manifests, DeviceClass):
        if one.target in targets.targets:
            check_class(one, targets.targets[one.target])
    client = FleetClient(home)
    signer = ReleaseSigner(keys or home / "keys" / "offline", SystemClock())
    done = []
    for manifest in manifests:
        if isinstance(manifest, DeviceClass):
            client.put_class(manifest.model_dump(mode="json"))
            new = release.add_class(client, signer, manifest.name)
            told = "registered, its release role delegated" if new else "registered"
            told += f"; proven here: {manifest.spec.proven or 'not told'}"
            if manifest.target not in targets.targets:
                why = targets.broken.get(manifest.target, "no such target is installed")
                told += f"; here nothing compiles for it: {manifest.target}: {why}"
        else:
            told = {
                "Model": "valid; add it with: fleet model add -f",
                "Rollout": "valid; start it with: fleet rollout create -f",
                "Site": "valid",
            }[manifest.kind]
        done.append({"kind": manifest.kind, "name": manifest.name, "done": told})
    client.close()
    return done
