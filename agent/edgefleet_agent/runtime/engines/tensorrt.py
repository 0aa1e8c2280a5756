"""Engine adapter: receives an ONNX file and builds a plan of it, or receives a plan and hands on a session on an NVIDIA GPU.

A plan is good for one GPU and, as it is built here, one version of TensorRT. NVIDIA's packages are two: ``tensorrt`` (or
``tensorrt_rtx``), and ``cuda-python`` for memory, copies and streams. Their manners: TensorRT answers None or False where others raise, and says why only to
its logger; every function of CUDA answers a tuple that begins with a status. Here all that becomes an error.
Up to TensorRT 10 the precision is asked of the builder, from 11 on it lies in the ONNX file alone. A batch runs row by row: the plan is built
for one picture, which is what acceptance times.
Proven against the recorded interfaces of both packages, and building against the real ``tensorrt_rtx``, which needs no GPU; not on a board.
Source: NVIDIA TensorRT Python API 10.x and 11.x (``Builder``, ``OnnxParser``, ``ICudaEngine``, ``IExecutionContext``); CUDA Runtime API.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.port import installed_version, row_by_row
from edgefleet_agent.runtime.tensors import NUMPY, Array

# Module -> the distributions that bring it: NVIDIA's Debian packages (JetPack) and its wheels.
_TENSORRT = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu12-bindings"),
}
_CUDA_MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # the same functions, newer and older place
_CUDA = ("cuda-bindings", "cuda-python")
_DRIVER_VERSION = Path("/sys/module/nvidia/version")  # Jetson's kernel module has none: there the CUDA version stands for it
_HINT = "is the driver loaded, and are the GPU's device files open to the agent and the runtime?"


class _Library(NamedTuple):
    """TensorRT's module, its name, and CUDA on its first device."""

    trt: Any
    name: str
    cuda: Cuda


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


class TensorrtEngine:
    name = "tensorrt"

    def __init__(self) -> None:
        self._library: _Library | None = None

    def available(self) -> str | None:
        return next((v for names in _TENSORRT.values() if (v := installed_version(*names))), None)

    def missing(self) -> str:
        lacking = []
        if self.available() is None:
            lacking.append("NVIDIA's Python package tensorrt (JetPack: python3-libnvinfer) or tensorrt_rtx")
        if installed_version(*_CUDA) is None:
            lacking.append("NVIDIA's Python package cuda-python")
        return " and ".join(lacking) + (" is not installed" if lacking else "")

    def load_library(self) -> _Library:
        """TensorRT and CUDA. The GPU's context is made here: it reserves more addresses than any model may have."""
        if self._library is not None:
            return self._library
        runtime = self._import(_CUDA_MODULES, "CUDA's Python package")
        modules = [name for name, found in _TENSORRT.items() if installed_version(*found)] or list(_TENSORRT)
        trt = self._import(modules, "TensorRT")
        cuda = Cuda(runtime)
        try:
            cuda.call("cudaSetDevice", 0)
            cuda.call("cudaFree", 0)
        except EngineError as exc:
            raise EngineError(f"no NVIDIA GPU answers: {exc.message}", hint=_HINT) from exc
        self._library = _Library(trt, trt.__name__, cuda)
        return self._library

    def _import(self, names: Any, what: str) -> Any:
        problem = ""
        for name in names:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError, RuntimeError) as exc:
                problem = str(exc)
        raise EngineError(f"{what} does not load on this board: {problem}", hint=self.missing())

    def build_key(self) -> str:
        trt, name, cuda = self.load_library()
        properties = cuda.call("cudaGetDeviceProperties", 0)
        gpu = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        driver = f"CUDA {cuda.call('cudaDriverGetVersion')}"
        if _DRIVER_VERSION.exists():
            driver = f"{_DRIVER_VERSION.read_text().strip()}, {driver}"
        return f"{name} {trt.__version__}, driver {driver}, {gpu} (compute {properties.major}.{properties.minor})"

    def build(
        self, source: Path, config: ModelConfig, memory_bytes: int, plan: BinaryIO, told: Callable[[str, int, int], None]
    ) -> None:
        build_plan(self.load_library().trt, source, config, memory_bytes, plan, told)

    def load(self, path: Path, config: ModelConfig, threads: int) -> TensorrtSession:
        return TensorrtSession(self.load_library(), path, config)


# --- building --------------------------------------------------------------------------------------------------------


def build_plan(
    trt: Any, source: Path, config: ModelConfig, memory_bytes: int, plan: BinaryIO, told: Callable[[str, int, int], None]
) -> None:
    """ONNX to plan, see :meth:`edgefleet_agent.runtime.engines.port.Builder.build`; needs no more of TensorRT than its module."""
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    told("reading the network", 0, 0)
    if not parser.parse_from_file(str(source)):
        problems = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise EngineError(f"TensorRT can't read the network: {'; '.join(problems[:3]) or log.problem}")
    options = builder.create_builder_config()
    # Half: the builder itself, the network and the timed candidates are in this process too.
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, memory_bytes // 2)
    options.progress_monitor = monitor = _monitor(trt, told)
    flag = getattr(trt.BuilderFlag, {"int8": "INT8", "fp16": "FP16"}.get(config.precision, ""), None)
    if flag is not None:  # TensorRT 10; what the compiler left in float stays in float
        options.set_flag(flag)
    _fix_sizes(builder, network, options, config)
    made = builder.build_serialized_network(network, options)
    del monitor  # it must live as long as the build
    if made is None:
        raise EngineError(f"TensorRT can't build the network: {log.problem}")
    plan.write(memoryview(made))
    plan.flush()


