"""Stage 2, compile: quality. Pure: receives outputs of the compiled and of the float model, hands on figures and misses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from edgefleet_shared.errors import ToolchainError

from edgefleet_controller.compile.port import Figures
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.source import ModelVersion

Array = npt.NDArray[Any]
NOISE = 1.05  # two medians of 40 interleaved runs of one model differ by less
Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share. Source: Wilson 1927; unlike the plain normal interval it is right near 0 and 1."""
    share, z2 = successes / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(outputs: dict[str, Array], references: dict[str, Array], version: ModelVersion) -> dict[str, Any]:
    """Agreement with its interval, mean cosine per sample, and SQNR in dB, over all outputs.

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
    n = len(next(iter(references.values())))
    right = sum(_agrees(outputs, references, i, version) for i in range(n))
    low, high = wilson(right, n)
    flat = [
        np.concatenate([a[s.name].reshape(n, -1) for s in version.outputs], axis=1).astype(np.float64)
        for a in (outputs, references)
    ]
    have, want = flat
    finite = bool(np.isfinite(have).all())
    norms = np.linalg.norm(have, axis=1) * np.linalg.norm(want, axis=1)
    cosine = float(np.mean(np.sum(have * want, axis=1) / np.maximum(norms, 1e-30))) if finite else 0.0
    noise = float(np.sum((have - want) ** 2)) if finite else math.inf
    sqnr = (
        10 * math.log10(float(np.sum(want**2)) / noise) if 0 < noise < math.inf else (200.0 if noise == 0 else -200.0)
    )
    return {
        "agreement": right / n, "agreement_low": low, "agreement_high": high, "cosine": round(cosine, 9), "sqnr_db": round(sqnr, 6),
    }  # fmt: skip


def _agrees(outputs: dict[str, Array], references: dict[str, Array], i: int, version: ModelVersion) -> bool:
    if version.output_kind == "classification":
        (spec,) = version.outputs
        have, want = outputs[spec.name][i], references[spec.name][i]
        return bool(np.isfinite(have).all() and np.argmax(have, axis=-1).tolist() == np.argmax(want, axis=-1).tolist())
    limits = version.acceptance
    return all(
        bool(
            np.all(
                np.abs(outputs[s.name][i] - references[s.name][i])
                <= limits.tolerance_abs + limits.tolerance_rel * np.abs(references[s.name][i])
            )
        )
        for s in version.outputs
    )


def misses(figures: Figures, device_class: DeviceClassSpec) -> list[str]:
    """Which budgets a compiled model misses and by how much; empty when it misses none.

    What could not be measured here is no miss: the board's acceptance judges it, and so it does the latency budget, because
    this host is not the board. That the compiled model beats float on the same engine is judged here.
    """
    budgets, found = device_class.budgets, []
    if figures.agreement is None:
        found.append("agreement with the float model could not be measured")
    elif figures.agreement < device_class.accuracy.min_agreement:
        found.append(
            f"agreement with the float model {figures.agreement:.3f} (95 % interval {figures.agreement_low:.3f} to "
            f"{figures.agreement_high:.3f}, {figures.samples} pictures), budget {device_class.accuracy.min_agreement:.3f}"
        )
    if budgets.size_bytes is not None and figures.compiled_bytes > budgets.size_bytes:
        found.append(f"size {figures.compiled_bytes} bytes, budget {budgets.size_bytes}")
    if figures.peak_memory_bytes is not None and figures.peak_memory_bytes > budgets.memory_bytes:
        found.append(f"peak memory {figures.peak_memory_bytes} bytes, budget {budgets.memory_bytes}")
    slower = (
        figures.p50_ms is not None
        and figures.float_p50_ms is not None
        and figures.p50_ms > figures.float_p50_ms * NOISE
    )
    if slower and device_class.precision != "fp32":
        found.append(
            f"slower than float on {figures.engine}: p50 {figures.p50_ms:.2f} ms, float {figures.float_p50_ms:.2f}"
        )
    return found
