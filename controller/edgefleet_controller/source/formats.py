"""Stage 1, source: which format a network's file has. Receives a path, hands on the format, by content rather than by name.

Nothing is parsed here, and nothing of a file's is executed. What is no network that edgefleet takes is refused with what to do instead.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from edgefleet_shared.errors import ModelError

Format = Literal["onnx", "tflite", "keras", "keras-h5", "saved-model"]
HEAD_BYTES = 16
_EXPORT = (
    "export it with PyTorch: torch.onnx.export(model.eval(), (example,), 'net.onnx', input_names=['image'], output_names=['scores']), "
    "where example is one input with a batch of 1; then name net.onnx as spec.source.path"
)


def format_of(path: Path) -> Format:
    """The format of a network's file or folder. What has no other mark is taken for ONNX, whose own parser judges it.

    Raises:
        ModelError: it can't be read, is empty, or is a format that can't be taken as it is (PyTorch's, a folder that is no SavedModel).
    """
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "saved-model"
        raise ModelError(f"{path} is a folder, and no TensorFlow SavedModel: it has no saved_model.pb")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path} is no file")
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as exc:
        raise ModelError(
            f"can't read {path}: {exc.strerror}", hint="paths are relative to the manifest's file"
        ) from exc
    if not head:
        raise ModelError(f"{path} is empty", hint="download or export it again")
    if head[4:8] == b"TFL3":
        return "tflite"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras-h5"
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    # A pickle of protocol 2 and above, as torch.save wrote before it wrote archives.
    if (
        head[:1] == b"\x80"
        and head[1:2] in b"\x02\x03\x04\x05"
        and path.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt")
    ):
        raise ModelError(f"{path} is a PyTorch file: a pickle, which holds code and is never loaded", hint=_EXPORT)
    return "onnx"


def _archive(path: Path) -> Format:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError) as exc:
        raise ModelError(f"{path} is a broken archive: {exc}") from exc
    if "data.pkl" in names:
        raise ModelError(f"{path} is a PyTorch file: it holds pickled code, which is never loaded", hint=_EXPORT)
    if {"config.json", "model.weights.h5"} <= names:
        return "keras"
    raise ModelError(f"{path} is an archive, and no .keras file: it lacks config.json or model.weights.h5")
