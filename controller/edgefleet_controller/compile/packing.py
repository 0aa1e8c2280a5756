"""Stage 2, compile: packing. Receives a compiled model with its figures, hands on the OCI artifact.

Only what repeats exactly goes in (agreement, noise, sizes), so that the same inputs give the same digest; times are kept beside it (ADR 0004).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
from edgefleet_shared import golden
from edgefleet_shared.artifact import (
    GOLDEN_LAYER,
    LABELS_LAYER,
    MLBOM_LAYER,
    MODEL_LAYER,
    PROVENANCE_LAYER,
    QUALITY_LAYER,
    SCHEMA,
    Descriptor,
    Layout,
    ModelConfig,
    PowerProfile,
    build,
    digest_file,
)
from edgefleet_shared.contract import AcceptanceContract, BuildBudget, ShadowPlan
from edgefleet_shared.detection import HEADS
from edgefleet_shared.fingerprint import Requirement
from edgefleet_shared.reading import AnswerKind
from safetensors.numpy import load, load_file

from edgefleet_controller.compile import provenance
from edgefleet_controller.compile.port import MAX_BLOB_BYTES, Target
from edgefleet_controller.compile.search import Candidate
from edgefleet_controller.compile.toolchains import Toolchain
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion

TIMED = ("latency", "memory")  # of what may be unmeasured


def pack(
    version: ModelVersion, device_class: DeviceClass, target: Target, toolchains: Sequence[Toolchain], layout: Layout,
    candidate: Candidate, model: Path, answers: Path,
) -> Descriptor:  # fmt: skip
    """Write the artifact.

    Args:
        model: the compiled model.
        answers: the float model's to the golden samples (safetensors, by output name).
    """
    digest = digest_file(model)
    inputs = load(layout.read(version.golden.digest, MAX_BLOB_BYTES))
    labels: list[tuple[str, bytes | Path]] = (
        [(LABELS_LAYER, msgspec.json.encode(version.labels))] if version.labels else []
    )
    vectors = golden.pack(inputs, load_file(answers))
    layers: list[tuple[str, bytes | Path]] = [
        (MODEL_LAYER, model),
        *labels,
        (GOLDEN_LAYER, vectors),
        (QUALITY_LAYER, _quality(candidate, device_class)),
        (PROVENANCE_LAYER, provenance.statement(version, device_class, target, toolchains, candidate.recipe, candidate.key, digest)),
        (MLBOM_LAYER, provenance.ml_bom(version, device_class, toolchains, digest)),
    ]  # fmt: skip
    normal = golden.statistics(
        *golden.unpack(vectors, version.encoding), classification=version.output_kind == "classification"
    )
    said = config(version, device_class, target, candidate.recipe.precision)
    return build(layout, msgspec.structs.replace(said, statistics=normal), layers)


def _quality(candidate: Candidate, device_class: DeviceClass) -> bytes:
    figures = candidate.figures
    report = {
        "samples": figures.samples,
        "agreement": figures.agreement,
        "agreement_interval": [figures.agreement_low, figures.agreement_high],
        "shares": msgspec.to_builtins(figures.shares),
        "by_label": msgspec.to_builtins(figures.by_label),
        "cosine": figures.cosine,
        "sqnr_db": figures.sqnr_db,
        "sqnr_db_by_output": figures.sqnr_db_by_output,
        "float_bytes": figures.float_bytes,
        "compiled_bytes": figures.compiled_bytes,
        "engine": figures.engine,
        "engine_version": figures.engine_version,
        "stand_in": figures.stand_in,
        # What was timed, and where, is no part of the artifact (ADR 0004).
        "unmeasured": [what for what in figures.unmeasured if what not in TIMED],
        "recipe": candidate.recipe.as_dict(),
        "budget_agreement": device_class.spec.accuracy.min_agreement,
    }
    return json.dumps(report, sort_keys=True).encode()


def config(version: ModelVersion, device_class: DeviceClass, target: Target, precision: str) -> ModelConfig:
    """What an artifact says of itself, without its chunks: from the manifests and the precision alone."""
    spec = device_class.spec
    return ModelConfig(
        schema=SCHEMA,
        model=version.model,
        version=version.version,
        device_class=device_class.name,
        engine=target.engine,
        precision=precision,
        inputs=version.inputs,
        outputs=version.outputs,
        requires=Requirement(
            arch=spec.arch,
            engine=spec.engine,
            engine_version=spec.engine_version,
            cpu_features=tuple(sorted(spec.cpu_features)),
            memory_bytes=spec.budgets.memory_bytes,
        ),
        contract=contract(version, device_class, target),
        encoding=version.encoding,
        swap=spec.swap,
        power=PowerProfile(
            governor=spec.power.governor or "",
            max_clock_mhz=spec.power.max_clock_mhz or 0,
            max_wake_us=spec.power.max_wake_us,
        ),
    )


def contract(version: ModelVersion, device_class: DeviceClass, target: Target) -> AcceptanceContract:
    """What a board must show: from the manifests alone, never from what was measured of this very model."""
    limits, own, budgets = version.acceptance, device_class.spec.acceptance, device_class.spec.budgets
    reading = version.reading
    by_value = reading.kind != "classification" and bool(limits.tolerance_abs or limits.tolerance_rel)
    kind: AnswerKind = "raw" if by_value else reading.kind
    return AcceptanceContract(
        kind=kind,
        min_agreement=limits.min_agreement if own.min_agreement is None else own.min_agreement,
        min_cosine=0.0 if _in_no_order(version) else limits.min_cosine if own.min_cosine is None else own.min_cosine,
        tolerance_abs=limits.tolerance_abs,
        tolerance_rel=limits.tolerance_rel,
        tolerances=limits.outputs,
        detection=reading.detection if kind == "detection" else None,
        masks=reading.masks,
        text=reading.text,
        latency_p95_ms=budgets.latency_p95_ms,
        peak_memory_bytes=budgets.memory_bytes,
        allowed_providers=tuple(own.allowed_providers or target.providers),
        max_celsius=own.max_celsius,
        max_watts=budgets.power_watts,
        min_golden=min(limits.min_golden if own.min_golden is None else own.min_golden, version.golden.count),
        warmup_runs=own.warmup_runs,
        timed_runs=own.timed_runs,
        time_limit_s=own.time_limit_s,
        build=_build_budget(device_class),
        shadow=_shadow(device_class),
    )


def _in_no_order(version: ModelVersion) -> bool:
    """Whether an output's rows may change places, which says nothing and leaves no cosine."""
    return version.detection is not None and HEADS[version.detection.decoder].suppressed


def _build_budget(device_class: DeviceClass) -> BuildBudget:
    asked = device_class.spec.build_budget
    return BuildBudget(time_limit_s=asked.time_limit_s, memory_bytes=asked.memory_bytes, disk_bytes=asked.disk_bytes)


def _shadow(device_class: DeviceClass) -> ShadowPlan:
    asked = device_class.spec.shadow
    if asked is None:
        return ShadowPlan()
    return ShadowPlan(
        requests=asked.requests,
        min_agreement=asked.min_agreement,
        max_latency_ratio=asked.max_latency_ratio,
        time_limit_s=asked.time_limit_s,
    )
