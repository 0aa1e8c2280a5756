"""Stage 2, compile: what there is to compile with. Receives a cache folder, hands on how each toolchain stands, and tries one out.

Trying out is the whole pipeline on a network of four layers: simplified, compiled by each of the toolchain's targets, run here where that can
be, and held against float.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import EdgefleetError, ToolchainError
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from edgefleet_controller.compile import environments, tools
from edgefleet_controller.compile.environments import Lock, Progress, State
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import Target, installed_targets, lock_of
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.tools import MissingTool
from edgefleet_controller.manifests import DeviceClass, Model
from edgefleet_controller.source.importing import import_model

LOWEST_FIRST = ("int8", "fp16", "fp32")
LEAST_AGREEMENT = {"int8": 0.7, "fp16": 0.95, "fp32": 0.99}  # of the tiny network, whose weights are random
_COUNTS = {"calibration": 16, "holdout": 24, "golden": 8}
_SHAPE = (3, 16, 16)


class Beside(msgspec.Struct, frozen=True):
    """What a toolchain is for that no target compiles in, and the package whose version is told. ``module``: has the action try_out."""

    use: str
    package: str
    module: str


BESIDE = {
    "keras": Beside("Keras and TFLite sources, TensorFlow's own converter", "tensorflow_cpu", "tensorflow_converter"),
    "pruning": Beside("pruning", "torch", ""),
}
TRY_LIMIT_S = 300.0


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A vendor's program: where it is and its version, or the problem."""

    name: str
    targets: tuple[str, ...]
    version: str
    path: str
    problem: str


class TriedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One target, tried out. ``problem`` is empty where it compiled and answered, or needs a program that is not here; ``told`` says how, or
    that, in words."""

    target: str
    problem: str
    told: str
    seconds: float


def by_toolchain() -> dict[str, list[Target]]:
    """Every toolchain by name, with the installed targets that compile in it: none, for those :data:`BESIDE` targets."""
    found: dict[str, list[Target]] = {name: [] for name in BESIDE}
    for target in installed_targets().targets.values():
        found.setdefault(target.toolchain, []).append(target)
    return dict(sorted(found.items()))


def targets_of(name: str) -> list[Target]:
    """Those that compile in the toolchain.

    Raises:
        ToolchainError: there is no such toolchain.
    """
    known = by_toolchain()
    if name not in known:
        raise ToolchainError(f"no toolchain {name!r}; there are: {', '.join(known)}")
    return known[name]


def lock(name: str) -> Lock:
    """What the toolchain is made from; raises as :func:`targets_of`."""
    targets = targets_of(name)
    return lock_of(targets[0]) if targets else environments.lock_named(name)


def state(root: Path, name: str, *, every_byte: bool = False) -> State:
    """How one toolchain stands, as :func:`.environments.examine` tells it; raises as :func:`targets_of`."""
    return environments.examine(root, lock(name), every_byte=every_byte)


def programs() -> list[Program]:
    """Every vendor's program that a target calls."""
    wanted: dict[str, tuple[tools.Tool, list[str]]] = {}
    for target in installed_targets().targets.values():
        for tool in target.tools:
            wanted.setdefault(tool.name, (tool, []))[1].append(target.name)
    found = []
    for name, (tool, users) in sorted(wanted.items()):
        try:
            here = tools.find(tool)
        except ToolchainError as exc:
            found.append(Program(name=name, targets=tuple(users), version="", path="", problem=str(exc)))
        else:
            found.append(Program(name=name, targets=tuple(users), version=here.version, path=here.path, problem=""))
    return found


def broken_targets() -> dict[str, str]:
    """Installed targets that can't be used, by name, and why."""
    return installed_targets().broken


