"""Stage 2, compile: ncnn (float32, by pnnx). Data only; the work is in ``children/ncnn.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion


class NcnnTarget:
    name = "ncnn"
    engine = "ncnn"
    toolchain = "ncnn"
    lock = ""
    module = "ncnn"
    tools = ()
    engine_package = "ncnn"
    precisions = frozenset({"fp32"})
    methods = frozenset[str]()
    quantizers = ()
    reads_qdq = False
    ships_onnx = False
    measures_onnx = False
    leaves_in_float = False
    halves_weights = False
    runs_here = True
    stand_in = ""
    providers = ("CPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        return chosen_options(self.name, device_class, version, {})
