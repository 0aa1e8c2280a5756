"""Stage 1, source: receives a Model manifest with its network's file and pictures, hands on an immutable model version.

Runs on the operator's side, where the files are. What it hands on is content-addressed: a :class:`ModelVersion` names its
blobs (network, calibration, held-out and golden data) by digest, and its own digest is the sha256 of its JSON.
The network is ONNX: Keras and TFLite are converted (:mod:`.converters`), published networks come through :mod:`.importers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import onnx
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import OutputTolerance, TensorSpec, picture_size
from edgefleet_shared.errors import DataError, ModelError
from safetensors.numpy import save

from edgefleet_controller.manifests import Model, ModelAcceptance, PictureInput, Pruning
from edgefleet_controller.model_version import (
    SCHEMA,
    AcceptanceLimits,
    ModelVersion,
    Original,
    PruningPlan,
    Split,
    store,
)
from edgefleet_controller.source import dequantized, network, output_meaning, pictures, sample_sets
from edgefleet_controller.source.converters import original_of, to_onnx
from edgefleet_controller.source.formats import format_of
from edgefleet_controller.source.importers import importer
from edgefleet_controller.source.sample_sets import Progress as Progress


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
    content, origin, as_is, original = _network(manifest, base, cache, progress)
    model = network.fix_shapes(network.load(content, origin), spec.sizes, origin)
    came, ends = model.SerializeToString(deterministic=True), _ends(model, origin)
    is_read = dequantized.in_floats(model)
    if is_read:
        model = network.fix_shapes(model, {}, origin)
    inputs, outputs = _ends(model, origin)
    as_is_engine: Literal["tflite", "onnxruntime"] = "tflite"
    if is_read and (inputs, outputs) == ends:
        as_is, as_is_engine = came, "onnxruntime"
    for tensor in inputs:
        if not tensor.shape or tensor.shape[0] != 1:
            raise ModelError(
                f"{origin}: input {tensor.name!r} has shape {tensor.shape}; its first dimension must be a batch of 1",
                hint="give the batch dimension the size 1 under spec.sizes, or export with batch 1; what has its batch elsewhere, as a recurrent "
                "network's state, wants a Transpose behind the input, and what is the same in every call is better a constant of the network",
            )
    picture = _picture_input(spec.inputs, inputs, origin)
    size = picture_size(inputs[0], sample_sets.encoding(picture)) if len(inputs[0].shape) == 4 else None
    labels = output_meaning.labels(spec.output, base, outputs, origin)
    characters = output_meaning.characters(spec.output, base, outputs, origin)
    detection = output_meaning.detection(spec.output, base, inputs[0], size, outputs, origin)
    masks = output_meaning.masks(spec.output, size, outputs, origin)
    progress("reading the network", 1, 1)

    splits = []
    for name, source in (("calibration", spec.calibration), ("holdout", spec.holdout), ("golden", spec.golden)):
        splits.append(sample_sets.read(name, source, base, picture, inputs, progress))
    if len(splits[2]) < spec.acceptance.min_golden:
        raise DataError(f"golden: {len(splits[2])} samples, acceptance.min_golden wants {spec.acceptance.min_golden}")
    pictures.keep_apart(splits, sample_sets.encoding(picture))
    truth = sample_sets.truth(spec.holdout, spec.output.kind, base, labels, outputs, len(splits[1]))
    trained = sample_sets.training(
        spec.prune, spec.output.kind, base, picture, inputs, labels, outputs, splits, progress
    )

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
        encoding=sample_sets.encoding(picture),
        labels=labels,
        calibration=stored[0],
        calibration_method=spec.calibration.method,
        holdout=stored[1],
        golden=stored[2],
        acceptance=_limits(spec.acceptance, outputs, origin),
        options=dict(sorted(spec.options.items())),
        detection=detection,
        masks=masks,
        characters=characters,
        truth=truth,
        as_is="" if as_is is None else layout.put(as_is).digest,
        as_is_engine=as_is_engine,
        pruning=_plan(spec.prune),
        training=Split(layout.put(bytes(save(trained[0].inputs))).digest, len(trained[0])) if trained else None,
        training_truth=trained[1] if trained else (),
        original=None if original is None else Original(layout.put(original[0]).digest, original[1]),
    )
    store(version, layout)
    progress("storing", 1, 1)
    return version


def _ends(model: onnx.ModelProto, origin: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs)."""
    return network.specs(network.graph_inputs(model), origin), network.specs(model.graph.output, origin)


class _Network(NamedTuple):
    """ONNX, what to call it, the .tflite that it was where that is quantized already, and the Keras or TensorFlow file with its format."""

    onnx: bytes
    origin: str
    as_is: bytes | None = None
    original: tuple[bytes, Literal["keras", "keras-h5", "saved-model"]] | None = None


def _network(manifest: Model, base: Path, cache: Path, progress: Progress) -> _Network:
    source = manifest.spec.source
    if source.importer is not None:
        return _Network(importer(source.importer)(cache), source.importer)
    path = base / (source.path or "")
    kind = format_of(path)
    if kind != "onnx":
        try:
            converted = to_onnx(path, kind, cache, progress)
            original = None if kind == "tflite" else (original_of(path, kind), kind)
        except ModelError as exc:
            raise ModelError(f"{path}: {exc.message}", hint=exc.hint) from exc
        return _Network(converted.onnx, str(path), converted.as_is, original)
    if (size := path.stat().st_size) > network.MAX_NETWORK_BYTES:
        raise ModelError(
            f"{path} is larger than an ONNX file can be: {size / 1e9:.1f} GB, at most {network.MAX_NETWORK_BYTES / 1e9:.1f}"
        )
    return _Network(path.read_bytes(), str(path))


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


def _limits(given: ModelAcceptance, outputs: tuple[TensorSpec, ...], origin: str) -> AcceptanceLimits:
    """What boards are held to, with tolerances of outputs that there are."""
    names = [output.name for output in outputs]
    for name in given.outputs:
        if name not in names:
            raise ModelError(f"{origin} has the outputs {', '.join(names)}; acceptance.outputs names {name!r}")
    own = tuple(OutputTolerance(name, t.tolerance_abs, t.tolerance_rel) for name, t in sorted(given.outputs.items()))
    return AcceptanceLimits(**given.model_dump(exclude={"outputs"}), outputs=own)


def _plan(prune: Pruning | None) -> PruningPlan | None:
    return None if prune is None else PruningPlan(**prune.model_dump(exclude={"training"}))
