"""Stage 2, compile: quality. Pure: receives outputs of the compiled and of the float model, hands on figures and misses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from edgefleet_shared import answers, golden
from edgefleet_shared.contract import AcceptanceContract
from edgefleet_shared.detection import HEADS, Part
from edgefleet_shared.errors import ToolchainError

from edgefleet_controller.compile import by_label
from edgefleet_controller.compile.port import HOST, WITHIN, Figures, Share
from edgefleet_controller.compile.recipe import Recipe
from edgefleet_controller.manifests import Accuracy, DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion

Array = npt.NDArray[Any]
NOISE = 1.02  # two medians of 40 interleaved runs of one model differ by less on a quiet machine
Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
EXACT_DB = 200.0  # stands for no noise at all; float32 itself holds about 150 dB
AS_FLOAT_DB = 100.0  # from which only the order of sums is another one: engines' float leaves 120 and more, weights rounded to float16 40 to 75
SMALL_FIRST = ("size", "transfer")  # what a class may prefer over speed
MOST_LABELS = 3  # told one by one in a miss; the report has more
UNLIKE = 3.0  # times: spreads of calibration and held-out inputs that differ by more are not of one kind


class Compared(NamedTuple):
    """Figures by their names in :class:`Figures`, and which samples got another answer."""

    figures: dict[str, Any]
    changed: tuple[int, ...]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share. Source: Wilson 1927; unlike the plain normal interval it is right near 0 and 1."""
    share, z2 = successes / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(count: int, of: int) -> Share:
    """``count`` of ``of``; of nothing, all: where the float model sees no box, seeing none is right."""
    if of == 0:
        return Share(1.0, 0.0, 1.0, 0, 0)
    return Share(count / of, *wilson(count, of), count, of)


def compare(outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion) -> Compared:
    """Agreement with its interval, accuracy where labelled, mean cosine per sample, SQNR in dB of each output and of the worst.

    Args:
        outputs, references: by output name, float32, first axis N.

    Raises:
        ToolchainError: the compiled model's outputs are not the float model's by name or shape.
    """
    for spec in version.outputs:
        have, want = outputs.get(spec.name), references[spec.name]
        if have is None or have.shape != want.shape:
            found = "none" if have is None else str(have.shape)
            raise ToolchainError(
                f"the compiled model's output {spec.name!r} has shape {found}, the float model's {want.shape}"
            )
    agreement, shares, changed = _agreement(outputs, references, version)
    names = [spec.name for spec in version.outputs]
    told, noisy, exact = parts(version), outputs, references
    if version.detection is not None and HEADS[version.detection.decoder].suppressed:
        # Boxes in the order of their scores: where two change places, no place holds what it held.
        noisy, exact = ({names[0]: side} for side in answers.side_by_side(outputs, references, version.reading))
    noise = {title: _sqnr_db(part.of(noisy), part.of(exact)) for title, part in told.items()}
    # Beside an output that is always zero any noise is infinite, and would hide how candidates differ in the others.
    telling = [db for title, db in noise.items() if told[title].of(exact).any()]
    figures = {
        "agreement": agreement.value, "agreement_low": agreement.low, "agreement_high": agreement.high,
        "shares": shares | accuracy(outputs, references, version),
        "by_label": by_label.kept(outputs, references, version),
        "cosine": round(_cosine(noisy, exact, names), 9),
        "sqnr_db": round(min(telling or noise.values()), 6),
        "sqnr_db_by_output": {title: round(db, 6) for title, db in noise.items()},
    }  # fmt: skip
    return Compared(figures, changed)


def _agreement(
    outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion
) -> tuple[Share, dict[str, Share], tuple[int, ...]]:
    """(the share that is held against the budget, all shares by name, samples that got another answer)."""
    n = len(next(iter(references.values())))
    if version.output_kind == "detection":
        found = answers.found_boxes(outputs, references, version.reading)
        both, have, want = (sum(counts) for counts in zip(*found, strict=True))
        recall, precision = share(both, want), share(both, have)
        changed = tuple(i for i, one in enumerate(found) if not one.both == one.have == one.want)
        shares = {"box_recall": recall, "box_precision": precision}
        return min(recall, precision, key=lambda s: s.value), shares, changed
    shares = dict[str, Share]()
    if version.output_kind == "raw":
        within = _within(outputs, references, version)
        same = np.all([one.all(axis=1) for one in within.values()], axis=0)
        for name, one in within.items():
            # Values of one sample hang together: it is samples that the interval counts.
            value = float(one.mean())
            shares[f"{WITHIN}{name}"] = Share(value, *wilson(value * n, n), int(one.sum()), one.size)
    else:
        same = answers.alike(outputs, references, version.reading)
    return share(int(same.sum()), n), shares, tuple(int(i) for i in np.flatnonzero(~same))


