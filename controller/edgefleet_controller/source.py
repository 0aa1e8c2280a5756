"""Stage 1, source: receives a Model manifest with its network's file and pictures, hands on an immutable model version.

Runs on the operator's side, where the files are. What it hands on is content-addressed: a :class:`ModelVersion` names its
blobs (network, calibration, held-out and golden data) by digest, and its own digest is the sha256 of its JSON.
The network is ONNX: Keras and TFLite are converted (:mod:`.converters`), published networks come through :mod:`.importers`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
from edgefleet_shared.artifact import Descriptor, Layout, digest_of
from edgefleet_shared.contract import PictureEncoding, TensorSpec
from edgefleet_shared.errors import ArtifactError, DataError, ModelError
from safetensors.numpy import save

from edgefleet_controller import network, pictures, samples_entry
from edgefleet_controller.formats import format_of
from edgefleet_controller.importers import importer
from edgefleet_controller.manifests import Holdout, Model, Output, PictureInput, Pictures, Pruning, Training

SCHEMA = 1
VERSION_TYPE = "application/vnd.edgefleet.version.v1+json"
MIN_TRAINING = 64  # samples below which a pruned network is tuned to them and to nothing else
MAX_NETWORK_BYTES = 2**31 - 1  # protobuf's own limit

Progress = Callable[[str, int, int], None]  # (what is being done, how many done, of how many)


class Split(msgspec.Struct, frozen=True):
    """Stored samples: a safetensors blob with one tensor per input (uint8 N x H x W x C pictures, or encoded float32)."""

    digest: str
    count: int


class AcceptanceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What every board must show on the golden data; a device class may override (see the Model manifest)."""

    min_agreement: float
    min_cosine: float
    tolerance_abs: float
    tolerance_rel: float
    min_golden: int


class BoxDecoding(msgspec.Struct, frozen=True, kw_only=True):
    """How the outputs become boxes (see the Model manifest's ``output.detection``)."""

    decoder: Literal["yolov3", "boxes"]
    anchors: tuple[tuple[float, float], ...]
    masks: tuple[tuple[int, ...], ...]
    threshold: float
    nms_iou: float
    match_iou: float


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
    output_kind: Literal["classification", "detection", "text", "segmentation", "raw"]
    encoding: PictureEncoding | None
    labels: tuple[str, ...]
    calibration: Split
    calibration_method: Literal["minmax", "percentile", "entropy", "mse"]
    holdout: Split
    golden: Split
    acceptance: AcceptanceLimits
    options: dict[str, str | int | float | bool] = {}
    detection: BoxDecoding | None = None
    characters: tuple[str, ...] = ()  # of text output, by class less one: class 0 is the blank
    truth: tuple[str, ...] = ()  # of the held-out samples: class numbers, or lines of text
    as_is: str = ""  # digest of the .tflite that it came as, where that is quantized already; the network is then what it means in floats
    pruning: PruningPlan | None = None
    training: Split | None = None  # what a pruned network is tuned on, in place of the calibration samples
    training_truth: tuple[str, ...] = ()  # class numbers

    def encode(self) -> bytes:
        """The JSON that is stored; the same version always gives the same bytes."""
        return msgspec.json.encode(self, order="deterministic")

    @property
    def digest(self) -> str:
        return digest_of(self.encode())


def decode(content: bytes) -> ModelVersion:
    """Read a stored version.

    Raises:
        ArtifactError: not one, or of another schema.
    """
    try:
        version = msgspec.json.decode(content, type=ModelVersion)
    except msgspec.DecodeError as exc:
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
    return tuple(named)


