"""Stage 2, compile: Ascend (.om, by CANN's atc and amct_onnx). The work is in ``children/acl.py``."""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.compile.tools import Tool
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion

_CANN = "Huawei's CANN toolkit (hiascend.com); source its set_env.sh before this program starts"
# What set_env.sh exports besides PATH and LD_LIBRARY_PATH: where operators and the compilers for them lie, in Python too.
_VARIABLES = ("ASCEND_*", "TOOLCHAIN_HOME", "PYTHONPATH")
# Neither program tells its version: the toolkit's version.info beside the compiler does.
ATC = Tool(
    name="atc", version_file="../version.info", version=r"(?m)^Version=(\d[\w.]*)", within=">=5,<10", get=_CANN, variables=_VARIABLES
)  # fmt: skip
AMCT = Tool(
    name="amct_onnx", only_for="int8", get=f"{_CANN}; AMCT for ONNX is its model compression tool", variables=_VARIABLES
)  # fmt: skip


class AclTarget:
    name = "acl"
    engine = "acl"
    toolchain = "onnxruntime"
    lock = ""
    module = "acl"
    tools = (ATC, AMCT)
    engine_package = ATC.name
    precisions = frozenset({"int8", "fp16", "fp32"})
    methods = frozenset({"minmax"})
    quantizers = ("amct",)
    reads_qdq = False
    ships_onnx = False
    measures_onnx = True
    leaves_in_float = False
    halves_weights = False
    runs_here = False
    stand_in = ""
    providers = ("NPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``soc``: the chip as atc names it (Ascend310, Ascend310P3, Ascend310B4, ...)."""
        chosen = chosen_options(self.name, device_class, version, {"soc": "Ascend310"})
        return chosen | {"quantizer": "amct", "correct_bias": False}
