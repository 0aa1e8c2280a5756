"""Stage 2, compile: OpenVINO (IR, from ONNX with QDQ int8 or by NNCF). Data only; the work is in ``children/ov.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options, quantizing_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion


class OpenvinoTarget:
    name = "openvino"
    engine = "openvino"
    toolchain = "openvino"
    lock = ""
    module = "ov"
    tools = ()
    engine_package = "openvino"
    precisions = frozenset({"int8", "fp16", "fp32"})
    methods = frozenset({"minmax", "percentile", "entropy", "mse"})
    quantizers = ("edgefleet", "nncf")
    reads_qdq = True
    ships_onnx = False
    measures_onnx = False  # it could, but an IR has other bytes than the ONNX that it is made from
    leaves_in_float = True
    halves_weights = True
    runs_here = True
    stand_in = ""
    providers = ("CPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``quantizer``: ``edgefleet``, whose QDQ OpenVINO reads, or ``nncf``; beside those of every quantizing target."""
        own: Options = {"quantizer": "edgefleet", "fused_activations": True}
        return chosen_options(self.name, device_class, version, quantizing_options(device_class) | own)
