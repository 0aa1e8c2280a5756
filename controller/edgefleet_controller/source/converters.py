"""Stage 1, source: networks in TensorFlow's formats. Receives a file of Keras or TFLite, hands on ONNX, written in a process of its own.

TensorFlow lies in a toolchain of its own (``keras``), on the side where the operator adds a model. Nothing of a file is loaded here.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

from edgefleet_shared.errors import ModelError

from edgefleet_controller.compile.environments import Progress
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.watching import ChildDied, ChildKilled
from edgefleet_controller.compile.workplace import work_folder
from edgefleet_controller.source.formats import Format

TOOLCHAIN, MODULE = "keras", "tensorflow_source"
LIMIT_S = 900.0
MAX_ORIGINAL_BYTES = 2**31
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a ZIP archive can say
MEMORY_BYTES = 8 * 1024**3


class Converted(NamedTuple):
    """The network as ONNX. ``as_is``: the file itself, where it is a .tflite that is quantized already; the ONNX has its numbers as floats."""

    onnx: bytes
    as_is: bytes | None


def to_onnx(path: Path, kind: Format, cache: Path, progress: Progress) -> Converted:
    """Convert a network.

    Raises:
        ModelError: it would run code, can't be loaded, or can't be written as ONNX.
        ToolchainError: TensorFlow's toolchain can't be installed, or broke; ChildKilled: this machine ended it.
    """
    toolchains = Toolchains(cache)
    toolchain = toolchains.ensure(TOOLCHAIN, progress)
    with work_folder("convert") as work:
        made = work / "network.onnx"
        request = {"action": "convert", "path": str(path.resolve()), "format": kind, "onnx": str(made)}
        try:
            found = toolchains.run(
                toolchain, MODULE, request, work, cache / "logs" / "convert.log", limit_s=LIMIT_S, memory_bytes=MEMORY_BYTES,
                progress=progress,
            )  # fmt: skip
        except ChildKilled:  # for want of memory or of an instruction: that tells nothing of the file
            raise
        except ChildDied as exc:
            raise ModelError(
                f"TensorFlow broke over this file: {exc.how}", hint="it is damaged, or made to break what reads it"
            ) from exc
        return Converted(made.read_bytes(), path.read_bytes() if found["quantized"] else None)


def original_of(path: Path, kind: Format) -> bytes:
    """The file itself, or a SavedModel's folder as a ZIP archive (stored, sorted, without times): the same content always gives the same bytes.

    Raises:
        ModelError: it is too large, or can't be read.
    """
    files = sorted(one for one in path.rglob("*") if one.is_file()) if kind == "saved-model" else [path]
    try:
        if sum(one.stat().st_size for one in files) > MAX_ORIGINAL_BYTES:
            raise ModelError(f"it is larger than {MAX_ORIGINAL_BYTES} bytes")
        if kind != "saved-model":
            return path.read_bytes()
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for one in files:
                entry = zipfile.ZipInfo(one.relative_to(path).as_posix(), _EPOCH)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, one.read_bytes())
        return out.getvalue()
    except OSError as exc:
        raise ModelError(f"can't read it: {exc.strerror}") from exc
