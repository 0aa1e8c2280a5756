"""Stage 2, compile: IREE (.vmfb, by MLIR). Data only; the work is in ``children/iree.py``.

Float only: int8 by QDQ was not tried through it. Where a class has another architecture than this host, the same
network compiled for this host answers in its place.
"""

from __future__ import annotations

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion

# The kernel's name of a feature, and LLVM's; others are passed by the option "features".
FEATURES = {
    "avx": "+avx", "avx2": "+avx2", "fma": "+fma", "f16c": "+f16c", "bmi1": "+bmi", "bmi2": "+bmi2", "sse4_2": "+sse4.2",
    "avx512f": "+avx512f", "avx512bw": "+avx512bw", "avx512dq": "+avx512dq", "avx512vl": "+avx512vl",
    "avx512_vnni": "+avx512vnni", "asimddp": "+dotprod", "asimdhp": "+fullfp16",
}  # fmt: skip


class IreeTarget:
    name = "iree"
    engine = "iree"
    toolchain = "iree"
    lock = ""
    module = "iree"
    tools = ()
    engine_package = "iree_base_runtime"
    precisions = frozenset({"fp32"})
    methods = frozenset[str]()
    quantizers = ()
    reads_qdq = False
    ships_onnx = False
    measures_onnx = False
    leaves_in_float = False
    halves_weights = False
    runs_here = True
    stand_in = "the same network, compiled by IREE for this host's processor"
    providers = ("local-sync", "local-task")

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``cpu``: LLVM's name of the processor, such as cortex-a72; empty: what every one of the architecture has. ``features``: LLVM's names
        of more features; default: those that the class promises."""
        known = [FEATURES[name] for name in device_class.cpu_features if name in FEATURES]
        defaults: Options = {"cpu": "", "features": ",".join(known)}
        return chosen_options(self.name, device_class, version, defaults) | {"arch": device_class.arch}
