"""Targets whose toolchains are large: `make test-targets`. Networks are small and trained; toolchains go into EDGEFLEET_CACHE."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import DeviceClass, Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import MODEL_LAYER, Layout
from support import trained

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))


class Workshop:
    """Trained networks as versions in one layout, and a cache of compiled models that all tests of a module share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, CACHE
        self.layout = Layout(folder / "layout")
        self._versions: dict[str, ModelVersion] = {}

    def version(self, make: Callable[[Path, Path], Model]) -> ModelVersion:
        if make.__name__ not in self._versions:
            folder = self.folder / make.__name__
            self._versions[make.__name__] = import_model(make(CACHE, folder), folder, self.layout, cache=CACHE)
        return self._versions[make.__name__]

    def compile(self, version: ModelVersion, engine: str, **spec: Any) -> CompileResult:
        fields: dict[str, Any] = {
            "arch": "x86_64",
            "engine": engine,
            "budgets": {"latency_p95_ms": 1000.0, "memory_bytes": 1 << 30},
            "search": {"effort": "fixed", "prefer": "size"},
        }
        made = {"kind": "DeviceClass", "metadata": {"name": f"test-{engine}"}, "spec": fields | spec}
        return compile_version(
            version, DeviceClass.model_validate(made), self.layout, Toolchains(self.cache), cache=self.folder / "cache"
        )

    def shipped(self, result: CompileResult) -> Path:
        """The compiled model inside the artifact."""
        return self.layout.path(self.layout.manifest(result.artifact.digest).layer(MODEL_LAYER).digest)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(params=[trained.text_direction, trained.digits], ids=lambda make: make.__name__)
def version(request: pytest.FixtureRequest, workshop: Workshop) -> ModelVersion:
    return workshop.version(request.param)
