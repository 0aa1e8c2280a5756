"""Stage 2, compile: RK1808 and RK3399Pro, by Rockchip's older RKNN-Toolkit 1.7 (.rknn). The work is in ``children/rk1808.py``."""

from __future__ import annotations

from edgefleet_shared.errors import ManifestError

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.compile.tools import Tool
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion

CHIPS = ("rk1808", "rk3399pro")
TOOLKIT = Tool(
    name="rknn-toolkit1-python",
    ask=("-c", "import pkg_resources; print('rknn-toolkit', pkg_resources.get_distribution('rknn-toolkit').version)"),
    version=r"rknn-toolkit (\d+\.\d+[\w.]*)",
    within=">=1.6,<2",
    get="install Rockchip's rknn-toolkit 1.7 (its GitHub releases) in an environment of Python 3.6 to 3.8, and put a link of this name to "
    "that environment's python on PATH",
)


class Rk1808Target:
    name = "rk1808"
    engine = "rknn"
    toolchain = "onnxruntime"
    lock = ""
    module = "rk1808"
    tools = (TOOLKIT,)
    engine_package = TOOLKIT.name
    precisions = frozenset({"int8", "fp16"})
    methods = frozenset({"minmax"})
    quantizers = ("rknn",)
    reads_qdq = False
    ships_onnx = False
    measures_onnx = True
    leaves_in_float = False
    halves_weights = False
    runs_here = False
    stand_in = ""
    providers = ("NPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``chip``: one of :data:`CHIPS`."""
        chosen = chosen_options(self.name, device_class, version, {"chip": "rk1808"})
        if chosen["chip"] not in CHIPS:
            raise ManifestError(f"target rk1808 knows no chip {chosen['chip']!r}; it knows {', '.join(CHIPS)}")
        return chosen | {"quantizer": "rknn", "correct_bias": False}
