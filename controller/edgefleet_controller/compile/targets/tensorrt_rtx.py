"""Stage 2, compile: TensorRT-RTX (engines built ahead of time for named GPUs). The work is in ``children/tensorrt_rtx.py``."""

from __future__ import annotations

import re

from edgefleet_shared.errors import ManifestError

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.compile.targets.tensorrt import symmetric_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion


class TensorrtRtxTarget:
    name = "tensorrt-rtx"
    engine = "tensorrt-rtx"
    toolchain = "tensorrt-rtx"
    lock = ""
    module = "tensorrt_rtx"
    tools = ()
    engine_package = "tensorrt_rtx_cu12_bindings"
    precisions = frozenset({"int8", "fp16", "fp32"})
    methods = frozenset({"minmax", "percentile", "entropy", "mse"})
    quantizers = ("edgefleet",)
    reads_qdq = True
    ships_onnx = False
    measures_onnx = True
    leaves_in_float = True
    halves_weights = False
    runs_here = True
    stand_in = "onnxruntime, on the network that the engine was built from"
    providers = ("TensorRT-RTX",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``capabilities``: compute capabilities of the class's GPUs, such as ``8.6,8.9``. ``workspace_mb``: of GPU memory while building."""
        own: Options = {"capabilities": "8.6", "workspace_mb": 512}
        chosen = chosen_options(self.name, device_class, version, symmetric_options(device_class) | own)
        if not re.fullmatch(r"\d+\.\d(,\d+\.\d)*", str(chosen["capabilities"])):
            raise ManifestError(f"option 'capabilities' is {chosen['capabilities']!r}, expected such as 8.6,8.9")
        return chosen
