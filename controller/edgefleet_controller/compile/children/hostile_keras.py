"""Stage 1, source: what a file of Keras or TensorFlow may be made of. Receives a path, hands on nothing, or a refusal.

Loading a model builds what its configuration names: a Lambda layer's bytecode, a function by module and name, another SavedModel. Keras' own safe mode
has been got round (CVE-2025-1550, CVE-2025-9905: not asked at all for .h5), so the configuration is read here first, as data, and everything in
it must be one of Keras' own layers and their parts. HDF5 may point at other files; a SavedModel's graph may read and write them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py

from . import job

MAX_BYTES = 2**31  # unpacked
MAX_CONFIG_BYTES = 64 * 2**20
# Modules whose classes take numbers and words, and nothing that runs.
MODULES = (
    "keras.layers", "keras.src.layers", "keras.initializers", "keras.src.initializers", "keras.regularizers", "keras.src.regularizers",
    "keras.constraints", "keras.src.constraints", "keras.activations", "keras.src.activations", "keras.dtype_policies", "keras.src.dtype_policies",
    "keras.src.ops", "keras.ops", "keras.models", "keras.src.models", "keras.engine", "keras.src.engine",
)  # fmt: skip
TOP = ("Sequential", "Functional", "Model", "DTypePolicy", "Policy")  # of the module keras itself
# Of these, configurations name functions, load other files or hold code.
REFUSED = (
    "Lambda",
    "TFOpLambda",
    "TFSMLayer",
    "SlicingOpLambda",
    "FlaxLayer",
    "JaxLayer",
    "TorchModuleWrapper",
    "__lambda__",
    "function",
)
VALUES = ("__tensor__", "__numpy__", "__keras_tensor__", "__tuple__", "__bytes__", "__ellipsis__", "slice")
# Operators through which a graph reaches outside itself.
OUTSIDE = (
    "ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "PyFuncStateless", "EagerPyFunc", "LoadLibrary", "Save", "SaveV2", "SaveSlices", "PrintV2",
    "WholeFileReader", "WholeFileReaderV2", "TextLineReader", "TextLineReaderV2", "TFRecordReader", "TFRecordReaderV2", "FixedLengthRecordReader",
    "InitializeTableFromTextFile", "InitializeTableFromTextFileV2", "ShardedFilename", "FileSystemSetConfiguration", "WriteSummary", "CreateSummaryFileWriter",
)  # fmt: skip


def check(path: str, kind: str) -> None:
    """Read a .keras or .h5 file's configuration and look at everything that it names. Whoever loads it then must do so with ``compile=False``.

    Raises:
        Refused: names what may not be in it.
    """
    try:
        config = _of_archive(path) if kind == "keras" else _of_h5(path)
        found = json.loads(config)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, RecursionError) as exc:
        raise job.Refused(
            "bad_model", f"this is no whole Keras model: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}"
        ) from exc
    if kind == "keras" and isinstance(found, dict):
        # How the model was trained. Loaded with compile=False, Keras sets it aside unread, but at the top only: models inside are compiled.
        found.pop("compile_config", None)
    for part in _parts(found):
        name, module = part.get("class_name"), part.get("module")
        if not isinstance(name, str) or "config" not in part:
            continue
        if (
            "module" in part and module is None and part.get("registered_name")
        ):  # how Keras writes classes that are not its own
            raise job.Refused(
                "bad_model",
                f"this model has a class of its own, {part['registered_name']}{_where(part)}, which Keras does not have and nothing here may load",
                "export it where that class is: model.export(folder) writes a SavedModel, which has its operators in the class's place",
            )
        ours = module is None or (module == "keras" and name in TOP) or (isinstance(module, str) and _inside(module))
        if name in REFUSED or ">" in name or not (ours or name in VALUES):
            raise job.Refused(
                "bad_model",
                f"this model names {f'{module}.' if module else ''}{name}{_where(part)}, which would run code of the file's choice",
                "build it of Keras' own layers, or export it to ONNX where it was made",
            )


def _where(part: dict[str, Any]) -> str:
    name = part["config"].get("name", "") if isinstance(part["config"], dict) else ""
    return f" (layer {name!r})" if name else ""


def _inside(module: str) -> bool:
    return any(module == known or module.startswith(f"{known}.") for known in MODULES)


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            yield one
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def _of_archive(path: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes")
        if archive.getinfo("config.json").file_size > MAX_CONFIG_BYTES:
            raise ValueError("its configuration is too large")
        with archive.open("model.weights.h5") as weights, h5py.File(weights, "r") as file:
            _no_links(file)
        return archive.read("config.json")


def _of_h5(path: str) -> bytes | str:
    with h5py.File(path, "r") as file:
        _no_links(file)
        if "model_config" not in file.attrs:
            raise ValueError("an .h5 file with weights alone; save the whole model")
        found: bytes | str = file.attrs["model_config"]
        return found


def _no_links(group: Any) -> None:
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{name} lies in another file")
        item = group[name]
        if isinstance(item, h5py.Group):
            _no_links(item)
        elif item.external:
            raise ValueError(f"the values of {name} lie in another file")


def check_saved_model(folder: str) -> None:
    """Look at every operator of a SavedModel's graph and functions."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    try:
        with open(f"{folder}/saved_model.pb", "rb") as stream:
            model.ParseFromString(stream.read())
    except (OSError, DecodeError) as exc:
        raise job.Refused("bad_model", f"saved_model.pb is no SavedModel: {exc}") from exc
    for meta in model.meta_graphs:
        nodes = [
            *meta.graph_def.node,
            *(node for function in meta.graph_def.library.function for node in function.node_def),
        ]
        # Each SavedModel holds SaveV2 and ShardedFilename in its own saving function, which nothing calls here.
        own = {"SaveV2", "ShardedFilename"}
        for node in nodes:
            if node.op in OUTSIDE and node.op not in own:
                raise job.Refused(
                    "bad_model",
                    f"this SavedModel has the operator {node.op} (node {node.name!r}), which reaches outside the network",
                )
