"""Stage 2, compile: FPGAs by hls4ml (a project for Vitis HLS, in 16-bit fixed point). The work is in ``children/hls4ml.py``.

What is shipped is what Vitis synthesizes, not a bitstream: the agent has no such engine. It is for small networks: every layer becomes hardware.
"""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.compile.tools import Tool
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion

CXX = Tool(
    name="g++",
    ask=("-dumpfullversion",),
    version=r"^(\d+\.\d+(?:\.\d+)?)\s*$",
    within=">=7",
    get="the system's C++ compiler, which compiles the simulation",
)


class Hls4mlTarget:
    name = "hls4ml"
    engine = "hls4ml"
    toolchain = "hls4ml"
    lock = ""
    module = "hls4ml"
    tools = (CXX,)
    engine_package = "hls4ml"
    precisions = frozenset({"fp16"})
    methods = frozenset[str]()
    quantizers = ()
    reads_qdq = False
    ships_onnx = False
    measures_onnx = False
    leaves_in_float = False
    halves_weights = False
    runs_here = True
    stand_in = "hls4ml's C simulation, which computes the FPGA's fixed-point numbers bit by bit"
    providers = ("FPGA",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``total_bits``, ``integer_bits``: of every number (values beyond are clipped). ``reuse``: how often one multiplier is used, from fast
        and large to slow and small. ``part``: the chip as Vitis names it."""
        defaults: Options = {"total_bits": 16, "integer_bits": 8, "reuse": 16, "part": "xczu7ev-ffvc1156-2-e"}
        return chosen_options(self.name, device_class, version, defaults)
