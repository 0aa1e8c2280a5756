"""Every target, made again from nothing: the same inputs and toolchain give the same digest, whatever the folders are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import DeviceClass
from support import trained

TARGETS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"precision": "int8"},
    "tflite": {"precision": "int8"},
    "openvino": {"precision": "int8"},
    "iree": {"precision": "fp32"},
    "ncnn": {"precision": "fp32"},
    "rknn": {"precision": "int8", "arch": "aarch64", "options": {"chip": "rk3588"}},
    "tensorrt": {"precision": "int8", "arch": "aarch64"},
    "tensorrt-rtx": {"precision": "int8"},
}


@pytest.mark.parametrize("engine", TARGETS)
def test_the_same_inputs_give_the_same_digest_from_nothing(workshop, tmp_path: Path, engine: str) -> None:
    version = workshop.version(trained.digits)
    spec = {
        "arch": "x86_64", "engine": engine, "budgets": {"latency_p95_ms": 1000.0, "memory_bytes": 1 << 30},
        "accuracy": {"min_agreement": 0.8}, "search": {"effort": "fixed", "prefer": "size"},
    } | TARGETS[engine]  # fmt: skip
    made = DeviceClass.model_validate({"kind": "DeviceClass", "metadata": {"name": "again"}, "spec": spec})
    first, second = (
        compile_version(version, made, workshop.layout, Toolchains(workshop.cache), cache=tmp_path / name)
        for name in ("here", "there")
    )
    assert not second.cached
    assert first.artifact.digest == second.artifact.digest
