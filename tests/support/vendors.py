"""Vendors' Python packages as recorded: names, signatures and manners of what our adapters call, without the hardware behind it.

Recorded from rknn-toolkit-lite2 2.5.0 (``rknnlite/api/rknn_lite.py``: statuses instead of exceptions, None instead of outputs) and
from LiteRT's ``interpreter`` module (``load_delegate`` raises ValueError; ``_get_ops_details`` lists every operator).
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import artifacts


class RKNNLite:
    """Signatures as in rknn-toolkit-lite2 2.5.0. A file is ``RKNN`` and a seed of the tests' network."""

    NPU_CORE_AUTO = 0

    def __init__(self, verbose: bool = False, verbose_file: Any = None) -> None:
        self.seed: int | None = None
        self.ready = self.released = False

    def load_rknn(self, path: str, key_path: Any = None) -> int:
        content = Path(path).read_bytes()
        if content[:4] != b"RKNN" or len(content) != 5:
            return -1
        self.seed = content[4]
        return 0

    def init_runtime(
        self, target: Any = None, device_id: Any = None, async_mode: bool = False, core_mask: int = 0
    ) -> int:
        if self.seed is None:
            return -1
        self.ready = True
        return 0

    def inference(
        self, inputs: list[np.ndarray], data_type: Any = None, data_format: Any = None, inputs_pass_through: Any = None,
        get_frame_id: bool = False, reuse_outputs: bool = False,
    ) -> list[np.ndarray] | None:  # fmt: skip
        if not self.ready or self.released or self.seed is None or len(inputs) != 1:
            return None
        (value,), (order,) = inputs, data_format
        # The network takes N x H x W x C, which the toolkit, as all that has four axes, calls nchw: nhwc has another shape to it.
        if value.shape[0] != 1 or order != "nchw":
            return None
        return [artifacts.truth(self.seed, value)]

    def release(self) -> None:
        self.released = True


def install_rknn(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make ``rknnlite`` importable and its distribution known, for the rest of a test."""
    metadata = folder / "rknn_toolkit_lite2-2.5.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: rknn-toolkit-lite2\nVersion: 2.5.0\n")
    monkeypatch.syspath_prepend(str(folder))
    api = types.ModuleType("rknnlite.api")
    api.RKNNLite = RKNNLite  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rknnlite", types.ModuleType("rknnlite"))
    monkeypatch.setitem(sys.modules, "rknnlite.api", api)


def install_edge_tpu(monkeypatch: pytest.MonkeyPatch, operators: tuple[str, ...]) -> list[Any]:
    """LiteRT's own interpreter beside a device: what was delegated is told by the list of operators. Returns the delegates given."""
    from ai_edge_litert import interpreter as real

    given: list[Any] = []

    class Interpreter(real.Interpreter):  # type: ignore[misc]
        def __init__(self, model_path: str, num_threads: int, experimental_delegates: Any = None) -> None:
            given.extend(experimental_delegates or ())
            super().__init__(model_path=model_path, num_threads=num_threads)

        def _get_ops_details(self) -> list[dict[str, Any]]:
            return [{"index": number, "op_name": name} for number, name in enumerate(operators)]

    def load_delegate(library: str, options: Any = None) -> object:
        if library != "libedgetpu.so.1":
            raise ValueError(f"Failed to load delegate from {library}")
        return "the Edge TPU"

    stub = types.ModuleType("ai_edge_litert.interpreter")
    stub.Interpreter, stub.load_delegate = Interpreter, load_delegate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", stub)
    return given
