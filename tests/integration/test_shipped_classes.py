"""The shipped device classes: applied by command, and a small network compiled for each that has a target here."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import pytest
from edgefleet_agent.accept import accept
from edgefleet_controller.compile.host import cpu_features
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import target_named
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.tools import MissingTool
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.manifests.files import load_manifests, of_kind
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import Verdict
from edgefleet_shared.errors import ToolchainError
from support.fleet import Fleet
from support.networks import classifier, decided

FOLDER = Path(__file__).resolve().parents[2] / "manifests" / "classes"
SHIPPED = of_kind(load_manifests(FOLDER), DeviceClass)
CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
ALWAYS = {"onnxruntime", "tflite", "openvino"}  # toolchains that tests may install; others are large


def test_each_says_how_far_it_was_proven_and_bounds_what_it_costs() -> None:
    assert len(SHIPPED) > 10
    for one in SHIPPED:
        assert one.spec.proven, one.name
        # Nobody here knows which version runs what was only described.
        assert one.spec.engine_version or one.spec.proven.startswith("described"), one.name
        assert one.spec.budgets.memory_bytes <= 4 << 30, one.name


def test_apply_prints_how_far_each_class_was_proven_and_the_class_commands_show_it(fleet: Fleet) -> None:
    done = fleet.run("apply", "-f", str(FOLDER))
    assert done.returncode == 0, done.stderr
    for one in SHIPPED:
        assert (
            f"DeviceClass {one.name}: registered, its release role delegated; proven here: {one.spec.proven}"
            in done.stdout
        )
    listed = {c["metadata"]["name"]: c["spec"]["proven"] for c in fleet.json("class", "list")}
    assert {one.name: one.spec.proven for one in SHIPPED}.items() <= listed.items()
    shown = " ".join(fleet.run("class", "list").stdout.split())
    assert "pi3-armv7 armv7l, tflite >=2.14,<2.15, int8 controller compiled;" in shown
    told = fleet.run("class", "show", "pi4-coral").stdout
    for words in ("acceptance.allowed_providers", "EdgeTPU", "budgets.size_bytes", "described;"):
        assert words in told
    unknown = fleet.run("class", "show", "pi9")
    assert unknown.returncode != 0
    assert "no device class 'pi9'" in unknown.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classes")


@pytest.fixture(scope="module")
def version(folder: Path) -> ModelVersion:
    return import_model(decided(folder, classifier()), folder, Layout(folder / "layout"), cache=folder / "cache")


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda one: one.name)
def test_a_network_is_compiled_for_each_class_and_times_are_told_only_of_a_host_that_could_be_a_board_of_it(
    shipped: DeviceClass, version: ModelVersion, folder: Path, tmp_path: Path
) -> None:
    try:
        target = target_named(shipped.target)
    except ToolchainError as exc:
        pytest.skip(str(exc))
    if target.toolchain not in ALWAYS:
        pytest.skip(f"the toolchain {target.toolchain} is not among those that this test installs: {sorted(ALWAYS)}")
    quick = shipped.spec.search.model_copy(update={"effort": "quick"})
    wanted = shipped.model_copy(update={"spec": shipped.spec.model_copy(update={"search": quick})})
    layout = Layout(folder / "layout")
    try:
        result = compile_version(version, wanted, layout, Toolchains(CACHE), cache=folder / "cache")
    except MissingTool as exc:
        pytest.skip(str(exc))
    assert result.quality == "passed"
    member = shipped.spec.arch == platform.machine() and set(shipped.spec.cpu_features) <= cpu_features()
    figures = result.figures
    timed = (figures.p50_ms, figures.p95_ms, figures.float_p50_ms, figures.float_p95_ms)
    assert all(time is not None for time in timed) == member
    assert any(time is not None for time in timed) == member
    assert ("latency" in figures.unmeasured) == (not member)
    assert set(figures.unmeasured) <= (set() if member else {"latency", "memory"})
    config = layout.config(layout.manifest(result.artifact.digest))
    assert config.requires.cpu_features == tuple(sorted(shipped.spec.cpu_features))
    assert config.contract.latency_p95_ms == shipped.spec.budgets.latency_p95_ms, (
        "what was not measured the board judges"
    )
    told = json.loads(layout.read(result.report, 10**7))
    assert {c["figures"]["p50_ms"] is not None for c in told["candidates"] if not c["died"]} == {member}
    if not member:
        assert "unmeasured" in layout.read(result.page, 10**7).decode()
        return
    shutil.copytree(layout.root, tmp_path / "artifacts")
    report = accept(tmp_path, result.artifact.digest)
    assert report.verdict is Verdict.PASSED, report.reason
