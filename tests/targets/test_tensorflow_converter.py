"""TensorFlow's own TFLite converter as a candidate for networks that came from Keras, on the real toolchains."""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from edgefleet_controller.compile import originals
from edgefleet_controller.compile.environments import Lock
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import Model
from edgefleet_controller.model_version import ModelVersion, Original, blobs
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import MODEL_LAYER, PROVENANCE_LAYER, Layout, digest_file
from safetensors.numpy import save_file
from support.networks import device_class

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
ROOT = Path(__file__).parents[2]
SPLITS = {"calibration": 24, "holdout": 40, "golden": 8}

MAKE = """
import sys, numpy as np, keras
folder = sys.argv[1]
keras.utils.set_random_seed(0)
L = keras.layers
image, more = keras.Input((24, 24, 3), name="image"), keras.Input((4,), name="extra")
x = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(image)))
x = L.Conv2D(32, 3, strides=2, padding="same", activation="relu")(L.DepthwiseConv2D(3, padding="same")(x))
x = L.Concatenate()([L.GlobalAveragePooling2D()(x), more])
outputs = [L.Dense(5, name="zeta")(x), L.Dense(3, name="alpha", activation="softmax")(x), L.Dense(7, name="mean")(x)]
model = keras.Model([image, more], outputs)
model.compile("adam", "mse")
model.save(f"{folder}/three.keras")
model.save(f"{folder}/three.h5")
model.export(f"{folder}/three.saved")
"""
RUN = """
import sys, numpy as np
try:
    from tflite_runtime.interpreter import Interpreter
except ImportError:
    from ai_edge_litert.interpreter import Interpreter
made = Interpreter(sys.argv[1], num_threads=1)
made.allocate_tensors()
given = np.load(sys.argv[2])
for detail in made.get_input_details():
    made.set_tensor(detail["index"], given[detail["name"]])
made.invoke()
print(made.get_signature_list())
np.savez(sys.argv[3], **{d["name"]: made.get_tensor(d["index"]) for d in made.get_output_details()})
print([d["name"] for d in made.get_input_details()], [d["name"] for d in made.get_output_details()])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of two inputs and three outputs, whose names are in no order, in each of Keras' formats; and its samples."""
    folder = tmp_path_factory.mktemp("keras")
    (folder / "make.py").write_text(MAKE)
    python = Toolchains(CACHE).ensure("keras").python
    environment = {"PATH": os.environ["PATH"], "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, str(folder / "make.py"), str(folder)], check=True, env=environment, cwd=folder, timeout=500)
    for seed, (split, count) in enumerate(SPLITS.items()):
        rng = np.random.default_rng(seed)
        coarse = rng.normal(size=(count, 6, 6, 3)).repeat(4, axis=1).repeat(4, axis=2)
        tensors = {"image": coarse.astype(np.float32), "extra": rng.normal(size=(count, 4)).astype(np.float32)}
        save_file(tensors, folder / f"{split}.safetensors")
    return folder


def imported(folder: Path, layout: Layout, name: str) -> ModelVersion:
    spec: dict[str, Any] = {
        "version": "1", "source": {"path": name}, "output": {"kind": "raw"},
        "acceptance": {"tolerance_abs": 0.5, "min_agreement": 0.5}, **{s: {"path": f"{s}.safetensors"} for s in SPLITS},
    }  # fmt: skip
    manifest = Model.model_validate({"kind": "Model", "metadata": {"name": "three"}, "spec": spec})
    return import_model(manifest, folder, layout, cache=CACHE)


@pytest.fixture(scope="module")
def shelf(made: Path) -> tuple[Layout, ModelVersion]:
    layout = Layout(made / "layout")
    return layout, imported(made, layout, "three.keras")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests that don't mind what another one compiled."""
    return tmp_path_factory.mktemp("cache")


def compiled(layout: Layout, version: ModelVersion, cache: Path, **spec: Any) -> tuple[CompileResult, Any]:
    """(the result, its report)."""
    fields: dict[str, Any] = {
        "arch": platform.machine(), "search": {"effort": "full", "prefer": "size"}, "accuracy": {"min_agreement": 0.5},
    }  # fmt: skip
    result = compile_version(version, device_class("tflite", **(fields | spec)), layout, Toolchains(CACHE), cache=cache)
    return result, msgspec.json.decode(layout.read(result.report, 10**8))


def by_tensorflow(report: Any, cache: Path) -> tuple[Any, Path]:
    """(the candidate, its file)."""
    (found,) = [c for c in report["candidates"] if c["recipe"]["quantizer"] == "tensorflow"]
    return found, cache / "compiled" / found["key"] / "compiled"


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("name", ["three.keras", "three.h5", "three.saved"])
def test_it_is_a_candidate_like_the_others(made: Path, tmp_path: Path, cache: Path, name: str, precision: str) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, name)
    _, report = compiled(layout, version, cache, precision=precision)
    assert report["left_out"] == []
    found, file = by_tensorflow(report, cache)
    assert found["told"].startswith(precision)
    assert "by tensorflow" in found["told"]
    assert found["figures"]["agreement"] >= (0.9 if precision == "fp32" else 0.5)
    assert found["figures"]["p50_ms"] is not None
    assert found["figures"]["compiled_bytes"] == file.stat().st_size


