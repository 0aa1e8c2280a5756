"""Stage 2, compile: receives a model version and a device class, hands on a signed-ready artifact with its quality report.

::

    version ──prepare──▶ simplified network, float reference      (toolchain onnxruntime, cached by content)
            ──compile──▶ compiled model                           (the target's toolchain, cached by key)
            ──measure──▶ outputs, times                           (the class's engine, always anew)
            ──judge────▶ QualityError, or forced by an explicit flag
            ──pack─────▶ OCI artifact

The key covers all that decides the compiled bytes: network, calibration, method, precision, target options, toolchain lock
and the code that drives it. Two classes with the same key (LiteRT on x86 and on Arm) share one compile. The artifact holds
figures that repeat exactly (agreement, cosine, sizes); times differ from run to run and are returned beside it, so that
the same inputs give the same digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from edgefleet_shared.contract import AcceptanceContract, ShadowPlan
from edgefleet_shared.errors import ManifestError, QualityError
from edgefleet_shared.fingerprint import Requirement
from safetensors.numpy import load, load_file, save_file

from edgefleet_controller.compile import provenance, quality
from edgefleet_controller.compile.port import CompileResult, Figures, Options, Target, target_named
from edgefleet_controller.compile.toolchains import ChildDied, Toolchain, Toolchains
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.source import ModelVersion, Split

Progress = Callable[[str, int, int], None]

MAX_BLOB_BYTES = 4 * 1024**3
PREPARE = ("onnxruntime", "ort")  # toolchain and module that simplify and answer for the float reference
HOST_OVERHEAD_BYTES = 128 * 1024 * 1024  # samples, outputs and the float model beside the compiled one while timing
_CHILDREN = Path(__file__).parent / "children"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long each child may take, in seconds."""

    prepare_s: float = 600.0
    compile_s: float = 1800.0
    measure_s: float = 600.0


