"""Stages 1 to 3 as the operator drives them: receives a Model manifest, hands on a version, its artifacts, their signatures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgefleet_shared.artifact import Layout
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.errors import EdgefleetError, InputError, NotFoundError, TransportError, from_dict

from edgefleet_controller import model_version, release
from edgefleet_controller.client import FleetClient
from edgefleet_controller.compile.comparing import Row, compare
from edgefleet_controller.compile.workplace import work_folder
from edgefleet_controller.manifests import Model
from edgefleet_controller.manifests.files import load_manifests, of_kind
from edgefleet_controller.settings import default_cache
from edgefleet_controller.sign import ReleaseSigner
from edgefleet_controller.source.importing import Progress, import_model

POLL_S = 0.3
OUT_OF_REACH_S = 120.0  # a controller that starts again goes on with its jobs
Show = Callable[[str, str, float], None]


def add_model(home: Path, path: Path, version: str, progress: Progress) -> dict[str, Any]:
    """Import a model on this machine, upload what the controller lacks, register the version.

    Args:
        path: a file with one Model manifest.
        version: in place of the manifest's own; empty to keep that.

    Raises:
        ManifestError, ModelError, DataError: what is wrong with it. ConflictError: the version is something else already.
    """
    found = of_kind(load_manifests(path), Model)
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} Model manifests, expected 1")
    manifest = found[0]
    if version:
        manifest = manifest.model_copy(update={"spec": manifest.spec.model_copy(update={"version": version})})
    client = FleetClient(home)
    with work_folder("add") as staging:
        layout = Layout(staging)
        imported = import_model(
            manifest, (manifest.file or path).parent, layout, cache=default_cache(), progress=progress
        )
        client.upload(layout, [*model_version.blobs(imported), imported.digest], progress)
    added: dict[str, Any] = client.add_model(imported.digest)
    client.close()
    return added


def compile_and_sign(
    home: Path,
    model: str,
    version: str,
    classes: tuple[str, ...],
    *,
    despite_quality: bool,
    keys: Path | None,
    show: Show,
) -> dict[str, Any]:
    """Compile for every class, wait, sign.

    Args:
        classes: empty for every registered class that is built on the controller.
        keys: folder of the release keys; None to leave it unsigned.

    Raises:
        EdgefleetError: of the class that failed, or of all that did together, after all have ended; what did compile is kept, and signed.
    """
    client = FleetClient(home)
    wanted = classes or tuple(c["metadata"]["name"] for c in client.classes() if c["spec"]["build"] == "controller")
    if not wanted:
        raise NotFoundError("no device class is registered", hint="fleet apply -f manifests/")
    jobs = {c: client.compile(model, version, c, despite_quality=despite_quality) for c in wanted}
    failures: dict[str, EdgefleetError] = {}
    heard = time.monotonic()
    try:
        while jobs:
            time.sleep(POLL_S)
            for device_class, job in list(jobs.items()):
                try:
                    told = client.job(job)
                except TransportError:
                    if time.monotonic() - heard > OUT_OF_REACH_S:
                        raise
                    show(device_class, "the controller is out of reach", 0.0)
                    continue
                heard = time.monotonic()
                show(device_class, told["step"] or told["state"], told["progress"])
                if told["state"] in ("queued", "running"):
                    continue
                del jobs[device_class]
                if told["state"] == "failed":
                    failures[device_class] = from_dict(told["error"])
                elif told["state"] == "cancelled":
                    failures[device_class] = InputError(f"compiling for {device_class} was cancelled")
    except KeyboardInterrupt:
        for job in jobs.values():
            client.cancel_job(job)
        raise
    if keys is not None:
        sign_compiled(home, model, version, keys)
    if failures:
        raise _together(failures)
    (shown,) = client.models(model, version)
    shown["artifacts"] = [a for a in shown["artifacts"] if a["class"] in wanted]
    client.close()
    return dict(shown)


def _together(failures: dict[str, EdgefleetError]) -> EdgefleetError:
    """One failure as it is; several as one error of the first's kind that tells each class's own."""
    if len(failures) == 1:
        return next(iter(failures.values()))
    first = next(iter(failures.values()))
    told = "\n".join(f"{name}: {error.message}" for name, error in failures.items())
    hints = list(dict.fromkeys(error.hint for error in failures.values() if error.hint))
    return from_dict(
        {"code": first.code, "message": f"{len(failures)} classes failed\n{told}", "hint": "; ".join(hints)}
    )


def compare_versions(home: Path, model: str, before: str, after: str) -> list[Row]:
    """Figures of two versions of a model, class by class.

    Raises:
        NotFoundError: one of them is not there.
    """
    client = FleetClient(home)
    sides = []
    for version in (before, after):
        found = client.models(model, version)
        if not found:
            raise NotFoundError(f"no model {model} {version}", hint="fleet model list shows them")
        sides.append(found[0])
    client.close()
    artifacts, kinds, failed = ([side[what] for side in sides] for what in ("artifacts", "output_kind", "failed"))
    return compare(artifacts[0], artifacts[1], (kinds[0], kinds[1]), (failed[0], failed[1]))


def fetch_report(home: Path, model: str, version: str, device_class: str, *, page: bool) -> bytes:
    """The quality report of the last compile for a class, as HTML or as JSON: of what was shipped, or of why nothing was.

    Raises:
        NotFoundError: it is not compiled for that class, and the last try left no report.
    """
    client, form = FleetClient(home), "page" if page else "report"
    found = client.models(model, version)
    artifacts = [a for a in found[0]["artifacts"] if a["class"] == device_class] if found else []
    failed = [f["error"] for f in found[0]["failed"] if f["class"] == device_class] if found else []
    if failed and form in failed[0]:
        return client.blob(failed[0][form])
    if failed and not artifacts:
        raise NotFoundError(
            f"{model} {version} is not compiled for {device_class}, the last try failed: {failed[0]['message']}",
            hint=failed[0]["hint"],
        )
    if not artifacts:
        raise NotFoundError(
            f"{model} {version} is not compiled for {device_class}", hint="fleet model show tells for what"
        )
    content = client.blob(artifacts[-1]["quality"][form])
    client.close()
    return content


def sign_compiled(home: Path, model: str, version: str, keys: Path) -> list[str]:
    """Sign every artifact of a version that is not signed yet; returns the classes.

    Raises:
        NotFoundError: no such version, or a class's release key is not in ``keys``.
    """
    client = FleetClient(home)
    found = client.models(model, version)
    if not found:
        raise NotFoundError(f"no model {model} {version}", hint="fleet model list shows them")
    signer = ReleaseSigner(keys, SystemClock())
    signed = []
    for artifact in found[0]["artifacts"]:
        if artifact["state"] != "signed":
            release.sign(client, signer, model, version, artifact)
            signed.append(str(artifact["class"]))
    client.close()
    return signed
