"""Engine adapter: receives a .vmfb file (an IREE module, with machine code for one kind of processor), hands on a session on the CPU.

A module that came by way of ONNX says how its function is called, and not what it takes and gives: so one inference at loading shows whether that
is what the artifact promises; IREE checks number, shape and type of every input by itself. It computes one picture at a time: the driver
``local-sync`` on this thread, ``local-task`` on several.
Source: IREE's Python API (``iree.runtime``: ``VmModule.wrap_buffer``, ``create_hal_module``, ``VmContext``, ``FunctionInvoker``); task flags of ``iree-run-module``.
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


class IreeEngine:
    name = "iree"

    def available(self) -> str | None:
        return installed_version("iree-base-runtime")

    def missing(self) -> str:
        return "" if self.available() else "the Python package iree-base-runtime is not installed"

    def load_library(self) -> Any:
        try:
            return importlib.import_module("iree.runtime")
        except (ImportError, OSError) as exc:
            raise EngineError(f"iree-base-runtime does not load on this board: {exc}", hint=self.missing()) from exc

    def load(self, path: Path, config: ModelConfig, threads: int) -> IreeSession:
        runtime = self.load_library()
        driver = "local-task" if threads > 1 else "local-sync"
        try:
            if threads > 1:
                # Read when the driver is made, which is once in a process: a worker holds one model.
                runtime.flags.parse_flags(f"--task_topology_group_count={threads}")
            device = runtime.get_device(driver)
            instance = runtime.VmInstance()
            # IREE's own ``VmModule.mmap`` opens the file for writing, which a confined process may not.
            module = runtime.VmModule.wrap_buffer(instance, np.memmap(path, np.uint8, mode="r"))
            context = runtime.VmContext(instance, [runtime.create_hal_module(instance, device), module])
            function = module.lookup_function(_entry(module.function_names))
            invoker = runtime.FunctionInvoker(context, device, function)
        except (ValueError, RuntimeError, OSError) as exc:
            raise EngineError(f"iree can't load the module: {_first_line(exc)}") from exc
        session = IreeSession(invoker, config, driver)
        try:
            session.run({spec.name: np.zeros(_one_picture(spec), NUMPY[spec.datatype]) for spec in config.inputs})
        except EngineError as exc:
            raise EngineError(f"the module does not do what the artifact promises: {exc.message}") from exc
        return session


def _entry(names: list[str]) -> str:
    """The one function that a model's module is made for; IREE adds ``__init`` and, for each function, one that does not wait."""
    entries = [name for name in names if not name.startswith("__") and not name.endswith("$async")]
    if len(entries) != 1:
        raise EngineError(f"the module has the functions {sorted(entries)}, a model has one")
    return entries[0]


def _one_picture(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(1 if size == -1 else size for size in spec.shape)


class IreeSession:
    def __init__(self, invoker: Any, config: ModelConfig, driver: str) -> None:
        self._invoker, self._driver = invoker, driver
        self._inputs = [spec.name for spec in config.inputs]
        self._outputs = config.outputs

    @property
    def providers(self) -> tuple[str, ...]:
        # Both drivers compute on the processor; what a module has for another device they do not find, and it is refused.
        return (self._driver,)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        try:
            found = self._invoker(*(inputs[name] for name in self._inputs))
            values = [] if found is None else list(found) if isinstance(found, tuple) else [found]
            # Every inference has output memory of its own, which lives as long as the array that looks into it.
            arrays = [np.asarray(value.to_host()) for value in values]
        except (ValueError, RuntimeError) as exc:
            raise EngineError(f"iree failed: {_first_line(exc)}") from exc
        if len(arrays) != len(self._outputs):
            raise EngineError(f"iree answered {len(arrays)} outputs, the artifact promises {len(self._outputs)}")
        return {spec.name: _as_promised(spec, array) for spec, array in zip(self._outputs, arrays, strict=True)}


def _as_promised(spec: TensorSpec, value: Array) -> Array:
    """An output of the promised shape and type; IREE has no type of its own for truth values."""
    served = NUMPY[spec.datatype]
    fits = len(value.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, value.shape, strict=True)
    )
    if not fits or (value.dtype != served and not (served.kind == "b" and value.dtype.itemsize == 1)):
        raise EngineError(
            f"output {spec.name} is {value.dtype} {list(value.shape)} in the module, the artifact promises"
            f" {spec.datatype} {list(spec.shape)}"
        )
    return np.ascontiguousarray(value, dtype=served)


def _first_line(exc: Exception) -> str:
    return str(exc).strip().splitlines()[0][:400] if str(exc).strip() else type(exc).__name__
