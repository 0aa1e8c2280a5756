"""Stage 2, compile: inside RKNN-Toolkit 1.7's own Python (3.6 to 3.8): receives a settings file, hands on an .rknn.

Run as ``rknn-toolkit1-python rk1808_build.py settings.json`` by :mod:`.rk1808`; imports nothing else of ours, and its syntax is Python 3.6's.
"""

import json
import sys
from collections.abc import Callable
from typing import Any


def main() -> int:
    from rknn.api import RKNN  # that toolkit's, not RKNN-Toolkit2's

    with open(sys.argv[1], encoding="utf-8") as stream:
        settings = json.load(stream)
    toolkit = RKNN(verbose=False)
    steps: tuple[tuple[str, Callable[[], Any]], ...] = (
        (
            "take these settings",
            lambda: toolkit.config(
                target_platform=[settings["chip"]], quantized_dtype="asymmetric_quantized-u8", optimization_level=3
            ),
        ),
        ("read the network", lambda: toolkit.load_onnx(model=settings["network"])),
        (
            "build the network",
            lambda: toolkit.build(do_quantization=settings["dataset"] is not None, dataset=settings["dataset"]),
        ),
        ("write the file", lambda: toolkit.export_rknn(settings["rknn"])),
    )
    for what, step in steps:
        status = step()
        if status not in (0, None):
            sys.stderr.write(f"error: can't {what} (status {status})\n")
            return 1
    toolkit.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
