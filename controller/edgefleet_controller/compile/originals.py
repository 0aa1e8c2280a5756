"""Stage 2, compile: candidates that TensorFlow's own converter makes. Receives a version that came from Keras or TensorFlow, hands on what their
step needs: its toolchain, its share of the cache's key, its request. The work is in ``children/tensorflow_converter.py`` (ADR 0016).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgefleet_shared.artifact import Layout

from edgefleet_controller.compile.environments import lock_named
from edgefleet_controller.compile.port import Target
from edgefleet_controller.compile.recipe import TENSORFLOW, Recipe
from edgefleet_controller.model_version import ModelVersion

TOOLCHAIN, MODULE = "keras", "tensorflow_converter"
MEMORY_BYTES = 8 * 1024**3  # of the child: a file that makes TensorFlow eat more costs its candidate
KERAS_FILE = "model.keras"  # of a pruned network in the cache, beside its ONNX


def offered(target: Target, version: ModelVersion) -> bool:
    """Whether the target takes what TensorFlow's converter makes, and the version has a file for it."""
    return TENSORFLOW in target.quantizers and version.original is not None


def key(version: ModelVersion) -> tuple[str, ...]:
    """What, beyond the network, decides such a candidate's bytes."""
    if version.original is None:
        return ()
    return (version.original.digest, version.original.format, lock_named(TOOLCHAIN).hash)


def request(version: ModelVersion, layout: Layout, pruned: Path | None, jobs: dict[Path, Recipe]) -> dict[str, Any]:
    """To the child, but for the calibration samples.

    Args:
        pruned: the folder of a pruned network in the cache; None: the network as it came.
        jobs: recipes by the file to write.
    """
    assert version.original is not None
    return {
        "action": "compile",
        "original": str(layout.checked_path(version.original.digest) if pruned is None else pruned / KERAS_FILE),
        "format": version.original.format if pruned is None else "keras",
        "inputs": [spec.name for spec in version.inputs],
        "outputs": [spec.name for spec in version.outputs],
        "jobs": [{"recipe": recipe.as_dict(), "compiled": str(file)} for file, recipe in jobs.items()],
    }