def try_out(toolchains: Toolchains, target: Target, progress: Progress) -> TriedTarget:
    """Compile the tiny network by a target, in its lowest precision. Where that fails its logs stay in the cache."""
    began = time.monotonic()
    precision = next(p for p in LOWEST_FIRST if p in target.precisions)
    place = toolchains.root.parent / "tried"
    with atomic.disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=place, prefix=f"{target.name}-"))
    try:
        layout = Layout(folder / "layout")
        version = import_model(_tiny(folder), folder, layout, cache=folder)
        result = compile_version(
            version, _class(target, precision), layout, toolchains, cache=folder, progress=progress
        )
    except MissingTool as exc:
        shutil.rmtree(folder)
        return TriedTarget(target=target.name, problem="", told=f"not tried: {exc}", seconds=0.0)
    except EdgefleetError as exc:
        return TriedTarget(target=target.name, problem=str(exc), told="", seconds=round(time.monotonic() - began, 1))
    shutil.rmtree(folder)
    figures = result.figures
    told = f"{result.precision}, {figures.compiled_bytes} bytes"
    if figures.agreement is None:
        told += ", compiled; only a board can run it"
    else:
        told += f", agreement {figures.agreement:.2f}" + (f" by {figures.stand_in}" if figures.stand_in else "")
    return TriedTarget(target=target.name, problem="", told=told, seconds=round(time.monotonic() - began, 1))


def try_out_beside(toolchains: Toolchains, name: str, progress: Progress) -> TriedTarget | None:
    """As :func:`try_out`, for a toolchain that no target compiles in; None where looking at its files is all there is."""
    if name not in BESIDE or not BESIDE[name].module:
        return None
    began, log = time.monotonic(), toolchains.root.parent / "logs" / f"try-{name}.log"
    log.unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="edgefleet-try-") as folder:
            found = toolchains.run(
                toolchains.ensure(name, progress), BESIDE[name].module, {"action": "try_out"}, Path(folder), log, limit_s=TRY_LIMIT_S,
                progress=progress,
            )  # fmt: skip
    except EdgefleetError as exc:
        return TriedTarget(
            target=BESIDE[name].use, problem=str(exc), told="", seconds=round(time.monotonic() - began, 1)
        )
    return TriedTarget(
        target=BESIDE[name].use, problem="", told=str(found["told"]), seconds=round(time.monotonic() - began, 1)
    )


def _class(target: Target, precision: str) -> DeviceClass:
    spec: dict[str, Any] = {
        "arch": platform.machine(), "engine": target.engine, "target": target.name, "precision": precision,
        "budgets": {"latency_p95_ms": 1000.0, "memory_bytes": 2 << 30},
        "accuracy": {"min_agreement": LEAST_AGREEMENT[precision]},
        "search": {"effort": "fixed", "prefer": "size"},
    }  # fmt: skip
    return DeviceClass.model_validate({"kind": "DeviceClass", "metadata": {"name": "try-out"}, "spec": spec})


def _tiny(folder: Path) -> Model:
    """A classifier of 16 x 16 pictures, with its samples."""
    rng = np.random.default_rng(0)
    for split, count in _COUNTS.items():
        coarse = rng.normal(size=(count, _SHAPE[0], 4, 4)).repeat(4, axis=2).repeat(4, axis=3)
        save_file({"image": coarse.astype(np.float32)}, folder / f"{split}.safetensors")
    (folder / "tiny.onnx").write_bytes(_network(rng).SerializeToString(deterministic=True))
    spec: dict[str, Any] = {"version": "1", "source": {"path": "tiny.onnx"}}
    spec |= {split: {"path": f"{split}.safetensors"} for split in _COUNTS}
    return Model.model_validate({"kind": "Model", "metadata": {"name": "tiny"}, "spec": spec})


def _network(rng: np.random.Generator) -> onnx.ModelProto:
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "b1": (8,), "w2": (10, 128), "b2": (10,)}
    constants = [
        numpy_helper.from_array(
            (rng.normal(size=s) * (np.prod(s[1:]) ** -0.5 if len(s) > 1 else 0.05)).astype(np.float32), name
        )
        for name, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w0", "b0"], ["x0"], name="x0", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["x0"], ["x1"], name="x1"),
        helper.make_node("Conv", ["x1", "w1", "b1"], ["x2"], name="x2", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Flatten", ["x2"], ["x3"], name="x3"),
        helper.make_node("Gemm", ["x3", "w2", "b2"], ["scores"], name="scores", transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, *_SHAPE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 10])],
        constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return model
