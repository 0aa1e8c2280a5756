"""The contributor's guide: its very text is installed as a distribution of its own and compiles a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import yaml
from click.testing import CliRunner
from edgefleet_controller.cli import output
from edgefleet_controller.cli.main import main
from edgefleet_controller.compile.inventory import targets_of, try_out
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import installed_targets, target_named
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.source.importing import import_model
from edgefleet_shared import artifact
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import ManifestError, ModelError, ToolchainError
from support.networks import Net, classifier, project

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "writing-a-target.md"
TOOLCHAINS = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    return found


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's file and pyproject, built and installed by pip into a folder."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "half_weights_target.py").write_text(block("python"))
    (source / "pyproject.toml").write_text(block("toml"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    return site


@pytest.fixture
def installed(distribution: Path, monkeypatch: pytest.MonkeyPatch) -> DeviceClass:
    """The guide's device class, with its target importable."""
    monkeypatch.syspath_prepend(str(distribution))
    return DeviceClass.model_validate(yaml.safe_load(block("yaml")))


def test_the_guides_target_compiles_is_measured_and_ships(installed: DeviceClass, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    version = import_model(project(tmp_path, classifier()), tmp_path, layout, cache=tmp_path)
    result = compile_version(version, installed, layout, Toolchains(TOOLCHAINS), cache=tmp_path / "cache")
    figures = result.figures
    assert (result.precision, result.quality) == ("fp16", "passed")
    assert figures.agreement >= 0.98
    assert figures.compiled_bytes < 0.75 * figures.float_bytes
    assert figures.p50_ms > 0
    assert figures.stand_in == ""
    model = layout.manifest(result.artifact.digest).layer(artifact.MODEL_LAYER)
    shipped = onnx.load(str(layout.path(model.digest)))
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in shipped.graph.initializer}
    again = compile_version(version, installed, layout, Toolchains(TOOLCHAINS), cache=tmp_path / "cache")
    assert (again.cached, again.artifact.digest) == (True, result.artifact.digest)


def test_the_guides_option_is_part_of_the_key_and_others_are_refused(installed: DeviceClass, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    version = import_model(project(tmp_path, classifier()), tmp_path, layout, cache=tmp_path)

    def compiled(options: dict[str, int]) -> str:
        spec = installed.spec.model_copy(update={"options": options})
        target = installed.model_copy(update={"spec": spec})
        return compile_version(version, target, layout, Toolchains(TOOLCHAINS), cache=tmp_path / "cache").key

    assert compiled({"smallest": 32}) != compiled({"smallest": 4096})
    with pytest.raises(ManifestError, match="target half-weights has no option 'bits'; it has: smallest"):
        compiled({"bits": 8})


def test_what_the_guides_target_refuses_is_told_in_its_words(installed: DeviceClass, tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8)
    far = net.constant((net.rng.normal(size=(1, 8, 32, 32)) * 1e6).astype("float32"), "far")
    net.add("Mul", far)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    layout = Layout(tmp_path / "layout")
    version = import_model(project(tmp_path, net.model([1, 8])), tmp_path, layout, cache=tmp_path)
    with pytest.raises(ModelError, match=r"half-weights can't hold the tensor far: it outgrows float16"):
        compile_version(version, installed, layout, Toolchains(TOOLCHAINS), cache=tmp_path / "cache")


def test_the_inventory_knows_the_guides_target_and_tries_it_out(installed: DeviceClass) -> None:
    assert "half-weights" in installed_targets().targets
    (target,) = [one for one in targets_of("onnxruntime") if one.name == "half-weights"]
    tried = try_out(Toolchains(TOOLCHAINS), target, lambda *_: None)
    assert tried.problem == ""
    assert "fp16" in tried.told


BROKEN = {
    "does not import": ("raise ValueError('no licence')", "the target broken-one is installed but broken: ValueError: no licence"),
    "was not finished": (f"{block('python')}\ndel HalfWeightsTarget.tools, HalfWeightsTarget.halves_weights", "it has no tools, halves_weights"),
    "calls itself otherwise": (block("python"), "it calls itself 'half-weights', unlike its entry point"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_target_that_is_broken_is_told_and_keeps_no_other_from_its_work(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, told = BROKEN[how]
    (tmp_path / "broken_one.py").write_text(text)
    metadata = tmp_path / "broken_one-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-one\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[edgefleet.targets]\nbroken-one = broken_one:HalfWeightsTarget\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_one", raising=False)
    with pytest.raises(ToolchainError, match=told):
        target_named("broken-one")
    assert {"onnxruntime", "tflite"} <= set(installed_targets().targets)
    output.console.width = 250
    listed = CliRunner().invoke(main, ["toolchain", "list"], env={"EDGEFLEET_CACHE": str(tmp_path / "cache"), "EDGEFLEET_HOME": str(tmp_path / "home")})  # fmt: skip
    assert listed.exit_code == 0, listed.output
    assert re.search(told, " ".join(listed.output.split()))
