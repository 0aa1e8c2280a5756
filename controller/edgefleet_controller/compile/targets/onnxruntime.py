"""Stage 2, compile: onnxruntime (ONNX with QDQ int8). Data only; the work is in ``children/ort.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options, quantizing_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion


class OnnxruntimeTarget:
    name = "onnxruntime"
    engine = "onnxruntime"
    toolchain = "onnxruntime"
    lock = ""
    module = "ort"
    tools = ()
    engine_package = "onnxruntime"
    precisions = frozenset({"int8", "fp16", "fp32"})
    methods = frozenset({"minmax", "percentile", "entropy", "mse"})
    quantizers = ("edgefleet",)
    reads_qdq = True
    ships_onnx = True
    measures_onnx = True
    leaves_in_float = True
    halves_weights = True
    runs_here = True
    stand_in = ""
    providers = ("CPUExecutionProvider",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``gates_in_int8``: other engines that read QDQ have such operators, or fuse them. ``aligned_channels``: others lay channels out in blocks
        of their own; it costs bytes."""
        aligned = device_class.search.prefer not in ("size", "transfer")
        defaults = quantizing_options(device_class) | {"gates_in_int8": True, "aligned_channels": aligned}
        return chosen_options(self.name, device_class, version, defaults)
