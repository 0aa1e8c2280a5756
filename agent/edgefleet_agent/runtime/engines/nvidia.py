"""What the adapters for NVIDIA's GPUs have in common: receives a plan (TensorRT's serialized engine), hands on a session on the GPU.

NVIDIA's packages are two: TensorRT's own, and ``cuda-python`` for memory, copies and streams. Their manners: TensorRT answers None or False where
others raise, and says why only to its logger; every function of CUDA answers a tuple that begins with a status. Here all that becomes an
error. A plan is made for one picture, which is what acceptance times; a batch runs row by row.
Proven against the recorded interfaces of both packages (``cuda-bindings`` 13.5, ``tensorrt_rtx`` 1.7), not on a board.
Source: NVIDIA TensorRT Python API 10.x and 11.x (``Runtime``, ``ICudaEngine``, ``IExecutionContext``); CUDA Runtime API.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import installed_version, row_by_row
from edgefleet_agent.runtime.tensors import NUMPY, Array

_CUDA_MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # the same functions, newer and older place
_CUDA = ("cuda-bindings", "cuda-python")
_HINT = "is the driver loaded, and are the GPU's device files open to the agent and the runtime?"


class Cuda:
    """CUDA's runtime functions as calls that raise.

    Args:
        runtime: the module of ``cuda-python``.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function answers after its status: nothing, a value, or several.

        Raises:
            EngineError: the status is not success.
        """
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            _, text = self._runtime.cudaGetErrorString(status)
            told = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            raise EngineError(f"{name}: {told} (CUDA error {int(status)})", hint=_HINT)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)


class Library(NamedTuple):
    """TensorRT's module, and CUDA on its first device."""

    trt: Any
    cuda: Cuda


class NvidiaEngine:
    """An engine that loads plans.

    Args:
        module: TensorRT's own; NVIDIA's wheels also have it as ``<module>_bindings``, alone.
        distributions: what brings it, NVIDIA's Debian packages and wheels.
        provider: what a session says of what computes.
    """

    def __init__(self, module: str, distributions: Sequence[str], provider: str) -> None:
        self._module, self._distributions, self._provider = module, distributions, provider
        self._library: Library | None = None

    def available(self) -> str | None:
        return installed_version(*self._distributions)

    def missing(self) -> str:
        lacking = [] if self.available() else [self._module]
        lacking += [] if installed_version(*_CUDA) else ["cuda-python"]
        which = f"package {lacking[0]} is" if len(lacking) == 1 else f"packages {' and '.join(lacking)} are"
        return f"NVIDIA's Python {which} not installed" if lacking else ""

    def load_library(self) -> Library:
        """TensorRT and CUDA. The GPU's context is made here: it reserves more addresses than any model may have."""
        if self._library is not None:
            return self._library
        # The driver keeps what it compiles in a file of its own, which a confined process may not write.
        os.environ["CUDA_CACHE_DISABLE"] = "1"
        trt = self._import((self._module, f"{self._module}_bindings"), "TensorRT")
        cuda = Cuda(self._import(_CUDA_MODULES, "CUDA's Python package"))
        if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            raise EngineError(
                f"{self._module} {trt.__version__} is too old here", hint="TensorRT 10 or newer is needed"
            )
        try:
            cuda.call("cudaSetDevice", 0)
            cuda.call("cudaFree", 0)
        except EngineError as exc:
            raise EngineError(f"no NVIDIA GPU answers: {exc.message}", hint=_HINT) from exc
        self._library = Library(trt, cuda)
        return self._library

    def _import(self, names: Sequence[str], what: str) -> Any:
        problem = ""
        for name in names:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError, RuntimeError) as exc:
                problem = str(exc)
        raise EngineError(f"{what} does not load on this board: {problem}", hint=self.missing())

    def load(self, path: Path, config: ModelConfig, threads: int) -> NvidiaSession:
        return NvidiaSession(self.load_library(), path, config, self._provider)


