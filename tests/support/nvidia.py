"""NVIDIA's Python packages as recorded: names, signatures and manners of what our adapters call, on a device whose memory is bytes apart.

Recorded from ``tensorrt_rtx`` 1.7.1 (docstrings of its bindings: None instead of an engine, False instead of an exception, the reason to the
logger alone) and ``cuda-bindings`` 13.5.0 (every function answers a tuple that begins with a status; without a driver the status is
cudaErrorInsufficientDriver). A plan here is ``PLAN`` and the ONNX it was built of, which onnxruntime computes. The device knows its own addresses: a
copy of the wrong kind, of too much, or from memory that was given back is an error, as is what is still held at the end.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class Gpu:
    """The device: its memory, and what of it is held."""

    def __init__(self) -> None:
        self.present = True
        self.held: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.waiting: list[Callable[[], None]] = []  # copies and inferences that the stream has not come to yet
        self._next = itertools.count(0x7000_0000_0000, 1 << 20)
        self._stream = itertools.count(1)

    def malloc(self, size: int) -> int:
        address = next(self._next)
        self.held[address] = ctypes.create_string_buffer(size)
        return address

    def buffer(self, address: int) -> Any:
        return self.held[address]

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A device tensor; a host address where the plan wants one."""
        count = int(np.prod(shape))
        if address in self.held:
            return np.frombuffer(self.held[address], dtype, count).reshape(shape)
        raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
        return np.frombuffer(raw, dtype, count).reshape(shape)

    def synchronize(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


def cuda_runtime(gpu: Gpu) -> types.ModuleType:
    """``cuda.bindings.runtime`` with this device."""
    module = types.ModuleType("cuda.bindings.runtime")
    good, bad = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue

    def device(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            if not gpu.present:
                return (cudaError_t.cudaErrorInsufficientDriver, *[None] * (len(call(*arguments)) - 1))
            return call(*arguments)

        return checked

    def free(devPtr: int) -> tuple[Any, ...]:
        if int(devPtr) == 0:  # what makes a context
            return (good,)
        return (good,) if gpu.held.pop(int(devPtr), None) is not None else (bad,)

    def copy(dst: int, src: int, count: int, kind: Any, stream: int) -> tuple[Any, ...]:
        on_device = [address in gpu.held for address in (dst, src)]
        wanted = {1: [True, False], 2: [False, True]}[int(kind)]
        if on_device != wanted or int(stream) not in gpu.streams:
            return (bad,)
        device_side = gpu.held[dst if wanted[0] else src]
        if count > len(device_side):
            return (bad,)

        def later() -> None:
            target = device_side if wanted[0] else dst
            ctypes.memmove(target, src if wanted[0] else device_side, count)

        gpu.waiting.append(later)
        return (good,)

    def stream_create() -> tuple[Any, ...]:
        stream = next(gpu._stream)
        gpu.streams.add(stream)
        return good, stream

    def stream_destroy(stream: int) -> tuple[Any, ...]:
        gpu.streams.remove(int(stream))
        return (good,)

    def synchronize(stream: int) -> tuple[Any, ...]:
        gpu.synchronize()
        return (good,)

    properties = types.SimpleNamespace(name=b"Orin", major=8, minor=7)
    functions: dict[str, Callable[..., Any]] = {
        "cudaSetDevice": device(lambda device: (good,)),
        "cudaFree": device(free),
        "cudaMalloc": device(lambda size: (good, gpu.malloc(size))),
        "cudaMemcpyAsync": device(copy),
        "cudaStreamCreate": device(stream_create),
        "cudaStreamDestroy": device(stream_destroy),
        "cudaStreamSynchronize": device(synchronize),
        "cudaGetDeviceProperties": device(lambda device: (good, properties)),
        "cudaDriverGetVersion": lambda: (good, 12060 if gpu.present else 0),
        "cudaGetErrorString": lambda error: (good, error.name.encode()),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    module.cudaError_t, module.cudaMemcpyKind = cudaError_t, cudaMemcpyKind  # type: ignore[attr-defined]
    return module


def tensorrt(gpu: Gpu, name: str = "tensorrt") -> types.ModuleType:
    """TensorRT's module with this device. ``on_host`` names tensors that its plans want in host memory."""
    trt = types.ModuleType(name)
    trt.__version__ = "10.3.0"  # type: ignore[attr-defined]
    trt.on_host = set()  # type: ignore[attr-defined]

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self) -> None: ...

        def log(self, severity: Any, msg: str) -> None: ...

    class Tensor:
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self.name, self.shape = name, shape

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            assert flags == 1, "the types say the precision: STRONGLY_TYPED"
            self.content, self.inputs = b"", list[Tensor]()

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

        def get_input(self, index: int) -> Tensor:
            return self.inputs[index]

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network, self.num_errors = network, 0

        def parse_from_file(self, model: str) -> bool:
            import onnx

            self._network.content = Path(model).read_bytes()
            try:
                graph = onnx.load_from_string(self._network.content).graph
                assert graph.input
            except Exception:  # noqa: BLE001 - whatever it is, it is no network
                self.num_errors = 1
                return False
            for value in graph.input:
                shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)
                self._network.inputs.append(Tensor(value.name, shape))
            return True

        def get_error(self, index: int) -> Any:
            return types.SimpleNamespace(desc=lambda: "Failed to parse the ONNX model")

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self.shapes[input] = (min, opt, max)

    class IBuilderConfig:
        def __init__(self) -> None:
            self.progress_monitor: Any = None
            self.profiles: list[IOptimizationProfile] = []
            self.limits: dict[Any, int] = {}

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self.limits[pool] = pool_size

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
            known = {name for profile in config.profiles for name in profile.shapes}
            if any(-1 in tensor.shape and tensor.name not in known for tensor in network.inputs):
                self._logger.log(ILogger.Severity.ERROR, "Network has dynamic inputs, but no optimization profile")
                return None
            monitor = config.progress_monitor
            monitor.phase_start("Building Engine", None, 2)
            for step in range(2):
                assert monitor.step_complete("Building Engine", step) is True
            monitor.phase_finish("Building Engine")
            return b"PLAN" + network.content

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            known = self._engine.shapes[name]
            if len(known) != len(shape) or any(k not in (-1, n) for k, n in zip(known, shape, strict=True)):
                self._engine.logger.log(ILogger.Severity.ERROR, f"input {name} takes {known}")
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._shapes.get(name) or tuple(
                1 if n == -1 and self._shapes else n for n in self._engine.shapes[name]
            )

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return (memory in gpu.held) != (name in trt.on_host)

        def execute_async_v3(self, stream_handle: int) -> bool:
            if stream_handle not in gpu.streams or set(self.addresses) != set(self._engine.shapes):
                return False
            gpu.waiting.append(self._compute)
            return True

        def _compute(self) -> None:
            feeds = {
                name: gpu.array(self.addresses[name], self.get_tensor_shape(name), np.float32)
                for name in self._engine.inputs
            }
            found = self._engine.session.run(self._engine.outputs, feeds)
            for name, value in zip(self._engine.outputs, found, strict=True):
                gpu.array(self.addresses[name], value.shape, np.float32)[...] = value

    class ICudaEngine:
        def __init__(self, content: bytes, logger: ILogger) -> None:
            import onnxruntime

            self.logger = logger
            self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            every = (*self.session.get_inputs(), *self.session.get_outputs())
            self.inputs = [i.name for i in self.session.get_inputs()]
            self.outputs = [o.name for o in self.session.get_outputs()]
            self.shapes = {t.name: tuple(n if isinstance(n, int) else -1 for n in t.shape) for t in every}

        @property
        def num_io_tensors(self) -> int:
            return len(self.shapes)

        def get_tensor_name(self, index: int) -> str:
            return list(self.shapes)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

        def get_tensor_location(self, name: str) -> Any:
            return TensorLocation.HOST if name in trt.on_host else TensorLocation.DEVICE

        def get_tensor_dtype(self, name: str) -> str:
            return "FLOAT"

        def create_execution_context(self) -> IExecutionContext:
            return IExecutionContext(self)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            if serialized_engine[:4] != b"PLAN":
                self._logger.log(ILogger.Severity.ERROR, "Serialization assertion magicTag == kPLAN_MAGIC_TAG failed")
                return None
            return ICudaEngine(serialized_engine[4:], self._logger)

    class IProgressMonitor:
        def __init__(self) -> None: ...

    class TensorIOMode(enum.Enum):
        NONE, INPUT, OUTPUT = range(3)

    class TensorLocation(enum.Enum):
        DEVICE, HOST = range(2)

    class MemoryPoolType(enum.Enum):
        WORKSPACE = 0

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 0

    def nptype(trt_type: str) -> Any:
        if trt_type != "FLOAT":
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return np.float32

    for part in (
        ILogger, INetworkDefinition, OnnxParser, IOptimizationProfile, IBuilderConfig, Builder, IExecutionContext, ICudaEngine,
        Runtime, IProgressMonitor, TensorIOMode, TensorLocation, MemoryPoolType, NetworkDefinitionCreationFlag, nptype,
    ):  # fmt: skip
        setattr(trt, part.__name__, part)
    return trt


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, module: str = "tensorrt", distribution: str = "tensorrt"
) -> Gpu:
    """Make TensorRT and CUDA importable and their distributions known, for the rest of a test. Returns the device."""
    for name, version in ((distribution, "10.3.0"), ("cuda-bindings", "13.5.0")):
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True, exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    gpu = Gpu()
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = cuda_runtime(gpu)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    monkeypatch.setitem(sys.modules, module, tensorrt(gpu, module))
    return gpu
