"""Stage 2, compile: OpenVINO (IR, int8 by NNCF). Data only; the work is in ``children/ov.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, known_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.source import ModelVersion


class OpenvinoTarget:
    name = "openvino"
    engine = "openvino"
    toolchain = "openvino"
    module = "ov"
    engine_package = "openvino"
    precisions = frozenset({"int8", "fp32"})
    methods = frozenset({"minmax", "percentile"})
    providers = ("CPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``preset``: NNCF's ``mixed`` (asymmetric activations) or ``performance`` (symmetric)."""
        known_options(self.name, device_class.options, ["preset"])
        return {"preset": device_class.options.get("preset", "mixed")}
