"""Stage 2, compile: OpenVINO (IR, int8 by NNCF). Data only; the work is in ``children/ov.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options, overflows
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
        """``preset``: NNCF's ``mixed`` (asymmetric activations) or ``performance`` (symmetric). ``reduce_range``: weights keep to 7
        bits. ``float_first``: so many leading convolutions stay in float."""
        return chosen_options(
            self.name,
            device_class,
            version,
            {"preset": "mixed", "reduce_range": overflows(device_class), "float_first": 0},
        )
