"""Stage 2, compile: TFLite (LiteRT, tflite-runtime). Data only; the work is in ``children/litert.py``.

ONNX is written as a float .tflite directly and quantized by ai-edge-quantizer: no TensorFlow and no torch, 0.3 GB instead of 2. A network that
came from Keras is also given to TensorFlow's own converter, as a candidate (ADR 0016).
"""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options, quantizing_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion


class TfliteTarget:
    name = "tflite"
    engine = "tflite"
    toolchain = "tflite"
    lock = ""
    module = "litert"
    tools = ()
    engine_package = "ai_edge_litert"
    precisions = frozenset({"int8", "fp16", "fp32"})
    methods = frozenset({"minmax", "percentile", "entropy", "mse"})
    quantizers = ("edgefleet", "tensorflow")
    reads_qdq = False
    ships_onnx = False
    measures_onnx = False
    leaves_in_float = True
    halves_weights = True
    runs_here = True
    stand_in = ""
    providers = ("CPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """Weights have 8 bits always, one scale per channel: XNNPACK widens products, so nothing overflows."""
        known = quantizing_options(device_class)
        return chosen_options(
            self.name,
            device_class,
            version,
            {name: known[name] for name in ("float_first", "scope", "correct_bias", "fit_weights")},
        )
