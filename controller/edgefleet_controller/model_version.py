"""A model version: all that compiling and judging one network needs. Stage 1 (:mod:`.source.importing`) makes it, every later stage reads it."""

from __future__ import annotations

from typing import Literal

import msgspec
from edgefleet_shared import answers
from edgefleet_shared.answers import Array, Reading
from edgefleet_shared.artifact import Descriptor, Layout, digest_of
from edgefleet_shared.contract import OutputTolerance, PictureEncoding, TensorSpec, picture_size
from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.reading import AnswerKind, BoxDecoding, MaskReading, TextReading

SCHEMA = 1
VERSION_TYPE = "application/vnd.edgefleet.version.v1+json"


class Split(msgspec.Struct, frozen=True):
    """Stored samples: a safetensors blob with one tensor per input (uint8 N x H x W x C pictures, or encoded float32)."""

    digest: str
    count: int


class Original(msgspec.Struct, frozen=True):
    """The file that a network was made into ONNX from, stored: a .keras or .h5 file as it is, a SavedModel's folder as a ZIP archive."""

    digest: str
    format: Literal["keras", "keras-h5", "saved-model"]


class AcceptanceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What every board must show on the golden data; a device class may override (see the Model manifest)."""

    min_agreement: float
    min_cosine: float
    tolerance_abs: float
    tolerance_rel: float
    min_golden: int
    outputs: tuple[OutputTolerance, ...] = ()

    def tolerance(self, output: str) -> tuple[float, float]:
        """(absolute, relative) of an output, by name."""
        own = {one.name: (one.tolerance_abs, one.tolerance_rel) for one in self.outputs}
        return own.get(output, (self.tolerance_abs, self.tolerance_rel))


class PruningPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How the network may be pruned (see the Model manifest's ``prune``)."""

    structured: float
    unstructured: float
    steps: int
    epochs: int
    learning_rate: float
    batch: int
    seed: int
    max_loss: float | None = None


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version of one network with everything that compiling and judging it needs. Immutable."""

    schema: int
    model: str
    version: str
    network: str  # digest of the ONNX with fixed shapes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_kind: AnswerKind
    encoding: PictureEncoding | None
    labels: tuple[str, ...]
    calibration: Split
    calibration_method: Literal["minmax", "percentile", "entropy", "mse"]
    holdout: Split
    golden: Split
    acceptance: AcceptanceLimits
    options: dict[str, str | int | float | bool] = {}
    detection: BoxDecoding | None = None
    masks: MaskReading = MaskReading()  # of a segmentation
    characters: tuple[str, ...] = ()  # of text output, by class less one: class 0 is the blank
    truth: tuple[str, ...] = ()  # of the held-out samples: class numbers, or lines of text
    as_is: str = ""  # digest of the file that it came as, where that is quantized already; the network is then what it means in floats
    as_is_engine: Literal["tflite", "onnxruntime"] = "tflite"  # that runs this file
    pruning: PruningPlan | None = None
    training: Split | None = None  # what a pruned network is tuned on, in place of the calibration samples
    training_truth: tuple[str, ...] = ()  # class numbers
    original: Original | None = None  # of Keras and TensorFlow, whose own converter takes nothing else

    def encode(self) -> bytes:
        """The JSON that is stored; the same version always gives the same bytes."""
        return msgspec.json.encode(self, order="deterministic")

    @property
    def digest(self) -> str:
        return digest_of(self.encode())

    @property
    def reading(self) -> Reading:
        """How outputs become answers."""
        size = picture_size(self.inputs[0], self.encoding) if len(self.inputs[0].shape) == 4 else (-1, -1)
        spaces = tuple(number for number, character in enumerate(self.characters, 1) if character.isspace())
        return Reading(self.output_kind, self.outputs, size, self.detection, self.masks, TextReading(spaces=spaces))

    def label(self, kind: int) -> str:
        """What a class is called: by its number too where another has the same label, as ImageNet has two cranes; by that alone where it has none."""
        if not 0 <= kind < len(self.labels):
            return str(kind)
        label = self.labels[kind]
        return label if self.labels.count(label) == 1 else f"{label} ({kind})"

    def lines(self, outputs: Array) -> list[str]:
        """The lines of text that outputs (N x steps x classes) are."""
        found = answers.lines(outputs, self.reading.text)
        return ["".join(self.characters[kind - 1] for kind in kinds) for kinds in found]


def decode(content: bytes) -> ModelVersion:
    """Read a stored version.

    Raises:
        ArtifactError: not one, or of another schema.
    """
    try:
        version = msgspec.json.decode(content, type=ModelVersion)
    except MALFORMED as exc:
        raise ArtifactError(f"not a model version: {exc}") from exc
    if version.schema != SCHEMA:
        raise ArtifactError(f"model version schema {version.schema} is not known here, this program knows {SCHEMA}")
    return version


def store(version: ModelVersion, layout: Layout) -> Descriptor:
    """Store the version itself; its blobs are already there."""
    stored = layout.put(version.encode())
    return Descriptor(VERSION_TYPE, stored.digest, stored.size)


def blobs(version: ModelVersion) -> tuple[str, ...]:
    """Digests of everything a version names: what must be copied to hold it."""
    named = [version.network, version.calibration.digest, version.holdout.digest, version.golden.digest]
    named += [version.as_is] if version.as_is else []
    named += [version.training.digest] if version.training is not None else []
    named += [version.original.digest] if version.original is not None else []
    return tuple(named)
