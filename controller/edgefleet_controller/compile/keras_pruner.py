"""Stage 2, compile: pruning by tfmot, carried out. Receives a version that came from Keras, with a plan, hands on pruned Keras networks in the cache.

The same steps, the same judges and the same end as for every network (:mod:`.pruner`); only what trains is another: tfmot, over the file that the
version came as. It zeros single weights and takes no channels. What comes out is compiled by TensorFlow's own converter (:mod:`.originals`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from edgefleet_shared.errors import ModelError

from edgefleet_controller.compile import originals
from edgefleet_controller.compile.cache import content_key
from edgefleet_controller.compile.pruner import Pruner
from edgefleet_controller.compile.pruning import Pruned, Step, Tried
from edgefleet_controller.compile.steps import Steps
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion


class KerasPruner(Pruner):
    """As :class:`~.pruner.Pruner`."""

    toolchain, module = originals.TOOLCHAIN, "keras_prune"
    memory_bytes = originals.MEMORY_BYTES

    def __init__(self, steps: Steps, version: ModelVersion, device_class: DeviceClass) -> None:
        super().__init__(steps, version, device_class)
        self._plan = msgspec.structs.replace(self._plan, structured=0.0)

    def run(self) -> Pruned:
        """As :meth:`.pruner.Pruner.run`.

        Raises:
            ModelError: also where there are no layers, or only channels are to go.
        """
        if not self._plan.unstructured:
            raise ModelError("tfmot zeros single weights only, and prune.unstructured is 0")
        if self._version.original is None or self._version.original.format == "saved-model":
            raise ModelError(
                "a SavedModel is a graph without layers, and tfmot prunes layers", hint="add the .keras file"
            )
        return super().run()

    def _networks(self, staged: Path, step: Step, before: Tried | None) -> dict[str, Any]:
        original = self._version.original
        assert original is not None
        return {
            "original": str(self._steps.layout.checked_path(original.digest)),
            "format": original.format,
            "before": str(self._steps.simplified(before.key).parent / originals.KERAS_FILE) if before else None,
            "from": before.step.unstructured if before else 0.0,
            "inputs": [spec.name for spec in self._version.inputs],
            "pruned": str(staged / originals.KERAS_FILE),
            "onnx": str(staged / "network.onnx"),
        }

    def _source(self) -> str:
        return content_key("tfmot", super()._source(), originals.key(self._version))
