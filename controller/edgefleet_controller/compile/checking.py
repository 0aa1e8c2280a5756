"""Stage 2, compile: what a worker hands in. Receives its result and what was asked, hands on the artifact's row, or an error.

A worker is a machine of its own: what it compiled is believed as far as a release signer who looks at the report believes it, but what can be
told from the manifests alone is held against them here. A result can't loosen the contract that boards hold it against, claim to be
another version, or name bytes that are not there.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from edgefleet_shared import golden
from edgefleet_shared.artifact import GOLDEN_LAYER, MODEL_LAYER, QUALITY_LAYER, Layout, Manifest, ModelConfig
from edgefleet_shared.errors import ArtifactError, TrustError
from edgefleet_shared.malformed import MALFORMED
from safetensors.numpy import load

from edgefleet_controller.compile import packing, quality
from edgefleet_controller.compile.port import MAX_BLOB_BYTES, CompileResult, target_named
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.manifests.files import parse_value
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.store.tables import Artifact

MAX_QUALITY_BYTES = 1024 * 1024
MAX_GOLDEN_BYTES = 1 << 30  # as a board takes them
_QUALITY = msgspec.json.Decoder(dict[str, Any])
_REPEATED = ("samples", "agreement", "cosine", "sqnr_db", "float_bytes", "compiled_bytes", "engine", "engine_version")


def checked(
    result: CompileResult,
    version: ModelVersion,
    manifest: str,
    layout: Layout,
    now: float,
    *,
    despite_quality: bool,
    by: str,
) -> Artifact:
    """A result that is what was asked for, as the row that is stored of it.

    Args:
        manifest: the device class's, as JSON.
        layout: where the artifact's and the report's blobs are by now.
        despite_quality: whether the job asked for what misses its budgets, too.
        by: the worker's name; empty for the controller's own.

    Raises:
        ArtifactError, NotFoundError: bytes that are missing, or not what their digest says.
        TrustError: an artifact for something else, with another contract, other golden pictures, or other figures than it says.
    """
    device_class = parse_value(msgspec.json.decode(manifest))
    assert isinstance(device_class, DeviceClass)
    if (result.model, result.version, result.device_class) != (version.model, version.version, device_class.name):
        raise TrustError(
            "result", f"it is of {result.model} {result.version} for {result.device_class}, not what was asked"
        )
    config = whole(result.artifact.digest, layout)
    found = layout.manifest(result.artifact.digest)
    target = target_named(device_class.target)
    asked = packing.config(version, device_class, target, config.precision)
    for field in asked.__struct_fields__:
        if field not in ("chunks", "statistics") and getattr(config, field) != getattr(asked, field):
            raise TrustError("result", f"the artifact's {field} is not what the manifests ask for")
    agreement, accuracy = result.figures.agreement, device_class.spec.accuracy
    # What no compiler can run the board alone judges (ADR 0013).
    short = [] if agreement is None else quality.inaccuracies(result.figures, accuracy)
    enough = not target.runs_here if agreement is None else not short
    if not despite_quality and (result.quality != "passed" or not enough):
        why = "; ".join(short) or f"agreement {agreement}, budget {accuracy.min_agreement}"
        raise TrustError("result", f"{why}: that was not to be shipped")
    _same_pictures(found, config, version, layout)
    _same_figures(found, result, layout)
    for name, digest in (("report", result.report), ("page", result.page)):
        if not layout.has(digest):
            raise ArtifactError(f"the {name} {digest} is missing")
    told = {"seconds": result.seconds, "cached": result.cached, "compiled_by": by or "controller"}
    return _row(result, told, layout.path(result.artifact.digest).stat().st_size, found, config, now)


def whole(digest: str, layout: Layout) -> ModelConfig:
    """The config of an artifact that is here to the last byte.

    Raises:
        ArtifactError, NotFoundError
    """
    manifest = layout.manifest(digest)
    for blob in manifest.blobs():
        layout.check(blob)
    return layout.config(manifest)


def _same_pictures(manifest: Manifest, config: ModelConfig, version: ModelVersion, layout: Layout) -> None:
    """Boards prove themselves on the version's own golden pictures, not on some that suit the artifact."""
    content = layout.read(manifest.layer(GOLDEN_LAYER).digest, MAX_GOLDEN_BYTES)
    have, references = golden.unpack(content, None)
    want = load(layout.read(version.golden.digest, MAX_BLOB_BYTES))
    if have.keys() != want.keys() or not all(np.array_equal(have[name], want[name]) for name in want):
        raise TrustError("result", "the artifact's golden pictures are not the version's")
    if references.keys() != {spec.name for spec in version.outputs}:
        raise TrustError("result", "the artifact's reference answers are not of the version's outputs")
    vectors, classification = golden.unpack(content, version.encoding), version.output_kind == "classification"
    if config.statistics != golden.statistics(*vectors, classification=classification):
        raise TrustError("result", "the artifact's statistics are not those of its golden pictures")


def _same_figures(manifest: Manifest, result: CompileResult, layout: Layout) -> None:
    try:
        told = _QUALITY.decode(layout.read(manifest.layer(QUALITY_LAYER).digest, MAX_QUALITY_BYTES))
    except MALFORMED as exc:
        raise ArtifactError(f"the artifact's quality layer can't be read: {exc}") from exc
    differing = [name for name in _REPEATED if told.get(name) != getattr(result.figures, name)]
    if differing or result.figures.compiled_bytes != manifest.layer(MODEL_LAYER).size:
        raise TrustError("result", f"its figures are not the artifact's: {', '.join(differing) or 'compiled_bytes'}")


def _row(
    result: CompileResult,
    told: dict[str, Any],
    manifest_bytes: int,
    manifest: Manifest,
    config: ModelConfig,
    now: float,
) -> Artifact:
    figures = msgspec.to_builtins(result.figures)
    timings = {key: figures.pop(key) for key in list(figures) if key.endswith("_ms")}
    timings |= told
    quality = figures | {
        "verdict": result.quality, "misses": list(result.misses), "key": result.key, "recipe": result.recipe,
        "precision": result.precision, "why": result.why, "cautions": list(result.cautions), "candidates": result.candidates, "report": result.report,
        "page": result.page,
    }  # fmt: skip
    return Artifact(
        manifest=result.artifact.digest,
        model=result.model,
        version=result.version,
        device_class=result.device_class,
        manifest_bytes=manifest_bytes,
        size_bytes=manifest_bytes + sum(blob.size for blob in manifest.blobs()),
        swap=config.swap,
        state="compiled",
        requirement=msgspec.json.encode(config.requires).decode(),
        quality=msgspec.json.encode(quality).decode(),
        timings=msgspec.json.encode(timings).decode(),
        created_at=now,
    )
