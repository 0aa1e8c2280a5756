"""Engine adapter: receives an ONNX file, hands on an onnxruntime session.

The board's CPU provider is used unless the contract allows others that this build of onnxruntime has; onnxruntime falls back
to the CPU silently, so :attr:`OnnxruntimeSession.providers` reports what the session really got. Builds since 1.32 send telemetry from Linux
too; it is switched off before the library loads.
Source: onnxruntime's Python API, ``InferenceSession`` and ``SessionOptions``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import installed_version, row_by_row
from edgefleet_agent.runtime.tensors import Array

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_TYPES = {"FP16": "float16", "FP32": "float", "FP64": "double"}  # what is called otherwise than in the protocol


class OnnxruntimeEngine:
    name = "onnxruntime"

    def available(self) -> str | None:
        return installed_version(*_PACKAGES)

    def missing(self) -> str:
        return "" if self.available() else "the Python package onnxruntime is not installed"

    def load_library(self) -> Any:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        try:
            import onnxruntime
        except ImportError as exc:
            raise EngineError(f"onnxruntime does not load on this board: {exc}", hint=self.missing()) from exc
        return onnxruntime

    def load(self, path: Path, config: ModelConfig, threads: int) -> OnnxruntimeSession:
        onnxruntime = self.load_library()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = (
            4  # what can't be computed is in the error, and a client could have it written as often as it likes
        )
        if threads > 1:
            # Spinning threads make a benchmark pretty and a shared board slow.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        have = onnxruntime.get_available_providers()
        wanted = [p for p in config.contract.allowed_providers if p in have] or ["CPUExecutionProvider"]
        try:
            session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=wanted)
        except Exception as exc:
            raise EngineError(f"onnxruntime can't load the model: {_first_line(exc)}") from exc
        return OnnxruntimeSession(session, config)


class OnnxruntimeSession:
    def __init__(self, session: Any, config: ModelConfig) -> None:
        self._session = session
        self._outputs = [spec.name for spec in config.outputs]
        file_inputs = {i.name: i.shape for i in session.get_inputs()}
        _require("inputs", {spec.name for spec in config.inputs}, set(file_inputs))
        _require("outputs", set(self._outputs), {o.name for o in session.get_outputs()}, subset=True)
        _require_types(config.inputs, {i.name: i.type for i in session.get_inputs()})
        _require_types(config.outputs, {o.name: o.type for o in session.get_outputs()})
        self._fixed_one = any(
            spec.shape and spec.shape[0] == -1 and file_inputs[spec.name][:1] == [1] for spec in config.inputs
        )

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self._session.get_providers())

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs) if self._fixed_one else self._run(inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        try:
            values = self._session.run(self._outputs, inputs)
        except Exception as exc:
            raise EngineError(f"onnxruntime failed: {_first_line(exc)}") from exc
        return dict(zip(self._outputs, values, strict=True))

    def bind(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> Callable[[], None] | None:
        if self._fixed_one and any(a.shape[:1] != (1,) for a in inputs.values()):
            return None
        try:
            binding = self._session.io_binding()
            for name, array in inputs.items():
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        except Exception as exc:
            raise EngineError(f"onnxruntime can't compute in place: {_first_line(exc)}") from exc

        def compute() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as exc:
                raise EngineError(f"onnxruntime failed: {_first_line(exc)}") from exc

        return compute


def _require(what: str, promised: set[str], found: set[str], *, subset: bool = False) -> None:
    if promised - found or (not subset and found - promised):
        raise EngineError(f"the model file's {what} are {sorted(found)}, the artifact promises {sorted(promised)}")


def _require_types(promised: tuple[TensorSpec, ...], found: dict[str, str]) -> None:
    """Texts, sequences and maps are types here too, which nothing that asks could take."""
    for spec in promised:
        if found[spec.name] != f"tensor({_TYPES.get(spec.datatype, spec.datatype.lower())})":
            raise EngineError(
                f"tensor {spec.name} is {found[spec.name]} in the file and {spec.datatype} in the artifact"
            )


def _first_line(exc: Exception) -> str:
    return str(exc).strip().splitlines()[0][:400] if str(exc).strip() else type(exc).__name__
