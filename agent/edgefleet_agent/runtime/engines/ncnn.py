"""Engine adapter: receives an ncnn network as one blob, hands on a session on the CPU.

ncnn's network is two files. The blob begins with ``model.bin``, which ncnn reads from the blob's own path and only as far as it goes, and ends
with a ZIP archive that stores ``model.param``: weights that are handed over in memory would have to stay there, and a confined process
writes no file. ncnn's methods answer a status where others raise; here that becomes an error. It computes one picture at a time; its values
are ``in0``, ``out0``, ... in the artifact's order, without the batch axis, but where an input's line in ``model.param`` tells its sizes. Source:
ncnn's Python binding (``Net``, ``Extractor``, ``Mat``).
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import installed_version, row_by_row
from edgefleet_agent.runtime.tensors import NUMPY, Array

MEMBER = "model.param"
_MAGIC = b"7767517"  # a .param's first line
_WITH_SIZES = re.compile(r"^Input\s+in(\d+)\s.*\s0=", re.M)


class NcnnEngine:
    name = "ncnn"

    def available(self) -> str | None:
        return installed_version("ncnn")

    def missing(self) -> str:
        return "" if self.available() else "the Python package ncnn is not installed"

    def load_library(self) -> Any:
        try:
            import ncnn
        except (ImportError, OSError) as exc:
            raise EngineError(f"ncnn does not load on this board: {exc}", hint=self.missing()) from exc
        return ncnn

    def load(self, path: Path, config: ModelConfig, threads: int) -> NcnnSession:
        ncnn = self.load_library()
        param = _param(path)
        network = ncnn.Net()
        network.opt.num_threads = threads
        network.opt.use_vulkan_compute = False
        # What was measured is float32; half precision is another network.
        for half in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(network.opt, half, False)
        if network.load_param_mem(param) != 0 or network.load_model(str(path)) != 0:
            raise EngineError("ncnn can't load the model: a layer that this version lacks, or a torn file")
        session = NcnnSession(ncnn, network, config, {int(n) for n in _WITH_SIZES.findall(param)})
        # The files tell no shapes: one inference shows whether they are the promised ones.
        session.run(
            {s.name: np.zeros([1 if n == -1 else n for n in s.shape], NUMPY[s.datatype]) for s in config.inputs}
        )
        return session


def _param(path: Path) -> str:
    """The topology, out of the blob's end."""
    try:
        with zipfile.ZipFile(path) as archive:
            # A stored member can't be larger than the file, so no archive bomb gets through.
            if archive.getinfo(MEMBER).compress_type != zipfile.ZIP_STORED:
                raise EngineError(f"{MEMBER} in the ncnn blob is compressed; it must be stored")
            param = archive.read(MEMBER)
    except (zipfile.BadZipFile, KeyError, OSError) as exc:
        raise EngineError(f"not an ncnn blob (model.bin, then a ZIP of {MEMBER}): {exc}") from exc
    if not param.startswith(_MAGIC):
        raise EngineError(f"{MEMBER} in the ncnn blob does not begin as ncnn's text does")
    return param.decode(errors="replace")


class NcnnSession:
    def __init__(self, ncnn: Any, network: Any, config: ModelConfig, with_batch_axis: set[int]) -> None:
        self._ncnn, self._network, self._with_batch_axis = ncnn, network, with_batch_axis
        self._inputs, self._outputs = config.inputs, config.outputs
        for what, found, promised in (
            ("inputs", network.input_names(), [f"in{i}" for i in range(len(config.inputs))]),
            ("outputs", network.output_names(), [f"out{i}" for i in range(len(config.outputs))]),
        ):
            if sorted(found) != sorted(promised):
                raise EngineError(f"the ncnn network has the {what} {sorted(found)}, the artifact promises {promised}")

    @property
    def providers(self) -> tuple[str, ...]:
        return ("CPU",)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        extractor = self._network.create_extractor()
        held = []  # a Mat borrows its memory
        for place, spec in enumerate(self._inputs):
            value = inputs[spec.name]
            held.append(np.ascontiguousarray(value if place in self._with_batch_axis else value[0], np.float32))
        for place, value in enumerate(held):
            if extractor.input(f"in{place}", self._ncnn.Mat(value)) != 0:
                raise EngineError(f"ncnn does not take the input {self._inputs[place].name}")
        found = {}
        for place, spec in enumerate(self._outputs):
            status, value = extractor.extract(f"out{place}")
            if status != 0:
                raise EngineError(f"ncnn failed to compute {spec.name} (status {status})")
            answer = np.array(value, NUMPY[spec.datatype])  # a copy: the Mat's memory is ncnn's
            wanted = [1 if n == -1 else n for n in spec.shape]
            if answer.size != int(np.prod(wanted)):
                raise EngineError(
                    f"output {spec.name} is {list(answer.shape)}, the artifact promises {list(spec.shape)}"
                )
            found[spec.name] = answer.reshape(wanted)
        return found