def test_the_same_inputs_give_the_same_bytes(shelf: tuple[Layout, ModelVersion], tmp_path: Path) -> None:
    digests = set()
    for number in range(2):
        cache = tmp_path / f"cache-{number}"
        digests.add(digest_file(by_tensorflow(compiled(*shelf, cache)[1], cache)[1]))
    assert len(digests) == 1


@pytest.mark.parametrize("runtime", ["tflite-runtime", "tflite"])
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_boards_of_both_runtimes_find_the_served_names_in_order_and_the_answers(
    made: Path, shelf: tuple[Layout, ModelVersion], tmp_path: Path, cache: Path, precision: str, runtime: str
) -> None:
    layout, version = shelf
    _, report = compiled(layout, version, cache, precision=precision)
    _, file = by_tensorflow(report, cache)
    python = interpreter(runtime)
    rng = np.random.default_rng(9)
    given = {
        "image": rng.normal(size=(1, 24, 24, 3)).astype(np.float32), "extra": rng.normal(size=(1, 4)).astype(np.float32),
    }  # fmt: skip
    np.savez(tmp_path / "given.npz", **given)
    (tmp_path / "run.py").write_text(RUN)
    command = [python, str(tmp_path / "run.py"), str(file), str(tmp_path / "given.npz"), str(tmp_path / "out.npz")]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    names = (["image", "extra"], ["zeta", "alpha", "mean"])
    assert told.splitlines()[-1] == f"{names[0]} {names[1]}"
    assert "'serving_default'" in told
    import onnx.reference

    wanted = onnx.reference.ReferenceEvaluator(onnx.load(layout.path(version.network))).run(None, given)
    answered = np.load(tmp_path / "out.npz")
    for name, want in zip(names[1], wanted, strict=True):
        noise = float(np.mean((answered[name] - want) ** 2) / np.mean(want**2))
        assert noise < (1e-8 if precision == "fp32" else 0.05), name


def interpreter(runtime: str) -> str:
    """A Python that has it: boards' older one from their own lock."""
    if runtime == "tflite":
        return Toolchains(CACHE).ensure("tflite").python
    if sys.version_info >= (3, 12):
        pytest.skip("tflite-runtime has no wheel after Python 3.11; tests/arm runs it")
    lock = Lock(runtime, (ROOT / "requirements" / "agent-tflite.txt").read_text())
    return Toolchains(CACHE).ensure(lock).python


def test_constants_lie_where_the_schema_asks(shelf: tuple[Layout, ModelVersion], cache: Path) -> None:
    file = by_tensorflow(compiled(*shelf, cache)[1], cache)[1]
    check = (
        "import sys; from ai_edge_litert import schema_py_generated as s; c = open(sys.argv[1], 'rb').read(); m = s.Model.GetRootAs(c, 0);"
        "b = [m.Buffers(i) for i in range(m.BuffersLength())];"
        "print(sorted({(x._tab.Vector(x._tab.Offset(4))) % 16 for x in b if x.DataLength()}))"
    )
    python = Toolchains(CACHE).ensure("tflite").python
    told = subprocess.run([python, "-c", check, str(file)], check=True, capture_output=True, text=True, timeout=120)
    assert told.stdout.strip() == "[0]"


