"""Engine adapter: receives a .tflite file, hands on a LiteRT or tflite-runtime session, whichever the board has.

The file's tensors are mapped by position onto the served names (converters rename them freely). Where the file takes or
gives int8 and the artifact serves FP32, values are quantized and dequantized here, so that clients see one and the same
interface on every class. A batch runs row by row: resizing a .tflite re-plans its memory on each new size.
Source: TensorFlow Lite ``Interpreter`` and its quantization specification (real = scale * (q - zero_point)).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import installed_version, row_by_row
from edgefleet_agent.runtime.tensors import NUMPY, Array


class TfliteEngine:
    name = "tflite"

    def available(self) -> str | None:
        return installed_version("ai-edge-litert", "tflite-runtime")

    def missing(self) -> str:
        return "" if self.available() else "neither the Python package ai-edge-litert nor tflite-runtime is installed"

    def load_library(self) -> Any:
        """The interpreter's module: LiteRT's, or tflite-runtime's, which are alike."""
        problem = ""
        for module in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
            try:
                return importlib.import_module(module)
            except ImportError as exc:
                problem = str(exc)
        raise EngineError(f"no TFLite interpreter loads on this board: {problem}", hint=self.missing())

    def load(self, path: Path, config: ModelConfig, threads: int) -> TfliteSession:
        return TfliteSession(interpreter_of(self.load_library(), path, threads), config)


def interpreter_of(library: Any, path: Path, threads: int, delegates: tuple[Any, ...] = ()) -> Any:
    """A .tflite file, loaded and its tensors allocated.

    Raises:
        EngineError: it can't be.
    """
    try:
        made = library.Interpreter(
            model_path=str(path), num_threads=threads, experimental_delegates=list(delegates) or None
        )
        made.allocate_tensors()
    except (RuntimeError, ValueError, SystemError) as exc:
        raise EngineError(f"the .tflite file can't be loaded: {exc}") from exc
    return made


class _Port:
    """One tensor of the file beside the tensor that is served in its place."""

    def __init__(self, spec: TensorSpec, detail: dict[str, Any]) -> None:
        self.spec = spec
        self.index = int(detail["index"])
        self.dtype = np.dtype(detail["dtype"])
        self.served = NUMPY[spec.datatype]
        self.shape = tuple(int(n) for n in detail["shape"])
        scales = detail["quantization_parameters"]["scales"]
        zeros = detail["quantization_parameters"]["zero_points"]
        self.scale = float(scales[0]) if len(scales) else 0.0
        self.zero = int(zeros[0]) if len(zeros) else 0
        if self.dtype != self.served and not (self.scale and self.served.kind == "f" and self.dtype.kind in "iu"):
            raise EngineError(f"tensor {spec.name} is {self.dtype} in the file and {spec.datatype} in the artifact")
        # -1 on the first axis alone is served row by row; elsewhere the file's size is the only one there is.
        promised = tuple(
            have if i == 0 and n == -1 else n for i, (n, have) in enumerate(zip(spec.shape, self.shape, strict=False))
        )
        if len(spec.shape) != len(self.shape) or promised != self.shape:
            raise EngineError(f"tensor {spec.name} is {self.shape} in the file and {spec.shape} in the artifact")

    def to_file(self, values: Array) -> Array:
        if self.dtype == self.served:
            return values
        limits = np.iinfo(self.dtype)
        # One pass in place: this is on the path of every picture.
        scaled = values * np.float32(1.0 / self.scale)
        np.rint(scaled, out=scaled)
        scaled += np.float32(self.zero)
        np.clip(scaled, limits.min, limits.max, out=scaled)
        return np.asarray(scaled.astype(self.dtype))

    def from_file(self, values: Array) -> Array:
        if self.dtype == self.served:
            return values
        real = (values.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)
        return np.asarray(real.astype(self.served))


class TfliteSession:
    def __init__(self, interpreter: Any, config: ModelConfig, providers: tuple[str, ...] = ("CPU",)) -> None:
        self._interpreter = interpreter
        # The CPU interpreter applies XNNPACK by itself where it can; another delegate is loaded by the adapter that asks for it.
        self.providers = providers
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        for what, found, promised in (("inputs", inputs, config.inputs), ("outputs", outputs, config.outputs)):
            if len(found) != len(promised):
                raise EngineError(f"the .tflite file has {len(found)} {what}, the artifact promises {len(promised)}")
        self._inputs = [_Port(spec, detail) for spec, detail in zip(config.inputs, inputs, strict=True)]
        self._outputs = [_Port(spec, detail) for spec, detail in zip(config.outputs, outputs, strict=True)]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        interpreter = self._interpreter
        try:
            for port in self._inputs:
                interpreter.set_tensor(port.index, port.to_file(inputs[port.spec.name]))
            interpreter.invoke()
            return {p.spec.name: p.from_file(interpreter.get_tensor(p.index)) for p in self._outputs}
        except (RuntimeError, ValueError) as exc:
            raise EngineError(f"the TFLite interpreter failed: {exc}") from exc
