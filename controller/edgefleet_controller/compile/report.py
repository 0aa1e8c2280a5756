"""Stage 2, compile: the report. Receives what was tried and chosen, hands on two blobs: JSON for programs, a page for people.

Both lie beside the artifact, not in it: they hold times (ADR 0004); where nothing was fit to be shipped they are what the compile leaves. The page is one file without scripts or outside references
(:mod:`.report_page`); pictures whose answer changed are in it, small.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from edgefleet_shared import answers
from edgefleet_shared.artifact import Layout

from edgefleet_controller.compile import report_page
from edgefleet_controller.compile.evaluator import Measured
from edgefleet_controller.compile.port import Figures
from edgefleet_controller.compile.search import Candidate, Choice
from edgefleet_controller.compile.shown import pictures_of
from edgefleet_controller.compile.steps import calibrating
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion

SCHEMA = 1
MOST_CHANGED = 200  # samples told one by one; the counts are of all


class Written(NamedTuple):
    """Digests of the report as JSON and as HTML."""

    report: str
    page: str


def write(
    version: ModelVersion, device_class: DeviceClass, choice: Choice, final: Measured, references: dict[str, Any],
    layout: Layout, *, shipped: bool = True, cautions: tuple[str, ...] = (),
) -> Written:  # fmt: skip
    """Store both forms.

    Args:
        final: what was chosen, or came closest, measured alone, with its outputs.
        references: the float model's outputs for the held-out samples.
        shipped: whether there is an artifact; else the report tells how far the candidates were from the budgets.
        cautions: why the samples prove less than they seem to.
    """
    report = build(version, device_class, choice, final, references, shipped=shipped, cautions=cautions)
    pictures = _pictures(version, layout, [c["sample"] for c in report["changed"]["samples"]])
    return Written(
        layout.put(json.dumps(report, sort_keys=True).encode()).digest,
        layout.put(report_page.render(report, pictures).encode()).digest,
    )


def build(
    version: ModelVersion, device_class: DeviceClass, choice: Choice, final: Measured, references: dict[str, Any],
    *, shipped: bool, cautions: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """The report as JSON holds it."""
    candidate = final.candidate
    front = _front([t.figures for t in choice.candidates])
    return {
        "schema": SCHEMA,
        "model": version.model,
        "version": version.version,
        "class": device_class.name,
        "kind": version.output_kind,
        "engine": candidate.figures.engine,
        "engine_version": candidate.figures.engine_version,
        "key": candidate.key,
        "recipe": candidate.recipe.as_dict(),
        "told": candidate.recipe.told(),
        "why": choice.why,
        "fits": choice.chosen is not None and not candidate.misses,
        "shipped": shipped,
        "misses": list(candidate.misses),
        "cautions": list(cautions),
        "budgets": {
            "min_agreement": device_class.spec.accuracy.min_agreement,
            "min_per_label": device_class.spec.accuracy.min_per_label,
            "max_loss": device_class.spec.accuracy.max_loss,
            **device_class.spec.budgets.model_dump(),
            "prefer": device_class.spec.search.prefer,
        },
        "figures": msgspec.to_builtins(candidate.figures),
        "candidates": [
            _candidate(t, chosen=t.recipe == candidate.recipe, on_front=on)
            for t, on in zip(choice.candidates, front, strict=True)
        ],
        "left_out": [{"told": one.recipe.told(), **msgspec.to_builtins(one)} for one in choice.left_out],
        "layers": [msgspec.to_builtins(unit) for unit in sorted(choice.sensitivity, key=lambda u: -u.noise)],
        "calibration": {"samples": len(calibrating(version.calibration.count)), "of": version.calibration.count},
        "in_float": list(candidate.recipe.in_float),
        "pruning": None if choice.pruning is None else msgspec.to_builtins(choice.pruning),
        "tfmot": None if choice.tfmot is None else msgspec.to_builtins(choice.tfmot),
        "changed": _changed(version, final, references),
    }


def _candidate(candidate: Candidate, *, chosen: bool, on_front: bool) -> dict[str, Any]:
    figures = msgspec.to_builtins(candidate.figures)
    return {
        "recipe": candidate.recipe.as_dict(), "told": candidate.recipe.told(), "misses": list(candidate.misses), "died": candidate.died,
        "chosen": chosen, "on_front": on_front, "key": candidate.key, "figures": figures,
    }  # fmt: skip


def _front(figures: Sequence[Figures]) -> list[bool]:
    """Which are on the front of accuracy (agreement, then noise), latency and bytes: no other is as good in all three and better in one."""
    measured = [f.agreement is not None for f in figures]

    def point(f: Figures) -> tuple[tuple[float, float], float, int]:
        return (-(f.agreement or 0.0), -(f.sqnr_db or 0.0)), f.relative_time or 0.0, f.compiled_bytes

    def beaten(i: int) -> bool:
        mine = point(figures[i])
        others = [point(f) for f, told in zip(figures, measured, strict=True) if told]
        return any(o != mine and o[0] <= mine[0] and o[1] <= mine[1] and o[2] <= mine[2] for o in others)

    return [ok and not beaten(i) for i, ok in enumerate(measured)]


def _changed(version: ModelVersion, final: Measured, references: dict[str, Any]) -> dict[str, Any]:
    """Samples that got another answer than the float model's, and how often each answer became which."""
    if not final.outputs:
        return {"count": None, "samples": [], "confusion": []}
    # Decoding is per sample: only those that changed are decoded again.
    rows = list(final.changed)
    have, want = ({name: array[rows] for name, array in side.items()} for side in (final.outputs, references))
    pairs = list(zip(_said(have, version), _said(want, version), strict=True)) if rows else []
    counts = Counter((was, now) for now, was in pairs)
    words = [{"float": was, "compiled": now} for now, was in pairs] or [{} for _ in rows]
    samples = [
        {"sample": row} | said | ({"truth": _right(version, row)} if version.truth else {})
        for row, said in zip(rows[:MOST_CHANGED], words[:MOST_CHANGED], strict=True)
    ]
    confusion = [{"float": was, "compiled": now, "count": n} for (was, now), n in counts.most_common(50)]
    return {"count": len(rows), "samples": samples, "confusion": confusion}


def _right(version: ModelVersion, row: int) -> str:
    """The right answer to a sample, in the words of :func:`_said`."""
    truth = version.truth[row]
    return version.label(int(truth)) if version.output_kind == "classification" else truth


def _said(outputs: dict[str, Any], version: ModelVersion) -> list[str]:
    """Each sample's answer in words; nothing for kinds that have none."""

    name = version.outputs[0].name
    match version.output_kind:
        case "classification":
            return [" ".join(version.label(int(c)) for c in row[:16]) for row in answers.classes(outputs[name])]
        case "text":
            return version.lines(outputs[name])
        case "detection":
            found = answers.boxes(outputs, version.reading)
            return [", ".join(f"{version.label(b.kind)} {b.score:.2f}" for b in one) or "nothing" for one in found]
        case _:
            return []


def _pictures(version: ModelVersion, layout: Layout, rows: list[int]) -> dict[int, Any]:
    """The held-out pictures of these rows, uint8 H x W x C; none where the samples are tensors."""
    array = pictures_of(version, version.holdout, layout) if rows else None
    if array is None:
        return {}
    return {row: array[row] for row in rows[: report_page.MOST_PICTURES]}
