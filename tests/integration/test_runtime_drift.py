"""The real runtime on a camera that goes dark: status, Prometheus text, and no request that waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from edgefleet_shared import golden
from support import artifacts
from support.runtimes import Runtime, running, until


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        yield made


def test_a_camera_that_goes_dark_drifts_and_metrics_say_so(runtime: Runtime) -> None:
    shown = golden.encode_pictures(artifacts.pictures(1), artifacts.ENCODING)
    number = 0

    def looked_at(count: int, dim: float) -> bool:
        nonlocal number
        number += 1
        status, _ = runtime.infer(shown[number % len(shown)][None] * np.float32(dim))
        assert status == 200
        return runtime.version("1").drift.samples >= count

    assert runtime.version("1").drift.psi is None
    until(lambda: looked_at(60, 1.0), 60, "enough requests were looked at")
    assert runtime.version("1").drift.psi < 0.25
    before = runtime.version("1").drift.samples
    until(lambda: looked_at(before + 40, 0.02), 90, "enough dark ones were looked at")
    assert runtime.version("1").drift.psi > 0.25
    _, text = runtime.get("/metrics")
    lines = [line for line in str(text).replace("\\n", "\n").splitlines() if "drift_psi{" in line]
    assert len(lines) == 2, "one input, one output"


def test_a_picture_of_nan_breaks_nothing(runtime: Runtime) -> None:
    shown = golden.encode_pictures(artifacts.pictures(1), artifacts.ENCODING)[:1]

    def looked_at() -> bool:
        status, _ = runtime.infer(np.full_like(shown, np.nan))
        assert status == 200
        return runtime.version("1").drift.samples >= 50

    until(looked_at, 60, "enough requests were looked at")
    assert runtime.version("1").crashes == 0
    assert "x" not in {tensor.name for tensor in runtime.version("1").drift.tensors}
