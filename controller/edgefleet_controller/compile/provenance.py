"""Stage 2, compile: where a compiled model comes from. Pure: receives a version and a toolchain, hands on two documents.

An in-toto statement (SLSA provenance v1) and a CycloneDX 1.6 ML-BOM. Neither holds a time stamp, a random id or a host's name:
the same inputs and toolchain give the same bytes, and so the same artifact digest.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from edgefleet_shared import __version__
from edgefleet_shared.artifact import hex_of

from edgefleet_controller.compile.port import Target
from edgefleet_controller.compile.recipe import TENSORFLOW, Recipe
from edgefleet_controller.compile.toolchains import Toolchain
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://edgefleet.dev/compile/v1"


def statement(
    version: ModelVersion, device_class: DeviceClass, target: Target, toolchains: Sequence[Toolchain], recipe: Recipe,
    key: str, compiled: str,
) -> bytes:  # fmt: skip
    """The in-toto statement about the compiled model.

    Args:
        key: of the compile (see :mod:`.pipeline`).
        compiled: digest of the compiled model.
    """
    materials = {
        "network": version.network,
        "calibration": version.calibration.digest,
        "holdout": version.holdout.digest,
        "golden": version.golden.digest,
    }
    if recipe.pruned and version.training is not None:
        materials["training"] = version.training.digest
    if recipe.quantizer == TENSORFLOW and version.original is not None:
        materials["original"] = version.original.digest
    return _json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": _name(version, device_class), "digest": {"sha256": hex_of(compiled)}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {
                        "model": version.model,
                        "version": version.version,
                        "versionDigest": version.digest,
                        "deviceClass": device_class.name,
                        "target": target.name,
                        "precision": recipe.precision,
                        "recipe": recipe.as_dict(),
                    },
                    "internalParameters": {"key": key},
                    "resolvedDependencies": [
                        *({"name": name, "digest": {"sha256": hex_of(digest)}} for name, digest in materials.items()),
                        *({"name": f"toolchain {t.name}", "annotations": {"lock": t.lock_hash}} for t in toolchains),
                        *(
                            {"name": f"program {n}", "annotations": {"version": v}}
                            for toolchain in toolchains
                            for n, v in toolchain.tools.items()
                        ),
                    ],
                },
                "runDetails": {"builder": {"id": f"https://edgefleet.dev/controller/{__version__}"}},
            },
        }
    )


def ml_bom(version: ModelVersion, device_class: DeviceClass, toolchains: Sequence[Toolchain], compiled: str) -> bytes:
    """The CycloneDX 1.6 bill of materials: the compiled network, its source, its data, and the toolchains' packages."""
    name = _name(version, device_class)
    kind = "classification" if version.output_kind == "classification" else "other"
    data = [("calibration", version.calibration), ("holdout", version.holdout), ("golden", version.golden)]
    data += [("training", version.training)] if version.training is not None else []
    packages = sorted({package for toolchain in toolchains for package in toolchain.packages.items()})
    return _json(
        {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, compiled + device_class.name)}",
            "version": 1,
            "metadata": {
                "component": {
                    "type": "machine-learning-model",
                    "bom-ref": "model",
                    "name": name,
                    "version": version.version,
                    "hashes": [{"alg": "SHA-256", "content": hex_of(compiled)}],
                    "modelCard": {
                        "modelParameters": {
                            "task": kind,
                            "datasets": [{"ref": f"data:{split}"} for split, _ in data],
                            "inputs": [{"format": f"{t.datatype} {list(t.shape)}"} for t in version.inputs],
                            "outputs": [{"format": f"{t.datatype} {list(t.shape)}"} for t in version.outputs],
                        }
                    },
                }
            },
            "components": [
                {
                    "type": "machine-learning-model",
                    "bom-ref": "source",
                    "name": version.model,
                    "version": version.version,
                    "hashes": [{"alg": "SHA-256", "content": hex_of(version.network)}],
                },
                *(
                    {
                        "type": "data",
                        "bom-ref": f"data:{split}",
                        "name": f"{split} data, {part.count} samples",
                        "hashes": [{"alg": "SHA-256", "content": hex_of(part.digest)}],
                    }
                    for split, part in data
                ),
                *(
                    {
                        "type": "library",
                        "bom-ref": f"pkg:pypi/{n}@{v}",
                        "name": n,
                        "version": v,
                        "purl": f"pkg:pypi/{n}@{v}",
                        "scope": "excluded",
                    }
                    for n, v in packages
                ),
            ],
            "dependencies": [
                {
                    "ref": "model",
                    "dependsOn": [
                        "source",
                        *(f"data:{s}" for s, _ in data),
                        *(f"pkg:pypi/{n}@{v}" for n, v in packages),
                    ],
                }
            ],
        }
    )


def _name(version: ModelVersion, device_class: DeviceClass) -> str:
    return f"{version.model}-{version.version}-{device_class.name}"


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
