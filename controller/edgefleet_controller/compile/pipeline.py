"""Stage 2, compile: receives a model version and a device class, hands on a signed-ready artifact with its quality report.

::

    version ──prepare──▶ simplified network, float reference
            ──search───▶ candidates, each compiled and measured on the class's engine; the best that misses no budget
            ──measure──▶ that one alone: outputs, times, memory (always anew)
            ──judge────▶ QualityError, or forced by an explicit flag
            ──pack─────▶ OCI artifact, and the report beside it

Each step is a child process in a toolchain's environment (:mod:`.steps`); which candidates are tried and which one is chosen is decided in
:mod:`.search`, carried out in :mod:`.finder`, measured in :mod:`.evaluator`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import ManifestError, QualityError
from safetensors.numpy import load_file

from edgefleet_controller.compile import quality, report, search, telling
from edgefleet_controller.compile.boards import Measure
from edgefleet_controller.compile.evaluator import Evaluator
from edgefleet_controller.compile.finder import Finder
from edgefleet_controller.compile.input_check import better_description
from edgefleet_controller.compile.packing import contract, pack
from edgefleet_controller.compile.port import CompileResult, Options, Target, check_class, target_named
from edgefleet_controller.compile.search import Candidate, Choice
from edgefleet_controller.compile.shown import pictures_of
from edgefleet_controller.compile.steps import Limits, Progress, Steps
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.workplace import work_folder
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion


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
    measure: Measure | None = None,
) -> CompileResult:
    """Compile one version for one class, measure it, and pack it.

    Args:
        layout: holds the version's blobs; the artifact and its report go in here.
        cache: where compiled models are kept by key.
        ship_despite_quality: pack what came closest although it misses its budgets; the result says so and which.
        measure: has a candidate that can't be timed on this host measured by a builder board of the class; None where there is no such board.

    Raises:
        QualityError: nothing fits (each budget with by how much), or the engine's process died while measuring.
        ModelError: an operator that the target lacks, by node and name.
        ToolchainError: no such target, a toolchain that can't be installed, broke, or ran past its limit; Cancelled.
        ManifestError: the target can't make what the class asks for.
    """
    began = time.monotonic()
    target = target_named(device_class.target)
    options = _check(target, device_class, version)
    toolchain = toolchains.for_target(target, device_class.spec.precision, progress)
    with work_folder("compile") as work:
        steps = Steps(
            version, device_class, target, options, toolchain, layout, toolchains, cache, work, progress, limits
        )
        evaluator = Evaluator(steps, version, device_class, target, toolchain, layout, measure)
        answered = load_file(steps.prepare() / "golden.safetensors")
        blind = telling.vacuous(steps.references(), version)
        untold = telling.untold_on_boards(answered, version, contract(version, device_class, target))
        blind = "; ".join(told for told in (blind, untold, better_description(steps, version)) if told)
        if blind and not ship_despite_quality:
            raise QualityError(
                f"{version.model} {version.version} for {device_class.name}: {blind}",
                hint="check the manifest's inputs and output against how the network was trained, or take other held-out samples",
            )
        told = (
            telling.caution("held-out", steps.references(), pictures_of(version, version.holdout, layout), version),
            telling.caution("golden", answered, pictures_of(version, version.golden, layout), version),
        )
        cautions = tuple(one for one in told if one)
        finder = Finder(steps, evaluator, version, device_class, target, options)
        choice = finder.choice(cache)
        choice, final, cached = finder.final(choice)
        if blind:
            final = final._replace(
                candidate=msgspec.structs.replace(final.candidate, misses=(blind, *final.candidate.misses))
            )
        misses = final.candidate.misses
        shipped = ship_despite_quality or not misses
        written = report.write(
            version, device_class, choice, final, steps.references(), layout, shipped=shipped, cautions=cautions
        )
        if not shipped:
            raise _missed(version, device_class, choice, final.candidate, written)
        model, answers = steps.compile([final.candidate.recipe])[0][0], steps.prepare() / "golden.safetensors"
        artifact = pack(
            version,
            device_class,
            target,
            steps.toolchains_of(final.candidate.recipe),
            layout,
            final.candidate,
            model,
            answers,
        )
    return CompileResult(
        artifact=artifact,
        model=version.model,
        version=version.version,
        device_class=device_class.name,
        arch=device_class.spec.arch,
        key=final.candidate.key,
        cached=cached,
        quality="forced" if misses else "passed",
        misses=misses,
        figures=final.candidate.figures,
        seconds=round(time.monotonic() - began, 3),
        recipe=final.candidate.recipe.told(),
        precision=final.candidate.recipe.precision,
        why=choice.why,
        cautions=cautions,
        candidates=len(choice.candidates),
        report=written.report,
        page=written.page,
    )


def _check(target: Target, device_class: DeviceClass, version: ModelVersion) -> Options:
    check_class(device_class, target)
    spec = device_class.spec
    if spec.precision == "int8" and version.calibration_method not in target.methods:
        raise ManifestError(
            f"{device_class.name}: target {target.name} has no calibration method {version.calibration_method}; "
            f"it has {', '.join(sorted(target.methods))}"
        )
    return target.options(spec, version)


def _missed(
    version: ModelVersion, device_class: DeviceClass, choice: Choice, nearest: Candidate, written: report.Written
) -> QualityError:
    """What a compile ends in that ships nothing."""
    name = f"{version.model} {version.version}"
    inaccurate = nearest.figures.agreement is not None and quality.inaccuracies(
        nearest.figures, device_class.spec.accuracy
    )
    ways = ["other calibration pictures or method"] if inaccurate else ["another budget"]
    ways += ["precision fp32"] if inaccurate and device_class.spec.precision != "fp32" else []
    return QualityError(
        f"{name} for {device_class.name}: {_told(choice, nearest.misses)}",
        hint=f"every candidate and what it misses: fleet model report {name} {device_class.name}; {', or '.join(ways)}; "
        "shipping it anyway: --ship-despite-quality",
        report=written.report,
        page=written.page,
    )


def _told(choice: Choice, misses: Sequence[str]) -> str:
    """What is missed, and that nothing else fits either."""
    told = "; ".join(misses)
    if choice.chosen is None and len(choice.candidates) > 1:
        told += f" ({choice.nearest.recipe.told()}, which came closest of {len(choice.candidates)} candidates)"
    return told if choice.why in ("", search.NOTHING) or choice.chosen is not None else f"{told}; {choice.why}"
