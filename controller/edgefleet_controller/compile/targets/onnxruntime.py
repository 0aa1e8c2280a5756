"""Stage 2, compile: onnxruntime (ONNX with QDQ int8). Data only; the work is in ``children/ort.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, known_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.source import ModelVersion


class OnnxruntimeTarget:
    name = "onnxruntime"
    engine = "onnxruntime"
    toolchain = "onnxruntime"
    module = "ort"
    engine_package = "onnxruntime"
    precisions = frozenset({"int8", "fp32"})
    methods = frozenset({"minmax", "percentile", "entropy"})
    providers = ("CPUExecutionProvider",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``reduce_range``: 7-bit weights. x86 without VNNI adds pairs of u8*s8 products in 16 bits, which saturate with
        8-bit weights (MobileNetV3 lost 5 points of accuracy on such CPUs); so it is on unless the class promises VNNI."""
        known_options(self.name, device_class.options, ["reduce_range"])
        vnni = any("vnni" in feature for feature in device_class.cpu_features)
        return {"reduce_range": device_class.options.get("reduce_range", device_class.arch == "x86_64" and not vnni)}
