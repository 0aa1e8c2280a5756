"""Engine adapter: receives an .om file, hands on a session on an Ascend NPU, by Huawei's own Python package ``acl`` (pyACL, of CANN).

Its functions answer a status, or a value and a status, and never raise; here that becomes an error. Memory is its user's: what was given is
given back, in the reverse order. Where the program runs on the NPU's own processor (Atlas 200I, OrangePi AIpro), its memory is device memory and copies
must say so. An .om file is made for one chip and fixed sizes; it computes one picture at a time.
Proven against the recorded interface of pyACL, not on a board.
Source: CANN, "pyACL API reference" (``acl.rt``, ``acl.mdl``, ``acl.create_data_buffer``), "Model inference" and its samples.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import re
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import row_by_row
from edgefleet_agent.runtime.tensors import NUMPY, Array

_DEVICE = 0
_ALREADY_INITIALISED = 100002  # ACL_ERROR_REPEAT_INITIALIZE
_RUNS_ON_DEVICE = 0  # aclrtRunMode ACL_DEVICE
_MALLOC_HUGE_FIRST = 0
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_TYPES = {
    0: np.float32, 1: np.float16, 2: np.int8, 3: np.int32, 4: np.uint8, 6: np.int16, 7: np.uint16, 8: np.uint32, 9: np.int64,
    10: np.uint64, 11: np.float64, 12: np.bool_,
}  # fmt: skip
_HINT = (
    "is the driver loaded, are /dev/davinci0, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc open to the agent and the runtime, and does CANN's "
    "set_env.sh stand behind their environment?"
)
_OM_HINT = "an .om file is for the chip that atc was told (--soc_version)"


class AclEngine:
    name = "acl"

    def __init__(self) -> None:
        self._acl: Any = None

    def available(self) -> str | None:
        """CANN's version as its folder tells it: the package comes with CANN, not from an index. ``0`` where the folder does not say."""
        try:
            found = importlib.util.find_spec("acl")
        except (ImportError, ValueError):
            return None
        if found is None or found.origin is None:
            return None
        told = re.search(r"/(\d+\.\d+(?:\.[0-9A-Za-z]+)*)/", str(Path(found.origin).resolve()))
        return told.group(1) if told else "0"

    def missing(self) -> str:
        return "" if self.available() else "the Python package acl of Huawei's CANN is not on the Python path"

    def load_library(self) -> Any:
        """pyACL, initialised, with a device that answers."""
        if self._acl is not None:
            return self._acl
        try:
            acl = importlib.import_module("acl")
            parts = (acl.init, acl.rt.set_device, acl.mdl.load_from_file)
        except (ImportError, OSError, AttributeError) as exc:
            raise EngineError(f"pyACL does not load on this board: {exc}", hint=self.missing() or _HINT) from exc
        status = parts[0]()
        if status not in (0, _ALREADY_INITIALISED):
            raise EngineError(f"no Ascend NPU answers: acl.init answered {status}", hint=_HINT)
        if status == 0:
            atexit.register(acl.finalize)
        count = _value("acl.rt.get_device_count", acl.rt.get_device_count())
        if count < 1:
            raise EngineError("no Ascend NPU answers: acl.rt.get_device_count answered 0", hint=_HINT)
        self._acl = acl
        return acl

    def load(self, path: Path, config: ModelConfig, threads: int) -> AclSession:
        return AclSession(self.load_library(), path, config)


def _done(name: str, status: Any, hint: str = "") -> None:
    """Of a function that answers a status alone."""
    if status != 0:
        raise EngineError(f"{name} answered {status}", hint=hint)


def _value(name: str, answer: Any, hint: str = "") -> Any:
    """Of a function that answers (value, status)."""
    value, status = answer
    _done(name, status, hint)
    return value


class _Port:
    """One input or output: the tensor that is served, what it is in the file, and its memory on the device."""

    def __init__(self, spec: TensorSpec, dims: dict[str, Any], kind: int, size: int) -> None:
        self.spec, self.size = spec, size
        self.shape = tuple(int(n) for n in dims["dims"])
        if kind not in _TYPES:
            raise EngineError(f"tensor {spec.name} has the data type {kind}, which has no name here")
        self.dtype, self.served = np.dtype(_TYPES[kind]), NUMPY[spec.datatype]
        if self.dtype != self.served and not (self.dtype.kind == self.served.kind == "f"):
            raise EngineError(f"tensor {spec.name} is {self.dtype} in the file, the artifact promises {spec.datatype}")
        wanted = tuple(1 if axis == 0 and n == -1 else n for axis, n in enumerate(spec.shape))
        if self.shape != wanted:
            raise EngineError(
                f"tensor {spec.name} is {list(self.shape)} in the file, the artifact promises {list(spec.shape)}",
                hint="an .om file with sizes left open needs them given to atc (--input_shape)",
            )
        if int(np.prod(self.shape)) * self.dtype.itemsize > size:
            raise EngineError(f"tensor {spec.name} has {size} bytes in the file, too few for {list(self.shape)}")
        self.address = 0