def import_model(
    manifest: Model, base: Path, layout: Layout, *, cache: Path, progress: Progress = lambda *_: None
) -> ModelVersion:
    """Check the network and its data and store them.

    Args:
        base: folder that the manifest's relative paths are relative to.
        layout: where the blobs go, the version's own JSON included.
        cache: where importers keep what they fetch.

    Raises:
        ModelError: the network can't be used as it is; says which part.
        DataError: the pictures can't be used; says which.
        EnvironmentProblem: an importer can't fetch, or the disk is full.
    """
    spec = manifest.spec
    progress("reading the network", 0, 1)
    content, origin, as_is = _network(manifest, base, cache, progress)
    model = network.fix_shapes(network.load(content, origin), spec.sizes, origin)
    inputs = network.specs(network.graph_inputs(model), origin)
    outputs = network.specs(model.graph.output, origin)
    for tensor in inputs:
        if not tensor.shape or tensor.shape[0] != 1:
            raise ModelError(
                f"{origin}: input {tensor.name!r} has shape {tensor.shape}; its first dimension must be a batch of 1",
                hint="give the batch dimension the size 1 under spec.sizes, or export with batch 1",
            )
    picture = _picture_input(spec.inputs, inputs, origin)
    labels = _labels(manifest, base, outputs, origin)
    detection, characters = _detection(spec.output, outputs, origin), _characters(manifest, base, outputs, origin)
    progress("reading the network", 1, 1)

    splits = []
    for name, source in (("calibration", spec.calibration), ("holdout", spec.holdout), ("golden", spec.golden)):
        splits.append(_samples(name, source, base, picture, inputs, progress))
    if len(splits[2]) < spec.acceptance.min_golden:
        raise DataError(f"golden: {len(splits[2])} samples, acceptance.min_golden wants {spec.acceptance.min_golden}")
    pictures.keep_apart(splits, _encoding(picture))
    truth = _truth(spec.holdout, spec.output.kind, base, labels, outputs, len(splits[1]))
    trained = _training(spec.prune, spec.output.kind, base, picture, inputs, labels, outputs, splits, progress)

    progress("storing", 0, 1)
    stored = [Split(layout.put(bytes(save(s.inputs))).digest, len(s)) for s in splits]
    version = ModelVersion(
        schema=SCHEMA,
        model=manifest.name,
        version=spec.version,
        network=layout.put(model.SerializeToString(deterministic=True)).digest,
        inputs=inputs,
        outputs=outputs,
        output_kind=spec.output.kind,
        encoding=_encoding(picture),
        labels=labels,
        calibration=stored[0],
        calibration_method=spec.calibration.method,
        holdout=stored[1],
        golden=stored[2],
        acceptance=AcceptanceLimits(**spec.acceptance.model_dump()),
        options=dict(sorted(spec.options.items())),
        detection=detection,
        characters=characters,
        truth=truth,
        as_is="" if as_is is None else layout.put(as_is).digest,
        pruning=_plan(spec.prune),
        training=Split(layout.put(bytes(save(trained[0].inputs))).digest, len(trained[0])) if trained else None,
        training_truth=trained[1] if trained else (),
    )
    store(version, layout)
    progress("storing", 1, 1)
    return version


def _network(manifest: Model, base: Path, cache: Path, progress: Progress) -> tuple[bytes, str, bytes | None]:
    """(ONNX, what to call it, the .tflite that it was where that is quantized already)."""
    source = manifest.spec.source
    if source.importer is not None:
        return importer(source.importer)(cache), source.importer, None
    path = base / (source.path or "")
    kind = format_of(path)
    if kind != "onnx":
        from edgefleet_controller.converters import to_onnx  # compiling, which it is a part of, knows versions

        try:
            converted = to_onnx(path, kind, cache, progress)
        except ModelError as exc:
            raise ModelError(f"{path}: {exc.message}", hint=exc.hint) from exc
        return converted.onnx, str(path), converted.as_is
    if path.stat().st_size > MAX_NETWORK_BYTES:
        raise ModelError(f"{path} is larger than an ONNX file can be")
    return path.read_bytes(), str(path), None


