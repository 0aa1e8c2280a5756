"""Stage 2, compile: pruning, carried out. Receives a version with a plan, hands on pruned networks in the cache and how each was judged.

Every step is a child process in the toolchain of torch, and cached by all that decides it: what it starts from, the samples, the step, the
toolchain, the code. Its network is then judged outside of torch, by onnxruntime, on training samples that are set aside: never on the
held-out ones, which judge the candidates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from edgefleet_shared import golden
from edgefleet_shared.segmentation import class_axis
from safetensors.numpy import load, load_file

from edgefleet_controller.compile import pruning, quality, writing
from edgefleet_controller.compile.cache import content_key
from edgefleet_controller.compile.port import MAX_BLOB_BYTES, Figures
from edgefleet_controller.compile.pruning import Pruned, Step, Tried
from edgefleet_controller.compile.steps import PREPARE, Steps
from edgefleet_controller.manifests import Accuracy, DeviceClass
from edgefleet_controller.model_version import ModelVersion

TOOLCHAIN, MODULE = "pruning", "prune"
SET_ASIDE = 5  # one sample in so many judges and is not trained on
MOST_SET_ASIDE = 4000
AXES = {"classification": -1, "text": -1}  # of the distribution that an output is, by its kind


def _axis(version: ModelVersion) -> int | None:
    """Of the distribution that each output is; None where outputs are plain values."""
    if version.output_kind != "segmentation":
        return AXES.get(version.output_kind)
    axes = {class_axis(spec, version.masks) for spec in version.outputs}
    return axes.pop() if len(axes) == 1 else None


class Pruner:
    """Prunes one version, for the accuracy that one class asks for. What trains, and in which form, is a subclass's to say
    (:mod:`.keras_pruner`); this one trains the ONNX network in torch."""

    toolchain, module = TOOLCHAIN, MODULE
    memory_bytes: int | None = None  # of a child

    def __init__(self, steps: Steps, version: ModelVersion, device_class: DeviceClass) -> None:
        assert version.pruning is not None
        self._steps, self._version, self._class = steps, version, device_class
        self._plan, self._split = version.pruning, version.training or version.calibration
        self._toolchain = steps.toolchain(self.toolchain)
        # Rows in a fixed, even pattern: samples in order of their labels, or of their camera, are common.
        every = max(SET_ASIDE, -(-self._split.count // MOST_SET_ASIDE))
        self._aside = np.arange(0, self._split.count, every)
        self._trained_on = np.setdiff1d(np.arange(self._split.count), self._aside)

    def run(self) -> Pruned:
        """Take steps until the target is reached, or the accuracy does not come back.

        Raises:
            ModelError: a network that can't be pruned. ToolchainError, Cancelled.
        """
        done: list[Tried] = []
        while (step := pruning.following(self._plan, done)) is not None:
            done.append(self._take(step, done))
        return pruning.ended(done)

    def _take(self, step: Step, done: list[Tried]) -> Tried:
        before = done[-1] if done else None
        came_from = before.key if before else ""
        key = content_key("prune", self._source(), came_from, msgspec.to_builtins(step), self._toolchain.lock_hash)
        folder = self._steps.once("pruned", key, lambda staged: self._prune(staged, step, before))
        left, of = json.loads((folder / "weights.json").read_text())
        outputs, version = load_file(folder / "answers.safetensors"), self._judged_by()
        found = quality.compare(outputs, load_file(self._answers() / "answers.safetensors"), version)
        figures = Figures(
            engine=PREPARE[0],
            engine_version="",
            float_bytes=0,
            compiled_bytes=0,
            samples=len(self._aside),
            **found.figures,
        )
        shares = figures.shares
        return Tried(
            step=step, key=key, sparsity=1 - left / of, agreement=figures.agreement or 0.0,
            accuracy=shares["accuracy"].value if "accuracy" in shares else None,
            float_accuracy=shares["float_accuracy"].value if "float_accuracy" in shares else None,
            misses=tuple(quality.inaccuracies(figures, self._budget())),
        )  # fmt: skip

    def _prune(self, staged: Path, step: Step, before: Tried | None) -> None:
        """Fill a cache folder: ``network.onnx``, ``weights.json`` (left, of) and its ``answers.safetensors`` to the samples set aside."""
        plan, work = self._plan, self._steps.work
        rows, truth = work / "rows.json", work / "truth.json"
        rows.write_text(json.dumps(self._trained_on.tolist()))
        if labelled := bool(self._version.training_truth):
            truth.write_text(json.dumps([int(self._version.training_truth[row]) for row in self._trained_on]))
        found = self._steps.prune(self._toolchain, self.module, {
            **self._networks(staged, step, before),
            "samples": str(self._steps.layout.checked_path(self._split.digest)),
            "rows": str(rows),
            "truth": str(truth) if labelled else None,
            "encoding": msgspec.to_builtins(self._version.encoding),
            "axis": _axis(self._version),
            "unstructured": step.unstructured,
            "epochs": plan.epochs, "learning_rate": plan.learning_rate, "batch": plan.batch,
            "seed": plan.seed + step.number + 1000 * step.again,
        }, self.memory_bytes)  # fmt: skip
        (staged / "weights.json").write_text(json.dumps([found["weights"], found["of"]]))
        self._answer(staged / "network.onnx", staged / "answers.safetensors")

    def _networks(self, staged: Path, step: Step, before: Tried | None) -> dict[str, Any]:
        """To the child: the networks that it reads and writes."""
        return {
            "teacher": str(self._steps.simplified()),
            "network": str(self._steps.simplified(before.key if before else "")),
            "pruned": str(staged / "network.onnx"),
            "structured": None if step.again else step.structured,
        }

    def _answers(self) -> Path:
        """The float network's answers to the samples set aside."""
        key = content_key("answers", self._source())
        return self._steps.once(
            "answers", key, lambda staged: self._answer(self._steps.simplified(), staged / "answers.safetensors")
        )

    def _answer(self, network: Path, outputs: Path) -> None:
        self._steps.answer(network, self._set_aside(), len(self._aside), outputs)

    def _set_aside(self) -> Path:
        path = self._steps.work / "set-aside.safetensors"
        if not path.exists():
            tensors = load(self._steps.layout.read(self._split.digest, MAX_BLOB_BYTES))
            writing.write_tensors({name: self._encoded(array[self._aside]) for name, array in tensors.items()}, path)
        return path

    def _encoded(self, array: Any) -> Any:
        encoding = self._version.encoding
        if encoding is None or array.dtype != np.uint8:
            return np.ascontiguousarray(array)
        return golden.encode_pictures(array, encoding)

    def _judged_by(self) -> ModelVersion:
        """The version with the labels of the samples set aside in place of the held-out ones'."""
        truth = self._version.training_truth
        return msgspec.structs.replace(self._version, truth=tuple(truth[row] for row in self._aside) if truth else ())

    def _budget(self) -> Accuracy:
        asked = self._class.spec.accuracy
        return asked if self._plan.max_loss is None else asked.model_copy(update={"max_loss": self._plan.max_loss})

    def _source(self) -> str:
        """What all steps depend on."""
        plan = msgspec.to_builtins(self._plan) | {
            "structured": 0,
            "unstructured": 0,
            "steps": 0,
        }  # in each step, or judge it
        return content_key(
            self._steps.prepared_key, self._split.digest, self._version.training_truth, self._version.output_kind, plan
        )
