"""Engine adapter: receives an engine that TensorRT-RTX built ahead of time, hands on a session on the GPU.

Such an engine holds kernels for the GPUs that it was made for; their last compilation happens when it is loaded, which acceptance times.
Nothing is built on the board. Source: TensorRT-RTX's developer guide, ahead-of-time compilation; the rest is :mod:`.nvidia`'s.
"""

from __future__ import annotations

from edgefleet_agent.runtime.engines.nvidia import NvidiaEngine

DISTRIBUTIONS = (
    "tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings",
)  # fmt: skip


class TensorrtRtxEngine(NvidiaEngine):
    name = "tensorrt-rtx"

    def __init__(self) -> None:
        super().__init__("tensorrt_rtx", DISTRIBUTIONS, "TensorRT-RTX")
