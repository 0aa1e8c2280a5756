"""Every engine that this machine has, behind the real runtime, in a worker that is confined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import artifacts
from support.runtimes import Load, running

ENGINES = ("onnxruntime", "tflite", "openvino", "iree")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_is_served_on_several_threads_and_its_worker_is_wholly_confined(tmp_path: Path, engine: str) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1", engine=engine))
        runtime.start("--threads", "2")
        x = np.random.default_rng(1).random((3, 8, 8, 3), np.float32)
        status, answer = runtime.infer(x)
        assert status == 200
        np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (3, -1)), artifacts.truth(1, x), atol=1e-3)
        with Load(runtime) as load:
            load.seen("1")
        assert (load.failed, load.wrong) == ([], 0)
        assert runtime.version("1").unconfined == ()
        if engine == "iree":
            assert runtime.version("1").providers == ("local-task",)