def _fix_sizes(builder: Any, network: Any, options: Any, config: ModelConfig) -> None:
    """Sizes that the network leaves open are what the artifact serves; a batch is one picture."""
    promised = {spec.name: spec for spec in config.inputs}
    found = {network.get_input(number).name: network.get_input(number) for number in range(network.num_inputs)}
    if set(found) != set(promised):
        raise EngineError(f"the network's inputs are {sorted(found)}, the artifact promises {sorted(promised)}")
    profile = None
    for name, tensor in found.items():
        if -1 not in tuple(tensor.shape):
            continue
        shape = _one_picture(promised[name])
        profile = profile or builder.create_optimization_profile()
        profile.set_shape(name, shape, shape, shape)
    if profile is not None and options.add_optimization_profile(profile) < 0:
        raise EngineError("TensorRT refuses the sizes that the artifact promises")


def _one_picture(spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(1 if axis == 0 and size == -1 else size for axis, size in enumerate(spec.shape))
    if -1 in shape:
        raise EngineError(
            f"tensor {spec.name} leaves sizes open beside the batch: {list(spec.shape)}",
            hint="give them in the model's manifest (spec.sizes); TensorRT plans for known sizes",
        )
    return shape


def _log(trt: Any) -> Any:
    """A logger that remembers the last error, which is the only place where TensorRT says why it answers None."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problem = "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.problem = message.strip()[:400]

    return Log()


def _monitor(trt: Any, told: Callable[[str, int, int], None]) -> Any:
    """Progress of a build; called by TensorRT's own threads, of which several may be at it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._steps[phase_name] = num_steps
                told(f"building: {phase_name}", 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                told(f"building: {phase_name}", step + 1, self._steps.get(phase_name, 0))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._steps.pop(phase_name, None)

    return Monitor()


# --- running ---------------------------------------------------------------------------------------------------------


class _Port:
    """One input or output of the plan beside the tensor that is served, and its memory where the plan wants it."""

    def __init__(self, spec: TensorSpec, dtype: Any, shape: tuple[int, ...], on_host: bool) -> None:
        self.spec, self.dtype, self.shape, self.on_host = spec, np.dtype(dtype), shape, on_host
        self.served = NUMPY[spec.datatype]
        if self.dtype != self.served and not (self.dtype.kind == self.served.kind == "f"):
            raise EngineError(f"tensor {spec.name} is {self.dtype} in the plan, the artifact promises {spec.datatype}")
        if shape != _one_picture(spec):
            raise EngineError(
                f"tensor {spec.name} is {list(shape)} in the plan, the artifact promises {list(spec.shape)}"
            )
        self.size = max(1, int(np.prod(shape))) * self.dtype.itemsize
        self.host: Array = np.zeros(shape, self.dtype) if on_host else np.empty(0, self.dtype)
        self.address = int(self.host.ctypes.data) if on_host else 0


class TensorrtSession:
    """A plan on the GPU.

    Everything that CUDA gave is given back when the session goes, or when loading it fails halfway.
    """

    def __init__(self, library: _Library, path: Path, config: ModelConfig) -> None:
        self._trt, _, self._cuda = library
        with ExitStack() as given:
            self._open(path, config, given)
            self._close = weakref.finalize(self, given.pop_all().close)

    def _open(self, path: Path, config: ModelConfig, given: ExitStack) -> None:
        trt, cuda = self._trt, self._cuda
        self._log = _log(trt)
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
            if not context.set_input_shape(spec.name, _one_picture(spec)):
                raise EngineError(
                    f"the plan takes no {spec.name} of the shape that the artifact promises, {list(spec.shape)}:"
                    f" {self._log.problem}"
                )

        def port(spec: TensorSpec) -> _Port:
            on_host = engine.get_tensor_location(spec.name) == trt.TensorLocation.HOST
            dtype = trt.nptype(engine.get_tensor_dtype(spec.name))
            return _Port(spec, dtype, tuple(context.get_tensor_shape(spec.name)), on_host)

        self._inputs, self._outputs = [port(s) for s in config.inputs], [port(s) for s in config.outputs]
        return [*self._inputs, *self._outputs]

    @property
    def providers(self) -> tuple[str, ...]:
        # A plan has nothing that runs elsewhere: what TensorRT can't do on the GPU is refused when it is built.
        return ("TensorRT",)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return row_by_row(self._run, inputs)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        cuda, stream = self._cuda, self._stream
        held = []  # copies run on behind our back: what they read lives until the stream has come to its end
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
            cuda.call("cudaStreamSynchronize", stream)
            raise EngineError(f"TensorRT failed: {self._log.problem}")
        answers = []
        for port in self._outputs:
            if port.on_host:
                answers.append(port.host)
                continue
            answer: Array = np.empty(port.shape, port.dtype)
            cuda.call("cudaMemcpyAsync", int(answer.ctypes.data), port.address, port.size, cuda.to_host, stream)
            answers.append(answer)
        cuda.call("cudaStreamSynchronize", stream)
        del held
        # What lies in the session's own memory is overwritten by the next inference.
        return {
            port.spec.name: answer.astype(port.served, copy=port.on_host)
            for port, answer in zip(self._outputs, answers, strict=True)
        }