def _within(outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion) -> dict[str, Array]:
    """Which values are within the tolerance of their output: samples x values, by output name."""
    n, found = len(next(iter(references.values()))), dict[str, Array]()
    for spec in version.outputs:
        have, want = outputs[spec.name].reshape(n, -1), references[spec.name].reshape(n, -1)
        found[spec.name] = np.abs(have - want) <= room(want, spec.name, version)
    return found


def room(values: Array, output: str, version: ModelVersion) -> Array:
    """How far other values of an output may lie from these."""
    most, relative = version.acceptance.tolerance(output)
    with np.errstate(invalid="ignore"):  # beside infinity there is no number, which nothing is within
        found: Array = most + relative * np.abs(values)
    return found


def accuracy(outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion) -> dict[str, Share]:
    """Share of right answers, of both models, where the samples are labelled."""
    if not version.truth:
        return {}
    name, found = version.outputs[0].name, {}
    for title, side in (("accuracy", outputs), ("float_accuracy", references)):
        if version.output_kind == "text":
            said = version.lines(side[name])
        else:
            said = [str(c) for c in answers.classes(side[name])[:, 0]]
        right = sum(a == b for a, b in zip(said, version.truth, strict=False))  # a round may hold the first few only
        found[title] = share(right, len(said))
    return found


def _joined(side: dict[str, Array], names: list[str]) -> Array:
    found: Array = np.concatenate([side[name].reshape(len(side[name]), -1) for name in names], axis=1).astype(
        np.float64
    )
    return found


def _cosine(outputs: dict[str, Array], references: dict[str, Array], names: list[str]) -> float:
    have, want = _joined(outputs, names), _joined(references, names)
    if not np.isfinite(have).all():
        return 0.0
    norms = np.linalg.norm(have, axis=1) * np.linalg.norm(want, axis=1)
    return float(np.mean(np.sum(have * want, axis=1) / np.maximum(norms, 1e-30)))


def _sqnr_db(have: Array, want: Array) -> float:
    have, want = have.astype(np.float64), want.astype(np.float64)
    if not np.isfinite(have).all():
        return -EXACT_DB
    noise, power = float(np.sum((have - want) ** 2)), float(np.sum(want**2))
    if noise == 0:
        return EXACT_DB
    return 10 * math.log10(power / noise) if power > 0 else -EXACT_DB


class OutputPart(NamedTuple):
    """An output, or values of one meaning in it. ``found_from``: the score from which a row of it is a box, where rows come in the order of their scores."""

    output: str
    part: Part | None
    found_from: float | None = None

    def of(self, side: dict[str, Array]) -> Array:
        """The values, by output name in ``side``."""
        values = side[self.output]
        if self.part is None:
            return values
        _, axis, begin, end = self.part
        return values[(slice(None),) * axis + (slice(begin, end),)]

    def told(self) -> dict[str, Any]:
        """As a child process hears it."""
        place = {} if self.part is None else {"axis": self.part.axis, "begin": self.part.begin, "end": self.part.end}
        rows = {} if self.found_from is None else {"found_from": self.found_from}
        return {"output": self.output, **place, **rows}


def parts(version: ModelVersion) -> dict[str, OutputPart]:
    """What noise is measured of, each against its own power, by title: the outputs, or what they are made of."""
    names = [spec.name for spec in version.outputs]
    told = version.detection
    if told is None or not HEADS[told.decoder].parts:
        return {name: OutputPart(name, None) for name in names}
    head = HEADS[told.decoder]
    found_from = told.threshold if head.suppressed else None
    return {f"{name}, {part.title}": OutputPart(name, part, found_from) for name in names for part in head.parts}


def unlike(calibration: dict[str, Array], holdout: dict[str, Array]) -> str:
    """Why calibration samples can't stand for the held-out ones, or nothing. By input name, encoded, first axis N."""
    for name, have in calibration.items():
        want = holdout[name]
        spreads, means = [float(a.std()) for a in (have, want)], [float(a.mean()) for a in (have, want)]
        ratio = max(spreads) / max(min(spreads), 1e-30)
        if ratio > UNLIKE or abs(means[0] - means[1]) > UNLIKE * max(spreads):
            return (
                f"the calibration samples are not like the held-out ones: {name} has mean {means[0]:.3g} and spread {spreads[0]:.3g}, "
                f"held out {means[1]:.3g} and {spreads[1]:.3g}; were they normalised twice, or not at all?"
            )
    return ""


