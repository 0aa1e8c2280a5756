"""Which device files an engine's own library opens: receives an engine's name, hands on the files of that kind on this board.

A confined process may open no device but these. Asked before the engine's adapter is imported, which happens behind the confinement;
hence a table here and not an attribute there. systemd keeps all devices from the services until a drop-in gives them, see
``docs/guides/accelerators.md``. Sources: the vendors' drivers (Linux ``drivers/accel`` and ``drivers/gpu``; JetPack, CANN and gasket documentation).
"""

from __future__ import annotations

import glob

# Discrete boards have /dev/nvidia*, Jetson the nvhost and nvmap devices beside them.
_NVIDIA = ("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/nvgpu/*", "/dev/nvsciipc", "/dev/host1x-fence")
_PATTERNS: dict[str, tuple[str, ...]] = {
    "tensorrt": _NVIDIA,
    "tensorrt-rtx": _NVIDIA,
    "rknn": ("/dev/rknpu*", "/dev/dri/renderD*", "/dev/dma_heap/*", "/dev/mpp_service"),
    "acl": ("/dev/davinci*", "/dev/devmm_svm", "/dev/hisi_hdc", "/dev/svm0", "/dev/ascend_manager"),
    "coral": ("/dev/apex_*", "/dev/bus/usb"),
}


def of(engine: str) -> tuple[str, ...]:
    """The device files and folders of that engine that this board has; empty for one that computes on the processor."""
    return tuple(sorted(path for pattern in _PATTERNS.get(engine, ()) for path in glob.glob(pattern)))
