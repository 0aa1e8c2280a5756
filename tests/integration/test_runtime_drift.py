"""The real runtime on a camera that goes dark: status, Prometheus text, and no request that waits for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from edgefleet_shared import golden
from edgefleet_shared.drift import MIN_SAMPLES, Drift
from support import artifacts
from support.runtimes import Runtime, running, until


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with running(tmp_path) as made:
        made.install(made.add("1", seed=1))
        made.start()
        yield made


SHOWN = golden.encode_pictures(artifacts.pictures(1), artifacts.ENCODING)


def drift_of(runtime: Runtime, camera: Callable[[int], np.ndarray]) -> Drift:
    """What the runtime says once it has looked at enough of the camera's pictures."""
    assert runtime.version("1").drift.psi is None, "nothing was asked yet"
    number = 0

    def enough() -> bool:
        nonlocal number
        number += 1
        x = camera(number).astype("<f4")
        header = json.dumps(
            {
                "inputs": [
                    {"name": "x", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
                ]
            }
        ).encode()
        status, _ = runtime.ask(
            "POST", "/v2/models/toy/infer", header + x.tobytes(), {"Inference-Header-Content-Length": str(len(header))}
        )
        assert status == 200
        return bool(runtime.version("1").drift.samples >= MIN_SAMPLES)

    until(enough, 60, "enough requests were looked at")
    assert runtime.version("1").crashes == 0
    found = runtime.version("1").drift
    assert isinstance(found, Drift)
    return found


def test_the_golden_pictures_have_not_moved_and_metrics_say_so(runtime: Runtime) -> None:
    found = drift_of(runtime, lambda number: SHOWN[number % len(SHOWN)][None])
    assert found.psi is not None
    assert found.psi < 0.1
    _, text = runtime.get("/metrics")
    lines = [line for line in text.decode().splitlines() if line.startswith("edgefleet_runtime_drift_psi{")]
    assert [line.partition("kind=")[2].partition(",")[0] for line in lines] == ['"input"', '"output"']


def test_a_camera_that_went_dark_has_moved(runtime: Runtime) -> None:
    found = drift_of(runtime, lambda number: SHOWN[number % len(SHOWN)][None] * np.float32(0.02))
    assert found.psi is not None
    assert found.psi > 0.5


def test_pictures_of_nan_break_nothing_and_are_told(runtime: Runtime) -> None:
    found = drift_of(runtime, lambda number: np.full_like(SHOWN[:1], np.nan))
    shares = {tensor.name: tensor.non_finite for tensor in found.tensors}
    assert shares["x"] == 1.0
    assert found.psi is not None
    assert found.psi > 0.5