def compile_version(
    version: ModelVersion,
    device_class: DeviceClass,
    layout: Layout,
    toolchains: Toolchains,
    *,
    cache: Path,
    ship_despite_quality: bool = False,
    progress: Progress = lambda *_: None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> CompileResult:
    """Compile one version for one class, measure it here, and pack it.

    Args:
        layout: holds the version's blobs; the artifact goes in here.
        cache: where compiled models are kept by key.
        ship_despite_quality: pack the artifact although it misses its budgets; the result says so and which.

    Raises:
        QualityError: a budget is missed (each with by how much), or the engine's process died while measuring.
        ModelError: an operator that the target lacks, by node and name.
        ToolchainError: no such target, a toolchain that can't be installed, broke, or ran past its limit; Cancelled.
        ManifestError: the target can't make what the class asks for.
    """
    began = time.monotonic()
    target = target_named(device_class.target)
    options = _check(target, device_class, version)
    toolchain = toolchains.ensure(target.toolchain, progress)
    with tempfile.TemporaryDirectory(prefix="edgefleet-compile-") as temporary:
        job = _Job(
            version,
            device_class,
            target,
            toolchain,
            options,
            layout,
            toolchains,
            cache,
            Path(temporary),
            progress,
            limits,
        )
        prepared = job.prepare()
        compiled, cached = job.compile(prepared)
        figures, misses = job.measure(prepared, compiled)
        misses += quality.misses(figures, device_class.spec)
        if misses and not ship_despite_quality:
            raise QualityError(
                f"{version.model} {version.version} for {device_class.name}: " + "; ".join(misses),
                hint="other calibration pictures or method, or precision fp32; shipping it anyway needs an explicit flag",
            )
        artifact = job.pack(prepared, compiled, figures, misses)
    return CompileResult(
        artifact=artifact,
        model=version.model,
        version=version.version,
        device_class=device_class.name,
        arch=device_class.spec.arch,
        key=job.key,
        cached=cached,
        quality="forced" if misses else "passed",
        misses=tuple(misses),
        figures=figures,
        seconds=round(time.monotonic() - began, 3),
    )


def _check(target: Target, device_class: DeviceClass, version: ModelVersion) -> Options:
    spec = device_class.spec
    if spec.engine != target.engine:
        raise ManifestError(
            f"{device_class.name}: target {target.name} compiles for engine {target.engine}, not {spec.engine}"
        )
    if spec.precision not in target.precisions:
        raise ManifestError(
            f"{device_class.name}: target {target.name} makes no {spec.precision}; it makes {', '.join(sorted(target.precisions))}"
        )
    if spec.precision == "int8" and version.calibration_method not in target.methods:
        raise ManifestError(
            f"{device_class.name}: target {target.name} has no calibration method {version.calibration_method}; "
            f"it has {', '.join(sorted(target.methods))}"
        )
    return target.options(spec, version)


class _Job:
    """One compile under way: the steps of the diagram above, over one temporary folder."""

    def __init__(
        self, version: ModelVersion, device_class: DeviceClass, target: Target, toolchain: Toolchain, options: Options,
        layout: Layout, toolchains: Toolchains, cache: Path, work: Path, progress: Progress, limits: Limits,
    ) -> None:  # fmt: skip
        self._version, self._class, self._target, self._toolchain = version, device_class, target, toolchain
        self._options, self._layout, self._toolchains, self._cache = options, layout, toolchains, cache
        self._work, self._progress, self._limits = work, progress, limits
        self.key = _hash(
            "compile", version.network, version.calibration.digest, version.calibration_method, device_class.spec.precision,
            target.name, options, toolchain.lock_hash, _code(target.module), _encoding(version),
        )  # fmt: skip

    def prepare(self) -> Path:
        """Folder with ``simplified.onnx`` and the float model's answers to held-out and golden samples."""
        toolchain = self._toolchains.ensure(PREPARE[0], self._progress)
        v = self._version
        key = _hash(
            "prepare",
            v.network,
            v.holdout.digest,
            v.golden.digest,
            toolchain.lock_hash,
            _code(PREPARE[1]),
            _encoding(v),
        )
        folder = self._cache / "prepared" / key

        def fill(staged: Path) -> None:
            request = {
                "action": "prepare",
                "network": str(self._layout.path(v.network)),
                "simplified": str(staged / "simplified.onnx"),
                "samples": [self._samples(v.holdout), self._samples(v.golden)],
                "references": [str(staged / "holdout.safetensors"), str(staged / "golden.safetensors")],
            }
            self._toolchains.run(
                toolchain,
                PREPARE[1],
                request,
                self._work,
                self._log(request),
                limit_s=self._limits.prepare_s,
                progress=self._progress,
            )

        _once(folder, fill)
        return folder

    def compile(self, prepared: Path) -> tuple[Path, bool]:
        """(folder with ``compiled`` and, where the engine has its own format, ``float``; whether it was cached)."""
        folder = self._cache / "compiled" / self.key

        def fill(staged: Path) -> None:
            request = {
                "action": "compile",
                "simplified": str(prepared / "simplified.onnx"),
                "calibration": self._samples(self._version.calibration),
                "compiled": str(staged / "compiled"),
                "float": str(staged / "float"),
                "precision": self._class.spec.precision,
                "method": self._version.calibration_method,
                "options": self._options,
            }
            self._toolchains.run(
                self._toolchain, self._target.module, request, self._work, self._log(request), limit_s=self._limits.compile_s,
                progress=self._progress,
            )  # fmt: skip

        return folder, not _once(folder, fill)

    def measure(self, prepared: Path, compiled: Path) -> tuple[Figures, list[str]]:
        """Figures of this run, and what is wrong if the engine did not survive it."""
        own_float = compiled / "float"
        float_model = own_float if own_float.exists() else prepared / "simplified.onnx"
        outputs = self._work / "outputs.safetensors"
        request = {
            "action": "measure",
            "model": str(compiled / "compiled"),
            "float_model": str(float_model) if self._here else None,
            "samples": self._samples(self._version.holdout),
            "outputs": str(outputs),
        }
        base = Figures(
            engine=self._target.engine,
            engine_version=self._toolchain.packages[self._target.engine_package],
            float_bytes=float_model.stat().st_size,
            compiled_bytes=(compiled / "compiled").stat().st_size,
            samples=self._version.holdout.count,
        )
        try:
            measured = self._toolchains.run(
                self._toolchain, self._target.module, request, self._work, self._log(request), limit_s=self._limits.measure_s,
                memory_bytes=self._class.spec.budgets.memory_bytes + HOST_OVERHEAD_BYTES, progress=self._progress,
            )  # fmt: skip
        except ChildDied as exc:
            missing = ("agreement", "latency", "memory")
            return msgspec.structs.replace(base, unmeasured=missing), [f"engine died: {exc.how}"]
        references = load_file(prepared / "holdout.safetensors")
        found = quality.compare(load_file(outputs), references, self._version) | {
            "peak_memory_bytes": measured["peak_memory_bytes"]
        }
        if self._here:
            found |= {
                "p50_ms": measured["compiled_p50_ms"], "p95_ms": measured["compiled_p95_ms"],
                "float_p50_ms": measured["float_p50_ms"], "float_p95_ms": measured["float_p95_ms"],
            }  # fmt: skip
        return msgspec.structs.replace(base, **found, unmeasured=() if self._here else ("latency",)), []

    def pack(self, prepared: Path, compiled: Path, figures: Figures, misses: list[str]) -> Descriptor:
        """Write the artifact; only what repeats exactly goes in."""
        version, model = self._version, compiled / "compiled"
        digest = digest_file(model)
        report = {
            "samples": figures.samples,
            "agreement": figures.agreement,
            "agreement_interval": [figures.agreement_low, figures.agreement_high],
            "cosine": figures.cosine,
            "sqnr_db": figures.sqnr_db,
            "float_bytes": figures.float_bytes,
            "compiled_bytes": figures.compiled_bytes,
            "engine": figures.engine,
            "engine_version": figures.engine_version,
            "budget_agreement": self._class.spec.accuracy.min_agreement,
        }
        inputs = load(self._layout.read(version.golden.digest, MAX_BLOB_BYTES))
        answers = golden.pack(inputs, load_file(prepared / "golden.safetensors"))
        labels: list[tuple[str, bytes | Path]] = (
            [(LABELS_LAYER, msgspec.json.encode(version.labels))] if version.labels else []
        )
        layers: list[tuple[str, bytes | Path]] = [
            (MODEL_LAYER, model),
            *labels,
            (GOLDEN_LAYER, answers),
            (QUALITY_LAYER, json.dumps(report, sort_keys=True).encode()),
            (PROVENANCE_LAYER, provenance.statement(version, self._class, self._target, self._toolchain, self._options, self.key, digest)),
            (MLBOM_LAYER, provenance.ml_bom(version, self._class, self._toolchain, digest)),
        ]  # fmt: skip
        return build(self._layout, self._config(), layers)

    def _config(self) -> ModelConfig:
        version, spec = self._version, self._class.spec
        return ModelConfig(
            schema=SCHEMA,
            model=version.model,
            version=version.version,
            device_class=self._class.name,
            engine=self._target.engine,
            precision=spec.precision,
            inputs=version.inputs,
            outputs=version.outputs,
            requires=Requirement(
                arch=spec.arch,
                engine=spec.engine,
                engine_version=spec.engine_version,
                cpu_features=tuple(sorted(spec.cpu_features)),
                memory_bytes=spec.budgets.memory_bytes,
            ),
            contract=contract(version, self._class, self._target),
            encoding=version.encoding,
            swap=spec.swap,
            power=PowerProfile(governor=spec.power.governor or "", max_clock_mhz=spec.power.max_clock_mhz or 0),
        )

    def _log(self, request: dict[str, Any]) -> Path:
        name = f"{self._version.model}-{self._version.version}-{self._class.name}-{request['action']}.log"
        return self._cache / "logs" / name

    @property
    def _here(self) -> bool:
        """Whether times on this host mean something for the class."""
        return self._class.spec.arch == platform.machine()

    def _samples(self, split: Split) -> str:
        """A split as the network takes it (float32, encoded), as a file in the work folder."""
        path = self._work / f"{split.digest.rpartition(':')[2]}.safetensors"
        if not path.exists():
            tensors = load(self._layout.read(split.digest, MAX_BLOB_BYTES))
            encoding = self._version.encoding
            if encoding is not None:
                # Tensors that came encoded (float) stay as they are; stored pictures are uint8.
                tensors = {
                    k: golden.encode_pictures(a, encoding) if a.dtype == "uint8" else a for k, a in tensors.items()
                }
            save_file(tensors, path)
        return str(path)


def contract(version: ModelVersion, device_class: DeviceClass, target: Target) -> AcceptanceContract:
    """What a board must show: from the manifests alone, never from what was measured of this very model."""
    limits, own, budgets = version.acceptance, device_class.spec.acceptance, device_class.spec.budgets
    return AcceptanceContract(
        kind=version.output_kind,
        min_agreement=limits.min_agreement if own.min_agreement is None else own.min_agreement,
        min_cosine=limits.min_cosine if own.min_cosine is None else own.min_cosine,
        tolerance_abs=limits.tolerance_abs,
        tolerance_rel=limits.tolerance_rel,
        latency_p95_ms=budgets.latency_p95_ms,
        peak_memory_bytes=budgets.memory_bytes,
        allowed_providers=tuple(own.allowed_providers or target.providers),
        max_celsius=own.max_celsius,
        max_watts=budgets.power_watts,
        min_golden=min(limits.min_golden if own.min_golden is None else own.min_golden, version.golden.count),
        warmup_runs=own.warmup_runs,
        timed_runs=own.timed_runs,
        time_limit_s=own.time_limit_s,
        shadow=_shadow(device_class),
    )


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


def _once(folder: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a cache folder in one step; returns whether it had to be filled."""
    if folder.is_dir():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".filling-"))
    try:
        fill(staged)
        try:
            os.replace(staged, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return True


def _code(module: str) -> str:
    """Hash over the child's own code: a better recipe is another key. All modules, as they import each other."""
    state = hashlib.sha256(module.encode())
    for path in sorted(_CHILDREN.glob("*.py")):
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def _encoding(version: ModelVersion) -> str:
    return msgspec.json.encode(version.encoding, order="deterministic").decode()


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
