"""Engine adapter: receives an ONNX file and builds a plan of it on this board, then receives the plan and hands on a session on the GPU.

A plan is good for one GPU, one driver and one version of TensorRT, so it is built where it runs (the state ``building``). The precision of each
layer lies in the ONNX file's types, never in a flag of the builder: what the compiler measured is what the board computes.
Proven against the recorded interface, and building against the real ``tensorrt_rtx`` 1.7, which needs no GPU to build; not on a board.
Source: NVIDIA TensorRT Python API 10.x and 11.x (``Builder``, ``OnnxParser``, ``IBuilderConfig``, ``IProgressMonitor``); "Strongly typed networks".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.nvidia import NvidiaEngine, logger, one_picture

DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")
_DRIVER_VERSION = Path(
    "/sys/module/nvidia/version"
)  # Jetson's kernel module has none: there the CUDA version stands for it


class TensorrtEngine(NvidiaEngine):
    name = "tensorrt"

    def __init__(self) -> None:
        super().__init__("tensorrt", DISTRIBUTIONS, "TensorRT")

    def build_key(self) -> str:
        trt, cuda = self.load_library()
        properties = cuda.call("cudaGetDeviceProperties", 0)
        gpu = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        driver = f"CUDA {cuda.call('cudaDriverGetVersion')}"
        if _DRIVER_VERSION.exists():
            driver = f"{_DRIVER_VERSION.read_text().strip()}, {driver}"
        return f"tensorrt {trt.__version__}, driver {driver}, {gpu} (compute {properties.major}.{properties.minor})"

    def build(
        self,
        source: Path,
        config: ModelConfig,
        memory_bytes: int,
        plan: BinaryIO,
        told: Callable[[str, int, int], None],
    ) -> None:
        build_plan(self.load_library().trt, source, config, memory_bytes, plan, told)


def build_plan(
    trt: Any,
    source: Path,
    config: ModelConfig,
    memory_bytes: int,
    plan: BinaryIO,
    told: Callable[[str, int, int], None],
) -> None:
    """ONNX to plan, see :meth:`edgefleet_agent.runtime.engines.port.Builder.build`; needs no more of TensorRT than its module."""
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    told("reading the network", 0, 0)
    if not parser.parse_from_file(str(source)):
        problems = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise EngineError(f"TensorRT can't read the network: {'; '.join(problems[:3]) or log.problem}")
    options = builder.create_builder_config()
    # Half: the builder itself, the network and the timed candidates are in this process too.
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, memory_bytes // 2)
    options.progress_monitor = monitor = _monitor(trt, told)
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
        shape = one_picture(promised[name])
        profile = profile or builder.create_optimization_profile()
        profile.set_shape(name, shape, shape, shape)
    if profile is not None and options.add_optimization_profile(profile) < 0:
        raise EngineError("TensorRT refuses the sizes that the artifact promises")


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
