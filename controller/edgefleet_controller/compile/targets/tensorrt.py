"""Stage 2, compile: TensorRT (ONNX whose types say the precision; the board builds the engine). The work is in ``children/tensorrt.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options, quantizing_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion


class TensorrtTarget:
    name = "tensorrt"
    engine = "tensorrt"
    toolchain = "onnxruntime"
    lock = ""
    module = "tensorrt"
    tools = ()
    engine_package = ""  # the board builds by its own
    precisions = frozenset({"int8", "fp16", "fp32"})
    methods = frozenset({"minmax", "percentile", "entropy", "mse"})
    quantizers = ("edgefleet",)
    reads_qdq = True
    ships_onnx = False
    measures_onnx = True
    leaves_in_float = True
    halves_weights = False
    runs_here = True
    stand_in = "onnxruntime, on the network that the board's TensorRT builds from"
    providers = ("TensorRT",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        return chosen_options(self.name, device_class, version, symmetric_options(device_class))


def symmetric_options(device_class: DeviceClassSpec) -> Options:
    """Every quantizing target's options; TensorRT knows no zero points, wants biases in float, and computes activations with what is before them."""
    known = quantizing_options(device_class)
    return {name: known[name] for name in ("scope", "correct_bias", "fit_weights", "float_first")} | {
        "activations": "symmetric",
        "fused_activations": True,
    }
