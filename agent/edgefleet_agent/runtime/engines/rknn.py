"""Engine adapter: receives an .rknn file, hands on a session on a Rockchip NPU, by Rockchip's own ``rknn-toolkit-lite2``.

Its methods answer -1 or None and write to a log of their own where others raise; here that becomes an error. An .rknn file is for one
chip: the library refuses one of another. Whatever has four axes is N x C x H x W to it; given as "nhwc" it would be turned to that, given as
"nchw" it is left as the network has it, pictures of N x H x W x C too (by RKNN-Toolkit2's simulator). It computes one picture at a time.
Proven against the recorded interface of rknn-toolkit-lite2 2.5.0, not on a board.
Source: ``rknnlite/api/rknn_lite.py`` of that package; Rockchip's RKNPU user guide.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import installed_version, row_by_row
from edgefleet_agent.runtime.tensors import NUMPY, Array

_HINT = (
    "an .rknn file is for one chip and for a librknnrt.so of its toolkit's version; the library comes with the board's image, and the "
    "NPU's device file must be open to the runtime"
)


class RknnEngine:
    name = "rknn"

    def available(self) -> str | None:
        return installed_version("rknn-toolkit-lite2")

    def missing(self) -> str:
        return "" if self.available() else "the Python package rknn-toolkit-lite2 is not installed"

    def load_library(self) -> Any:
        try:
            return importlib.import_module("rknnlite.api").RKNNLite
        except (ImportError, OSError) as exc:
            raise EngineError(f"rknn-toolkit-lite2 does not load on this board: {exc}", hint=self.missing()) from exc

    def load(self, path: Path, config: ModelConfig, threads: int) -> RknnSession:
        lite = self.load_library()(verbose=False)
        for what, step in (("load the file", lambda: lite.load_rknn(str(path))), ("start the NPU", lite.init_runtime)):
            try:
                status = step()
            except Exception as exc:  # the toolkit raises bare Exception
                lite.release()
                raise EngineError(f"rknn can't {what}: {exc}", hint=_HINT) from exc
            if status != 0:
                lite.release()
                raise EngineError(f"rknn can't {what} (status {status}); its log says why", hint=_HINT)
        session = RknnSession(lite, config)
        # The file can't be asked for its inputs and outputs: one inference shows whether they are the promised ones.
        session.run(
            {s.name: np.zeros([1 if n == -1 else n for n in s.shape], NUMPY[s.datatype]) for s in config.inputs}
        )
        return session


class RknnSession:
    def __init__(self, lite: Any, config: ModelConfig) -> None:
        self._lite = lite
        self._inputs, self._outputs = config.inputs, config.outputs

    @property
    def providers(self) -> tuple[str, ...]:
        # An operator that the NPU lacks is refused when the file is made; there is no other device to fall back to.
        return ("NPU",)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        values = [inputs[spec.name] for spec in self._inputs]
        try:
            outputs = self._lite.inference(inputs=values, data_format=["nchw" for _ in values])
        except Exception as exc:  # the toolkit raises bare Exception
            raise EngineError(f"rknn failed: {exc}") from exc
        if outputs is None or len(outputs) != len(self._outputs):
            found = "nothing" if outputs is None else f"{len(outputs)} outputs"
            raise EngineError(f"rknn answered {found}, the artifact promises {len(self._outputs)}; its log says why")
        return {spec.name: _as_promised(spec.name, spec.datatype, spec.shape, value) for spec, value in zip(self._outputs, outputs, strict=True)}  # fmt: skip


def _as_promised(name: str, datatype: str, shape: tuple[int, ...], value: Array) -> Array:
    """The toolkit adds and drops axes of size 1; anything else is another model."""
    wanted = (1, *shape[1:]) if shape and shape[0] == -1 else shape
    if value.size != int(np.prod(wanted)):
        raise EngineError(f"output {name} is {list(value.shape)}, the artifact promises {list(shape)}")
    return np.ascontiguousarray(value.reshape(wanted), dtype=NUMPY[datatype])
