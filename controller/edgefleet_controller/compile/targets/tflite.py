"""Stage 2, compile: TFLite (LiteRT, tflite-runtime). Data only; the work is in ``children/litert.py``.

ONNX is written as a float .tflite directly and quantized by ai-edge-quantizer: no TensorFlow and no torch, 0.3 GB instead of 2.
"""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.source import ModelVersion


class TfliteTarget:
    name = "tflite"
    engine = "tflite"
    toolchain = "tflite"
    module = "litert"
    engine_package = "ai_edge_litert"
    precisions = frozenset({"int8", "fp32"})
    methods = frozenset({"minmax"})
    providers = ("CPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``float_first``: so many leading convolutions stay in float. XNNPACK widens products, so nothing overflows."""
        return chosen_options(self.name, device_class, version, {"float_first": 0})