def inaccuracies(figures: Figures, budget: Accuracy) -> list[str]:
    """In what, and by how much, a network answers unlike the float one; empty when it is within the budget."""
    found: list[str] = []
    if figures.agreement is None:
        if "agreement" not in figures.unmeasured:
            found.append("agreement with the float model could not be measured")
    elif figures.agreement < budget.min_agreement:
        values = {n.removeprefix(WITHIN): one.value for n, one in figures.shares.items() if n.startswith(WITHIN)}
        counted = " of boxes" if "box_recall" in figures.shares else " of all values of a sample" if values else ""
        found.append(
            f"agreement{counted} with the float model {figures.agreement:.3f} (95 % interval {figures.agreement_low:.3f} to "
            f"{figures.agreement_high:.3f}, {figures.samples} samples), budget {budget.min_agreement:.3f}"
        )
        if values:  # what a tolerance would have to be told of
            worst = sorted(values.items(), key=lambda pair: pair[1])[:MOST_LABELS]
            found[-1] += f"; values within tolerance: {', '.join(f'{name} {value:.4f}' for name, value in worst)}"
    rare = {label: one for label, one in figures.by_label.items() if one.value < budget.min_per_label}
    if rare:
        told = ", ".join(f"{label!r} {one.value:.3f} of {one.of}" for label, one in list(rare.items())[:MOST_LABELS])
        more = f" and {len(rare) - MOST_LABELS} more" if len(rare) > MOST_LABELS else ""
        found.append(f"agreement by label: {told}{more}, budget {budget.min_per_label:.3f} for each")
    lost = _lost(figures)
    if lost is not None and budget.max_loss is not None and lost > budget.max_loss:
        found.append(f"accuracy {lost:.4f} below the float model's, budget {budget.max_loss:.4f}")
    return found


def misses(figures: Figures, device_class: DeviceClassSpec, recipe: Recipe) -> list[str]:
    """Which budgets a compiled model misses and by how much; empty when it misses none.

    What could not be measured here is no miss: the board's acceptance judges it. That the compiled model beats float on the same engine is judged here,
    unless the class asks for size, and so is the latency budget where this host could be a board of the class: by the median, because what else the host
    does is in single runs. A builder board judges that budget itself.
    """
    budgets, found = device_class.budgets, inaccuracies(figures, device_class.accuracy)
    if budgets.size_bytes is not None and figures.compiled_bytes > budgets.size_bytes:
        found.append(f"size {figures.compiled_bytes} bytes, budget {budgets.size_bytes}")
    if figures.peak_memory_bytes is not None and figures.peak_memory_bytes > budgets.memory_bytes:
        found.append(f"peak memory {figures.peak_memory_bytes} bytes, budget {budgets.memory_bytes}")
    if figures.timed_on == HOST and figures.p50_ms is not None and figures.p50_ms > budgets.latency_p95_ms:
        found.append(f"latency p50 {figures.p50_ms:.2f} ms on this host, budget {budgets.latency_p95_ms:g} for p95")
    slower = (
        figures.p50_ms is not None
        and figures.float_p50_ms is not None
        and figures.p50_ms > figures.float_p50_ms * NOISE
    )
    if slower and not recipe.exact and device_class.search.prefer not in SMALL_FIRST:
        found.append(
            f"slower than float on {figures.engine}: p50 {figures.p50_ms:.2f} ms, float {figures.float_p50_ms:.2f}"
        )
    return found


def refusals(
    outputs: dict[str, Array], references: dict[str, Array], contract: AcceptanceContract, reading: answers.Reading
) -> list[str]:
    """What boards would refuse a model for, whatever it has shown otherwise; empty where they would not.

    Args:
        outputs, references: the compiled and the float model's answers to the golden samples, by output name, first axis N.
    """
    count = len(next(iter(references.values())))
    each = [{name: values[row : row + 1] for name, values in outputs.items()} for row in range(count)]
    agreement, cosine = golden.compare(contract, reading, each, references)
    found = []
    if not agreement >= contract.min_agreement:
        match contract.kind:
            case "raw":
                what = "values are within the tolerance"
            case "detection":
                what = "boxes are the float model's"
            case _:
                what = "answers are the float model's"
        found.append(
            f"boards would refuse it: {agreement:.3f} of {count} golden samples' {what}, acceptance.min_agreement {contract.min_agreement:.3f}"
        )
    if not cosine >= contract.min_cosine:
        found.append(
            f"boards would refuse it: its answers to {count} golden samples have a cosine of {cosine:.3f} with the float model's, acceptance.min_cosine "
            f"{contract.min_cosine:.3f}"
        )
    return found


def _lost(figures: Figures) -> float | None:
    """Accuracy lost against the float model, where the samples are labelled."""
    if "accuracy" not in figures.shares:
        return None
    return figures.shares["float_accuracy"].value - figures.shares["accuracy"].value