def _picture_input(
    given: list[PictureInput], inputs: tuple[TensorSpec, ...], origin: str
) -> tuple[PictureInput, TensorSpec] | None:
    """The picture input with its tensor, checked against each other; ``None`` where the inputs are plain tensors."""
    if not given:
        return None
    picture = given[0]
    if [tensor.name for tensor in inputs] != [picture.name]:
        raise ModelError(
            f"{origin} has the inputs {', '.join(t.name for t in inputs)}; the manifest names {picture.name!r}"
        )
    tensor = inputs[0]
    channels = 1 if picture.colour == "GREY" else 3
    axis = 1 if picture.layout == "NCHW" else 3
    if len(tensor.shape) != 4 or tensor.shape[axis] != channels:
        raise ModelError(
            f"{origin}: input {tensor.name!r} has shape {tensor.shape}, which is not {picture.layout} with {channels} channels ({picture.colour})"
        )
    if tensor.datatype != "FP32":
        raise ModelError(f"{origin}: picture input {tensor.name!r} is {tensor.datatype}, expected FP32")
    return picture, tensor


def _encoding(picture: tuple[PictureInput, TensorSpec] | None) -> PictureEncoding | None:
    if picture is None:
        return None
    given, _ = picture
    return PictureEncoding(mean=tuple(given.mean), std=tuple(given.std), layout=given.layout, colour=given.colour)


def _labels(manifest: Model, base: Path, outputs: tuple[TensorSpec, ...], origin: str) -> tuple[str, ...]:
    output = manifest.spec.output
    if output.kind == "classification" and (len(outputs) != 1 or len(outputs[0].shape) < 2):
        raise ModelError(
            f"{origin} has the outputs {', '.join(f'{o.name} {o.shape}' for o in outputs)}; a classifier has one, batch x classes",
            hint="use output kind raw",
        )
    if output.labels is None:
        return ()
    path = base / output.labels
    try:
        labels = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"can't read the labels {path}: {exc}") from exc
    if output.kind == "classification" and len(labels) != outputs[0].shape[-1]:
        raise DataError(f"{path} has {len(labels)} labels, {origin} has {outputs[0].shape[-1]} classes")
    return labels


def _detection(output: Output, outputs: tuple[TensorSpec, ...], origin: str) -> BoxDecoding | None:
    """The decoding of boxes, checked against the outputs."""
    given = output.detection
    if given is None:
        return None
    wanted = len(given.masks) if given.decoder == "yolov3" else 2
    shapes = ", ".join(f"{o.name} {o.shape}" for o in outputs)
    if len(outputs) != wanted:
        raise ModelError(f"{origin} has the outputs {shapes}; decoder {given.decoder} as described takes {wanted}")
    for tensor, mask in zip(outputs, given.masks, strict=False):
        if given.decoder == "yolov3" and (
            len(tensor.shape) != 4 or tensor.shape[1] % len(mask) or tensor.shape[1] // len(mask) < 6
        ):
            raise ModelError(
                f"{origin}: output {tensor.name} {tensor.shape} does not hold {len(mask)} anchors of 5 + classes"
            )
    if given.decoder == "boxes" and (
        outputs[0].shape[-1] != 4 or len(outputs[0].shape) != 3 or len(outputs[1].shape) != 3
    ):
        raise ModelError(
            f"{origin} has the outputs {shapes}; expected boxes, batch x N x 4, and scores, batch x N x classes"
        )
    return BoxDecoding(
        decoder=given.decoder, anchors=tuple((a[0], a[1]) for a in given.anchors), masks=tuple(tuple(mask) for mask in given.masks),
        threshold=given.threshold, nms_iou=given.nms_iou, match_iou=given.match_iou,
    )  # fmt: skip


def _characters(manifest: Model, base: Path, outputs: tuple[TensorSpec, ...], origin: str) -> tuple[str, ...]:
    text = manifest.spec.output.text
    if text is None:
        return ()
    path = base / text.characters
    try:
        # Not splitlines: it also splits at characters that an alphabet may hold.
        found = [line.rstrip("\r") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"can't read the characters {path}: {exc}") from exc
    found += [" "] if text.space else []
    classes = outputs[0].shape[-1]
    if len(outputs) != 1 or len(outputs[0].shape) != 3 or len(found) + 1 != classes:
        shapes = ", ".join(f"{o.name} {o.shape}" for o in outputs)
        raise DataError(
            f"{path} has {len(found)} characters, space included; with the blank they don't fit {origin}'s outputs {shapes}"
        )
    return tuple(found)


