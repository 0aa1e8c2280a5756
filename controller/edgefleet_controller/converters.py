"""Stage 1, source: networks in TensorFlow's formats. Receives a file of Keras or TFLite, hands on ONNX, written in a process of its own.

TensorFlow lies in a toolchain of its own (``keras``), on the side where the operator adds a model. Nothing of a file is loaded here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from edgefleet_shared.errors import ModelError

from edgefleet_controller.compile.environments import Progress
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.watching import ChildDied
from edgefleet_controller.formats import Format

TOOLCHAIN, MODULE = "keras", "tensorflow_source"
LIMIT_S = 900.0
MEMORY_BYTES = 8 * 1024**3


class Converted(NamedTuple):
    """The network as ONNX. ``as_is``: the file itself, where it is a .tflite that is quantized already; the ONNX has its numbers as floats."""

    onnx: bytes
    as_is: bytes | None


def to_onnx(path: Path, kind: Format, cache: Path, progress: Progress) -> Converted:
    """Convert a network.

    Raises:
        ModelError: it would run code, can't be loaded, or can't be written as ONNX.
        ToolchainError: TensorFlow's toolchain can't be installed, or broke.
    """
    toolchains = Toolchains(cache)
    toolchain = toolchains.ensure(TOOLCHAIN, progress)
    with tempfile.TemporaryDirectory(prefix="edgefleet-convert-") as temporary:
        made = Path(temporary) / "network.onnx"
        request = {"action": "convert", "path": str(path.resolve()), "format": kind, "onnx": str(made)}
        try:
            found = toolchains.run(
                toolchain, MODULE, request, Path(temporary), cache / "logs" / "convert.log", limit_s=LIMIT_S, memory_bytes=MEMORY_BYTES,
                progress=progress,
            )  # fmt: skip
        except ChildDied as exc:
            raise ModelError(
                f"TensorFlow broke over this file: {exc.how}", hint="it is damaged, or made to break what reads it"
            ) from exc
        return Converted(made.read_bytes(), path.read_bytes() if found["quantized"] else None)
