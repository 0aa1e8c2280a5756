"""Stage 2, compile: onnxruntime (ONNX with QDQ int8). Data only; the work is in ``children/ort.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options, overflows
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
        """``reduce_range``: weights keep to 7 bits. ``float_first``: so many leading convolutions stay in float."""
        return chosen_options(
            self.name, device_class, version, {"reduce_range": overflows(device_class), "float_first": 0}
        )