def _truth(
    samples: Holdout | Training,
    kind: str,
    base: Path,
    labels: tuple[str, ...],
    outputs: tuple[TensorSpec, ...],
    count: int,
) -> tuple[str, ...]:
    """The right answers of labelled samples; classes by number."""
    if samples.truth is None:
        return ()
    path = base / samples.truth
    try:
        lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"can't read the truth {path}: {exc}") from exc
    if len(lines) < count or (samples.count is None and len(lines) != count):
        raise DataError(f"{path} has {len(lines)} lines, there are {count} samples")
    if kind == "text":
        return tuple(lines[:count])
    classes, numbers = outputs[0].shape[-1], {label: str(i) for i, label in enumerate(labels)}
    found = tuple(numbers.get(line.strip(), line.strip()) for line in lines[:count])
    for number, answer in enumerate(found, 1):
        if not answer.isdecimal() or int(answer) >= classes:
            raise DataError(f"{path}, line {number}: {answer!r} is no label and no number from 0 to {classes - 1}")
    return tuple(str(int(answer)) for answer in found)


def _training(
    prune: Pruning | None, kind: str, base: Path, picture: tuple[PictureInput, TensorSpec] | None, inputs: tuple[TensorSpec, ...],
    labels: tuple[str, ...], outputs: tuple[TensorSpec, ...], splits: list[pictures.Samples], progress: Progress,
) -> tuple[pictures.Samples, tuple[str, ...]] | None:  # fmt: skip
    """What a pruned network is tuned on, with its labels; None where that is the calibration samples, or nothing is pruned.

    Calibration samples may be among them, held-out and golden ones may not: they judge.
    """
    if prune is None:
        return None
    calibration, holdout, golden = splits
    given = prune.training
    samples = calibration if given is None else _samples("training", given, base, picture, inputs, progress)
    if len(samples) < MIN_TRAINING:
        raise DataError(
            f"{samples.split}: {len(samples)} samples, pruning needs at least {MIN_TRAINING} to tune and judge the network with",
            hint="name more under spec.prune.training, or leave spec.prune away",
        )
    if given is None:
        return None
    pictures.keep_apart([samples, holdout, golden], _encoding(picture))
    return samples, _truth(given, kind, base, labels, outputs, len(samples))


def _plan(prune: Pruning | None) -> PruningPlan | None:
    return None if prune is None else PruningPlan(**prune.model_dump(exclude={"training"}))


def _samples(
    split: str,
    source: Pictures,
    base: Path,
    picture: tuple[PictureInput, TensorSpec] | None,
    inputs: tuple[TensorSpec, ...],
    progress: Progress,
) -> pictures.Samples:
    size = None
    if picture is not None:
        given, tensor = picture
        height, width = tensor.shape[2:4] if given.layout == "NCHW" else tensor.shape[1:3]
        size = (height, width, 1 if given.colour == "GREY" else 3)
    if source.entry is not None:
        progress(f"running {source.entry} for {split} samples", 0, 1)
        with tempfile.TemporaryDirectory(prefix="edgefleet-samples-") as temporary:
            written = Path(temporary) / "samples.safetensors"
            samples_entry.write(split, base, source.entry, source.count, written)
            return pictures.read_tensors(split, written, inputs, source.count, pictures=size)
    path = base / (source.path or "")
    if path.suffix == ".safetensors":
        return pictures.read_tensors(split, path, inputs, source.count, pictures=size)
    if picture is None or size is None:
        raise DataError(
            f"{split}: {path} is a folder of pictures but the manifest describes no picture input",
            hint="describe it under spec.inputs, or give a .safetensors file",
        )
    return pictures.read_folder(
        split, path, height=size[0], width=size[1], grey=given.colour == "GREY", fit=pictures.Fit(given.fit, given.resize, given.fill),
        count=source.count, input_name=tensor.name, progress=lambda done, total: progress(f"reading {split} pictures", done, total),
    )  # fmt: skip