class AclSession:
    """A model on the NPU.

    Everything that pyACL gave is given back when the session goes, or when loading it fails halfway.
    """

    def __init__(self, acl: Any, path: Path, config: ModelConfig) -> None:
        self._acl = acl
        with ExitStack() as given:
            self._open(path, config, given)
            self._close = weakref.finalize(self, given.pop_all().close)

    def _open(self, path: Path, config: ModelConfig, given: ExitStack) -> None:
        acl = self._acl
        _done("acl.rt.set_device", acl.rt.set_device(_DEVICE), _HINT)
        given.callback(acl.rt.reset_device, _DEVICE)
        self._context = _value("acl.rt.create_context", acl.rt.create_context(_DEVICE))
        given.callback(acl.rt.destroy_context, self._context)
        on_device = _value("acl.rt.get_run_mode", acl.rt.get_run_mode()) == _RUNS_ON_DEVICE
        self._in_kind = _DEVICE_TO_DEVICE if on_device else _HOST_TO_DEVICE
        self._out_kind = _DEVICE_TO_DEVICE if on_device else _DEVICE_TO_HOST
        self._model = _value("acl.mdl.load_from_file", acl.mdl.load_from_file(str(path)), _OM_HINT)
        given.callback(acl.mdl.unload, self._model)
        description = acl.mdl.create_desc()
        given.callback(acl.mdl.destroy_desc, description)
        _done("acl.mdl.get_desc", acl.mdl.get_desc(description, self._model))
        self._inputs = self._ports(description, "input", config.inputs)
        self._outputs = self._ports(description, "output", config.outputs)
        self._given_inputs = self._dataset(self._inputs, given)
        self._given_outputs = self._dataset(self._outputs, given)

    def _ports(self, description: Any, what: str, promised: tuple[TensorSpec, ...]) -> list[_Port]:
        """By position: atc renames outputs."""
        mdl = self._acl.mdl
        count = getattr(mdl, f"get_num_{what}s")(description)
        if count != len(promised):
            raise EngineError(f"the file has {count} {what}s, the artifact promises {len(promised)}")
        dims, kind, size = (getattr(mdl, f"get_{what}_{of}") for of in ("dims", "data_type", "size_by_index"))
        return [
            _Port(spec, _value(f"acl.mdl.get_{what}_dims", dims(description, n)), kind(description, n), size(description, n))
            for n, spec in enumerate(promised)
        ]  # fmt: skip

    def _dataset(self, ports: list[_Port], given: ExitStack) -> Any:
        """Memory on the device for each, and the list of it that :func:`acl.mdl.execute` takes."""
        acl = self._acl
        dataset = acl.mdl.create_dataset()
        given.callback(acl.mdl.destroy_dataset, dataset)
        for port in ports:
            port.address = _value("acl.rt.malloc", acl.rt.malloc(port.size, _MALLOC_HUGE_FIRST))
            given.callback(acl.rt.free, port.address)
            buffer = acl.create_data_buffer(port.address, port.size)
            if not buffer:
                raise EngineError("acl.create_data_buffer answered nothing")
            given.callback(acl.destroy_data_buffer, buffer)
            _value("acl.mdl.add_dataset_buffer", acl.mdl.add_dataset_buffer(dataset, buffer))
        return dataset

    @property
    def providers(self) -> tuple[str, ...]:
        # What the NPU lacks is refused when the file is made, or runs on its own AI CPU.
        return ("NPU",)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        acl = self._acl
        for port in self._inputs:
            value = np.ascontiguousarray(inputs[port.spec.name], dtype=port.dtype)
            if value.shape != port.shape:
                raise EngineError(f"input {port.spec.name} is {list(value.shape)}, the file takes {list(port.shape)}")
            target, source = (port.address, port.size), (int(value.ctypes.data), value.nbytes)
            _done(
                "acl.rt.memcpy", acl.rt.memcpy(*target, *source, self._in_kind)
            )  # it waits: the value lives long enough
        _done("acl.mdl.execute", acl.mdl.execute(self._model, self._given_inputs, self._given_outputs))
        answers = {}
        for port in self._outputs:
            answer: Array = np.empty(port.shape, port.dtype)
            target, source = (int(answer.ctypes.data), answer.nbytes), (port.address, answer.nbytes)
            _done("acl.rt.memcpy", acl.rt.memcpy(*target, *source, self._out_kind))
            answers[port.spec.name] = answer.astype(port.served, copy=False)
        return answers
