"""Stage 2, compile: Coral's Edge TPU (int8 .tflite, mapped by Google's compiler). The work is in ``children/coral.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options
from edgefleet_controller.compile.targets.tflite import TfliteTarget
from edgefleet_controller.compile.tools import Tool
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion

COMPILER = Tool(
    name="edgetpu_compiler",
    ask=("--version",),
    version=r"Edge TPU Compiler version (\d+\.\d+)",
    within=">=14,<17",
    get="Google's Debian package edgetpu-compiler (coral.ai/docs/edgetpu/compiler), for x86-64",
)


class CoralTarget:
    name = "coral"
    engine = "coral"
    toolchain = "tflite"
    lock = ""
    module = "coral"
    tools = (COMPILER,)
    engine_package = "ai_edge_litert"
    precisions = frozenset({"int8"})
    methods = TfliteTarget.methods
    quantizers = ("edgefleet",)
    reads_qdq = False
    ships_onnx = False
    measures_onnx = False
    leaves_in_float = False  # the chip has no float, and from the first such layer on all would be the CPU's
    halves_weights = False
    runs_here = True
    stand_in = "LiteRT on the CPU, on the .tflite before it was mapped onto the Edge TPU"
    providers = ("EdgeTPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """As for TFLite, whose quantized file this is."""
        return TfliteTarget().options(device_class, version)