def one_picture(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of one picture's tensor.

    Raises:
        EngineError: sizes are open beside the batch.
    """
    shape = tuple(1 if axis == 0 and size == -1 else size for axis, size in enumerate(spec.shape))
    if -1 in shape:
        raise EngineError(
            f"tensor {spec.name} leaves sizes open beside the batch: {list(spec.shape)}",
            hint="give them in the model's manifest (spec.sizes); TensorRT plans for known sizes",
        )
    return shape


def logger(trt: Any) -> Any:
    """A logger that remembers the last error, which is the only place where TensorRT says why it answers None."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problem = "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.problem = message.strip()[:400]

    return Log()


class _Port:
    """One input or output of the plan beside the tensor that is served, and its memory where the plan wants it."""

    def __init__(self, spec: TensorSpec, dtype: Any, shape: tuple[int, ...], on_host: bool) -> None:
        self.spec, self.dtype, self.shape, self.on_host = spec, np.dtype(dtype), shape, on_host
        self.served = NUMPY[spec.datatype]
        if self.dtype != self.served and not (self.dtype.kind == self.served.kind == "f"):
            raise EngineError(f"tensor {spec.name} is {self.dtype} in the plan, the artifact promises {spec.datatype}")
        if shape != one_picture(spec):
            raise EngineError(
                f"tensor {spec.name} is {list(shape)} in the plan, the artifact promises {list(spec.shape)}"
            )
        self.size = max(1, int(np.prod(shape))) * self.dtype.itemsize
        self.host: Array = np.zeros(shape, self.dtype) if on_host else np.empty(0, self.dtype)
        self.address = int(self.host.ctypes.data) if on_host else 0


class NvidiaSession:
    """A plan on the GPU.

    Everything that CUDA gave is given back when the session goes, or when loading it fails halfway.
    """

    def __init__(self, library: Library, path: Path, config: ModelConfig, provider: str) -> None:
        self._trt, self._cuda = library
        # A plan has nothing that runs elsewhere: what TensorRT can't do on the GPU is refused when it is built.
        self.providers: tuple[str, ...] = (provider,)
        with ExitStack() as given:
            self._open(path, config, given)
            self._close = weakref.finalize(self, given.pop_all().close)

    def _open(self, path: Path, config: ModelConfig, given: ExitStack) -> None:
        trt, cuda = self._trt, self._cuda
        self._log = logger(trt)
        runtime = trt.Runtime(self._log)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(f"TensorRT can't load the plan: {self._log.problem}")
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"TensorRT has no memory to run the plan: {self._log.problem}")
        self._stream = cuda.call("cudaStreamCreate")
        given.callback(cuda.call, "cudaStreamDestroy", self._stream)
        # Undone from the end: memory, then what used it (the context first), then the stream.
        self._kept = [runtime, engine, context]
        given.callback(self._kept.clear)
        ports = self._ports(engine, config)
        for port in ports:
            if not port.on_host:
                port.address = int(cuda.call("cudaMalloc", port.size))
                given.callback(cuda.call, "cudaFree", port.address)
            if not self._kept[-1].set_tensor_address(port.spec.name, port.address):
                raise EngineError(f"TensorRT refuses the memory of {port.spec.name}: {self._log.problem}")

    def _ports(self, engine: Any, config: ModelConfig) -> list[_Port]:
        """Inputs first: only once their shapes are set has the plan shapes for its outputs."""
        trt, context = self._trt, self._kept[-1]
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        for what, found, promised in (("inputs", inputs, config.inputs), ("outputs", outputs, config.outputs)):
            wanted = [spec.name for spec in promised]
            if sorted(found) != sorted(wanted):
                raise EngineError(f"the plan's {what} are {sorted(found)}, the artifact promises {sorted(wanted)}")
        for spec in config.inputs:
            if not context.set_input_shape(spec.name, one_picture(spec)):
                raise EngineError(
                    f"the plan takes no {spec.name} of the shape that the artifact promises, {list(spec.shape)}:"
                    f" {self._log.problem}"
                )

        def port(spec: TensorSpec) -> _Port:
            on_host = engine.get_tensor_location(spec.name) == trt.TensorLocation.HOST
            try:
                dtype = trt.nptype(engine.get_tensor_dtype(spec.name))
            except TypeError as exc:  # bfloat16 and the like
                raise EngineError(f"tensor {spec.name} is of a type that numpy does not have") from exc
            return _Port(spec, dtype, tuple(context.get_tensor_shape(spec.name)), on_host)

        self._inputs, self._outputs = [port(s) for s in config.inputs], [port(s) for s in config.outputs]
        return [*self._inputs, *self._outputs]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        # Copies run on behind our back: what they read and write lives until the stream has come to its end.
        held: list[Array] = []
        try:
            return self._compute(inputs, held)
        except EngineError:
            with suppress(EngineError):
                self._cuda.call("cudaStreamSynchronize", self._stream)
            raise
        finally:
            held.clear()

    def _compute(self, inputs: dict[str, Array], held: list[Array]) -> dict[str, Array]:
        cuda, stream = self._cuda, self._stream
        for port in self._inputs:
            value = np.ascontiguousarray(inputs[port.spec.name], dtype=port.dtype)
            if value.nbytes != port.size:
                raise EngineError(f"input {port.spec.name} is {list(value.shape)}, the plan takes {list(port.shape)}")
            if port.on_host:
                np.copyto(port.host, value.reshape(port.shape))
                continue
            held.append(value)
            cuda.call("cudaMemcpyAsync", port.address, int(value.ctypes.data), port.size, cuda.to_device, stream)
        if not self._kept[-1].execute_async_v3(int(stream)):
            raise EngineError(f"TensorRT failed: {self._log.problem}")
        answers = []
        for port in self._outputs:
            if port.on_host:
                answers.append(port.host)
                continue
            answer: Array = np.empty(port.shape, port.dtype)
            held.append(answer)
            cuda.call("cudaMemcpyAsync", int(answer.ctypes.data), port.address, port.size, cuda.to_host, stream)
            answers.append(answer)
        cuda.call("cudaStreamSynchronize", stream)
        # What lies in the session's own memory is overwritten by the next inference.
        return {
            port.spec.name: answer.astype(port.served, copy=port.on_host)
            for port, answer in zip(self._outputs, answers, strict=True)
        }
