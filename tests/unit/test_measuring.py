"""What an engine raises in a child: its word on the model, or that the machine has nothing left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefleet_controller.compile.children.job import Refused
from edgefleet_controller.compile.children.measure import Run, measure
from safetensors.numpy import save_file


def measured(folder: Path, says: str) -> None:
    """One model by an engine that raises an error of that text over it."""

    def load(_path: str) -> Run:
        raise RuntimeError(says)

    samples = str(folder / "samples.safetensors")
    save_file({"x": np.zeros((2, 3), np.float32)}, samples)
    models = [{"model": "m", "outputs": str(folder / "outputs")}]
    request = {"models": models, "float_model": None, "samples": samples, "count": 2}
    measure(load, request, lambda *_: None)


@pytest.mark.parametrize(
    "says",
    [
        "Exception from src/inference/src/cpp/core.cpp:117:\nException from src/plugin.cpp:54:\nResource temporarily unavailable\n",
        "Exception from src/inference/src/cpp/core.cpp:117:\nstd::bad_alloc\n",
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 4096",
    ],
)
def test_an_engine_that_gets_no_memory_says_nothing_of_the_model(tmp_path: Path, says: str) -> None:
    with pytest.raises(MemoryError, match=r"Resource|bad_alloc|allocate"):
        measured(tmp_path, says)


def test_what_openvino_raises_is_told_by_its_reason_and_not_by_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^RuntimeError: Can't compile layer 'conv'$"):
        measured(tmp_path, "Exception from src/inference/src/cpp/core.cpp:117:\nCan't compile layer 'conv'\n\n")