def test_what_is_shipped_names_the_file_and_the_toolchain_it_was_made_by(
    shelf: tuple[Layout, ModelVersion], cache: Path
) -> None:
    """The class leaves no other candidate: it asks for fewer bytes than any has but one."""
    layout, version = shelf
    _, report = compiled(layout, version, cache)
    sizes = {c["told"]: c["figures"]["compiled_bytes"] for c in report["candidates"]}
    least = min(sizes.values())
    found, _ = by_tensorflow(report, cache)
    assert found["figures"]["compiled_bytes"] == least, f"else this shows nothing: {sizes}"
    budgets = {"latency_p95_ms": 1000.0, "memory_bytes": 1 << 30, "size_bytes": least}
    result, report = compiled(layout, version, cache, budgets=budgets)
    assert "by tensorflow" in result.recipe
    manifest = layout.manifest(result.artifact.digest)
    told = layout.read(manifest.layer(PROVENANCE_LAYER).digest, 10**7).decode()
    assert version.original is not None
    assert version.original.digest.partition(":")[2] in told
    assert '"toolchain keras"' in told
    assert manifest.layer(MODEL_LAYER).digest == digest_file(by_tensorflow(report, cache)[1])


def test_quick_effort_asks_it_only_where_the_plain_recipe_misses(
    shelf: tuple[Layout, ModelVersion], cache: Path
) -> None:
    quick = {"search": {"effort": "quick", "prefer": "size"}}
    _, good = compiled(*shelf, cache, **quick)
    tried = [(c["recipe"]["precision"], c["recipe"]["quantizer"]) for c in good["candidates"]]
    assert tried == [("int8", "edgefleet"), ("fp32", "edgefleet")], (
        "the plain recipe, and the float model that it is held against"
    )
    layout, version = shelf
    plain = good["candidates"][0]["figures"]["compiled_bytes"]
    budgets = {"latency_p95_ms": 1000.0, "memory_bytes": 1 << 30, "size_bytes": plain - 1}
    result = compile_version(
        version, device_class("tflite", arch=platform.machine(), accuracy={"min_agreement": 0.5}, budgets=budgets, **quick),
        layout, Toolchains(CACHE), cache=cache, ship_despite_quality=True,
    )  # fmt: skip
    report = msgspec.json.decode(layout.read(result.report, 10**8))
    assert "tensorflow" in {c["recipe"]["quantizer"] for c in report["candidates"]}


def hostile(made: Path, kind: str) -> tuple[bytes, str]:
    """(an original that is not what it says, its format)."""
    if kind == "noise":
        return b"PK\x03\x04" + bytes(4000), "keras"
    if kind == "cut":
        return (made / "three.h5").read_bytes()[:3000], "keras-h5"
    if kind == "another network":
        return other_names((made / "three.keras").read_bytes()), "keras"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../escaped" if kind == "writes outside" else "saved_model.pb", b"\xff" * 100)
    return out.getvalue(), "saved-model"


def other_names(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as to:
        for name in archive.namelist():
            own = archive.read(name)
            to.writestr(name, own.replace(b'"image"', b'"other"') if name == "config.json" else own)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["noise", "cut", "another network", "writes outside", "no graph"])
def test_a_hostile_original_costs_its_candidate_alone(
    made: Path, shelf: tuple[Layout, ModelVersion], tmp_path: Path, cache: Path, kind: str
) -> None:
    layout, version = shelf
    content, form = hostile(made, kind)
    planted = msgspec.structs.replace(version, original=Original(layout.put(content).digest, form))  # type: ignore[arg-type]
    result, report = compiled(layout, planted, cache)
    assert result.quality == "passed"
    (left,) = report["left_out"]
    assert left["lasting"]
    assert left["reason"]
    assert left["told"] in layout.read(result.page, 10**8).decode()
    assert not list(tmp_path.rglob("escaped"))
    assert not Path("/tmp/escaped").exists()


def test_a_converter_that_dies_costs_its_candidate_alone_and_is_asked_again(
    shelf: tuple[Layout, ModelVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as small:
        small.setattr(originals, "MEMORY_BYTES", 50_000_000)  # TensorFlow alone is more
        result, report = compiled(*shelf, tmp_path / "cache")
    assert result.quality == "passed"
    (left,) = report["left_out"]
    assert not left["lasting"]
    assert "process died" in left["reason"]
    assert by_tensorflow(compiled(*shelf, tmp_path / "cache")[1], tmp_path / "cache")[0]["figures"]["agreement"]


def test_a_version_names_its_original_and_the_same_folder_is_the_same_blob(made: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, "three.saved")
    assert version.original is not None
    assert version.original.format == "saved-model"
    assert version.original.digest in blobs(version)
    again = tmp_path / "again"
    for split in SPLITS:
        again.mkdir(exist_ok=True)
        shutil.copy(made / f"{split}.safetensors", again)
    shutil.copytree(made / "three.saved", again / "three.saved", copy_function=shutil.copyfile)
    assert imported(again, layout, "three.saved").digest == version.digest
