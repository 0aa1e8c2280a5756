"""A place to compile in: versions and artifacts in one layout, a fresh cache of compiled models, the shared toolchains."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path
from typing import Any

from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import DeviceClass, Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import Layout

from support.networks import device_class

TOOLCHAINS = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
ENGINES = ("onnxruntime", "tflite", "openvino")
HERE = platform.machine()


class Bench:
    """Imports and compiles in ``folder``; ``cancel`` ends what runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = Layout(folder / "layout")
        self.cancel = threading.Event()

    def version(self, manifest: Model) -> ModelVersion:
        return import_model(manifest, self.folder, self.layout, cache=self.folder / "cache")

    def compile(self, version: ModelVersion, target: DeviceClass, **more: Any) -> CompileResult:
        toolchains = Toolchains(TOOLCHAINS, cancel=self.cancel)
        return compile_version(version, target, self.layout, toolchains, cache=self.folder / "cache", **more)


def class_here(engine: str = "onnxruntime", **spec: Any) -> DeviceClass:
    return device_class(engine, arch=HERE, **spec)
