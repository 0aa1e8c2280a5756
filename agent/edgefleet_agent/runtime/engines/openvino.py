"""Engine adapter: receives an OpenVINO model as one blob, hands on a compiled model on the CPU.

OpenVINO's IR is two files; the blob is a ZIP archive of ``model.xml``, deflated or not, and ``model.bin``, which it stores, read
into memory here: nothing is unpacked to disk. Importing ``openvino`` starts its telemetry package if it finds one, writing to the
home folder and calling out; it is kept from finding it (OpenVINO then takes its own stub).
Source: OpenVINO's Python API, ``Core.read_model(model=, weights=)`` and ``Core.compile_model``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import installed_version, row_by_row
from edgefleet_agent.runtime.tensors import NUMPY, Array

MEMBERS = ("model.xml", "model.bin")
PIECE_BYTES = 1 << 20
MAX_XML_BYTES = 64 * 1024 * 1024  # a network of a thousand layers has one


class OpenvinoEngine:
    name = "openvino"

    def available(self) -> str | None:
        return installed_version("openvino")

    def missing(self) -> str:
        return "" if self.available() else "the Python package openvino is not installed"

    def load_library(self) -> Any:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "import" fails
        try:
            import openvino
        except ImportError as exc:
            raise EngineError(f"openvino does not load on this board: {exc}", hint=self.missing()) from exc
        return openvino

    def load(self, path: Path, config: ModelConfig, threads: int) -> OpenvinoSession:
        with _every_processor():
            openvino = self.load_library()
            core = openvino.Core()
            core.get_versions("CPU")  # loads what computes
        xml, weights = _members(path)
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        # Else it computes in bfloat16 where the processor can, with two or three digits, and the model is not the one that was looked at.
        options["INFERENCE_PRECISION_HINT"] = "f32"
        # Else its thread stays on one processor, whoever else wants that one and whichever is free.
        options["ENABLE_CPU_PINNING"] = False
        try:
            # Not copied: of a large model that is the memory that decides whether a board can load it.
            model = core.read_model(model=xml, weights=openvino.Tensor(weights, shared_memory=True))
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as exc:
            raise EngineError(f"openvino can't load the model: {_last_line(exc)}") from exc
        return OpenvinoSession(compiled, weights, config)


@contextlib.contextmanager
def _every_processor() -> Iterator[None]:
    """OpenVINO notes which processors it may use when it is loaded, and never looks again: a process that loads on one of them would
    compute on that one for good."""
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # those that are not ours are left out by the kernel
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def _members(path: Path) -> tuple[bytes, Array]:
    """Topology and weights out of the blob."""
    try:
        with zipfile.ZipFile(path) as archive:
            xml, weights = (archive.getinfo(name) for name in MEMBERS)
            # No archive bomb gets through: a member that is stored can't be larger than the file, and none is read further than it says.
            if weights.compress_type != zipfile.ZIP_STORED:
                raise EngineError(f"{MEMBERS[1]} in the OpenVINO blob is compressed; it must be stored")
            if weights.file_size != weights.compress_size or weights.file_size > path.stat().st_size:
                raise EngineError(
                    f"{MEMBERS[1]} in the OpenVINO blob says of itself that it has {weights.file_size} bytes"
                )
            if xml.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise EngineError(
                    f"{MEMBERS[0]} in the OpenVINO blob is compressed by method {xml.compress_type}; deflate is known"
                )
            if xml.file_size > MAX_XML_BYTES:
                raise EngineError(
                    f"{MEMBERS[0]} in the OpenVINO blob has {xml.file_size} bytes, {MAX_XML_BYTES} are allowed"
                )
            return archive.read(xml), _read(archive, weights)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError) as exc:
        raise EngineError(f"not an OpenVINO blob (a ZIP of {' and '.join(MEMBERS)}): {exc}") from exc


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """A stored member's bytes, held once: ``ZipFile.read`` holds what is beyond two gigabytes twice."""
    content = np.empty(member.file_size, np.uint8)
    done = 0
    with archive.open(member) as stream:
        while piece := stream.read(PIECE_BYTES):
            content[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
    return content


class OpenvinoSession:
    """Args:
    weights: what the compiled model may read for as long as it is there; OpenVINO does not hold it.
    """

    def __init__(self, compiled: Any, weights: Array, config: ModelConfig) -> None:
        self._compiled, self._weights = compiled, weights
        self._request = compiled.create_infer_request()
        inputs = {name: port for port in compiled.inputs for name in port.names}
        outputs = {name: port for port in compiled.outputs for name in port.names}
        lacking = [s.name for s in config.inputs if s.name not in inputs]
        lacking += [s.name for s in config.outputs if s.name not in outputs]
        if lacking or len(compiled.inputs) != len(config.inputs):
            raise EngineError(
                f"the OpenVINO model has {sorted(inputs)} -> {sorted(outputs)}; the artifact promises"
                f" {[s.name for s in config.inputs]} -> {[s.name for s in config.outputs]}"
            )
        for spec in config.outputs:
            found = outputs[spec.name].get_element_type()
            if np.dtype(found.to_dtype()) != NUMPY[spec.datatype]:
                raise EngineError(
                    f"tensor {spec.name} is {found.get_type_name()} in the file and {spec.datatype} in the artifact"
                )
        self._outputs = [(spec.name, outputs[spec.name]) for spec in config.outputs]
        self._fixed_one = any(
            spec.shape and spec.shape[0] == -1 and _first_axis(inputs[spec.name]) == 1 for spec in config.inputs
        )

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self._compiled.get_property("EXECUTION_DEVICES"))

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs) if self._fixed_one else self._run(inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        try:
            self._request.infer(inputs, share_inputs=True)
            # A copy: the request's output memory is used again by the next inference.
            return {name: self._request.get_tensor(port).data.copy() for name, port in self._outputs}
        except RuntimeError as exc:
            raise EngineError(f"openvino failed: {_last_line(exc)}") from exc


def _first_axis(port: Any) -> int:
    shape = port.partial_shape
    if shape.rank.is_dynamic or not len(shape) or shape[0].is_dynamic:
        return -1
    return int(shape[0].get_length())


def _last_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(exc).__name__
