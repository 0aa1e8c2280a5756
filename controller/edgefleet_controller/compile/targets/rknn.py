"""Stage 2, compile: Rockchip's NPUs, by RKNN-Toolkit2 (.rknn). Data only; the work is in ``children/rknn.py``.

An .rknn is for one chip and can't be run here; the toolkit's simulator answers in its place. RK1808 and RK3399Pro have an older toolkit:
the target ``rk1808``.
"""

from __future__ import annotations

from edgefleet_shared.errors import ManifestError

from edgefleet_controller.compile.port import Options, chosen_options
from edgefleet_controller.manifests import DeviceClassSpec
from edgefleet_controller.model_version import ModelVersion

CHIPS = ("rk3562", "rk3566", "rk3568", "rk3576", "rk3588", "rv1103", "rv1106", "rv1126b")


class RknnTarget:
    name = "rknn"
    engine = "rknn"
    toolchain = "rknn"
    lock = ""
    module = "rknn_settled"
    tools = ()
    engine_package = "rknn_toolkit2"
    precisions = frozenset({"int8", "fp16"})
    methods = frozenset({"minmax", "mse", "entropy"})
    quantizers = ("rknn",)
    reads_qdq = False
    ships_onnx = False
    measures_onnx = False
    leaves_in_float = True
    halves_weights = False
    runs_here = True
    stand_in = "RKNN-Toolkit2's simulator of the NPU"
    providers = ("NPU",)

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """``chip``: one of :data:`CHIPS`. ``optimization_level``: the toolkit's, 0 to 3. ``granularity`` is the recipe's."""
        defaults: Options = {"chip": "rk3588", "optimization_level": 3, "granularity": "channel"}
        chosen = chosen_options(self.name, device_class, version, defaults)
        if chosen["chip"] not in CHIPS:
            raise ManifestError(
                f"target rknn knows no chip {chosen['chip']!r}; it knows {', '.join(CHIPS)}",
                hint="rk1808 and rk3399pro need their older toolkit: the target rk1808",
            )
        # Ranges, weights and biases are the toolkit's own.
        return chosen | {"quantizer": "rknn", "correct_bias": False}
