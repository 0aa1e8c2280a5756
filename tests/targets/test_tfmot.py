"""Pruning by tfmot for networks that came from Keras, on the real toolchains: a small convnet is trained, pruned, and compiled."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import Layout, digest_file
from safetensors.numpy import save_file
from support.networks import blobs_of_light, device_class

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
SPLITS = {"calibration": 24, "holdout": 100, "golden": 8, "training": 400}

MAKE = """
import sys, numpy as np, keras
folder = sys.argv[1]
keras.utils.set_random_seed(0)
L = keras.layers
given = np.load(f"{folder}/fit.npz")
image = keras.Input((32, 32, 3), name="image")
x = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(image)))
x = L.Add()([x, L.Conv2D(16, 1)(L.DepthwiseConv2D(3, padding="same", activation="relu")(x))])
inside = keras.Sequential([keras.Input((16, 16, 16)), L.Conv2D(32, 3, strides=2, padding="same"), L.LeakyReLU(negative_slope=0.1)], name="inside")
x = L.Dropout(0.2)(L.AveragePooling2D(4)(inside(x)))
model = keras.Model(image, L.Dense(4, activation="softmax", name="scores")(L.Flatten()(x)))
model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(given["x"], given["y"], epochs=12, batch_size=32, verbose=0)
model.save(f"{folder}/net.keras")
model.save(f"{folder}/net.h5")
model.export(f"{folder}/net.saved")
y = L.Conv2D(8, 3, strides=4)(image) * 2.0
keras.Model(image, L.Dense(4, name="scores")(L.Flatten()(y))).save(f"{folder}/operator.keras")
y = L.Activation("hard_sigmoid")(L.Conv2D(8, 3, strides=4)(image))
keras.Model(image, L.Dense(4, name="scores")(L.Flatten()(y))).save(f"{folder}/meaning.keras")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keras")
    pictures, truth = blobs_of_light(600, 99)
    np.savez(folder / "fit.npz", x=(pictures.astype(np.float32) - 127.5) / 64, y=np.array(truth))
    (folder / "make.py").write_text(MAKE)
    python = Toolchains(CACHE).ensure("keras").python
    environment = {"PATH": os.environ["PATH"], "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, str(folder / "make.py"), str(folder)], check=True, env=environment, cwd=folder, timeout=500)
    for seed, (split, count) in enumerate(SPLITS.items()):
        shown, answers = blobs_of_light(count, seed)
        save_file({"image": shown}, folder / f"{split}.safetensors")
        (folder / f"{split}.txt").write_text("\n".join(map(str, answers)) + "\n")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one test had compiled serves the next."""
    return tmp_path_factory.mktemp("cache")


def imported(
    folder: Path, layout: Layout, name: str = "net.keras", *, labelled: bool = True, **prune: Any
) -> ModelVersion:
    training = {"path": "training.safetensors"} | ({"truth": "training.txt"} if labelled else {})
    spec: dict[str, Any] = {
        "version": "1", "source": {"path": name},
        "inputs": [{"name": "image", "layout": "NHWC", "mean": [127.5], "std": [64.0]}],
        "calibration": {"path": "calibration.safetensors"}, "golden": {"path": "golden.safetensors"},
        "holdout": {"path": "holdout.safetensors", "truth": "holdout.txt"},
        "prune": {"epochs": 2, "steps": 2, "batch": 32, "training": training, **prune},
    }  # fmt: skip
    manifest = Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": spec})
    return import_model(manifest, folder, layout, cache=CACHE)


def compiled(
    layout: Layout, version: ModelVersion, cache: Path, agreement: float = 0.85, **more: Any
) -> tuple[CompileResult, Any]:
    """(the result, its report)."""
    wanted = device_class(
        "tflite", arch=platform.machine(), search={"effort": "full", "prefer": "transfer"},
        accuracy={"min_agreement": agreement},
    )  # fmt: skip
    result = compile_version(version, wanted, layout, Toolchains(CACHE), cache=cache, **more)
    return result, msgspec.json.decode(layout.read(result.report, 10**8))


def by_tensorflow(report: Any, *, pruned: bool) -> list[Any]:
    return [
        c
        for c in report["candidates"]
        if c["recipe"]["quantizer"] == "tensorflow" and bool(c["recipe"]["pruned"]) == pruned
    ]


@pytest.mark.parametrize(("name", "labelled"), [("net.keras", True), ("net.h5", False)])
def test_a_trained_network_loses_most_weights_keeps_its_answers_and_gets_cheaper_to_send(
    made: Path, tmp_path: Path, cache: Path, name: str, labelled: bool
) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, name, labelled=labelled, unstructured=0.7)
    result, report = compiled(layout, version, cache)
    assert report["left_out"] == []
    assert report["tfmot"]["stopped"] == ""
    shares = [step["sparsity"] for step in report["tfmot"]["steps"]]
    assert shares == sorted(shares)
    assert abs(shares[-1] - 0.7) < 0.03
    (whole,), (pruned,) = by_tensorflow(report, pruned=False), by_tensorflow(report, pruned=True)
    assert pruned["figures"]["agreement"] >= 0.85
    assert pruned["figures"]["wire_bytes"] < 0.85 * whole["figures"]["wire_bytes"]
    assert "70% pruned" in pruned["told"]
    assert report["pruning"]["steps"], "the ONNX form is pruned too, as for every network"
    assert result.quality == "passed"
    page = layout.read(result.page, 10**8).decode()
    assert "Pruning by tfmot" in page


def test_the_same_inputs_give_the_same_bytes_when_everything_is_made_again(
    made: Path, tmp_path: Path, cache: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, unstructured=0.6, steps=1, epochs=1)
    digests = set()
    for _ in range(2):
        for kind in ("pruned", "compiled", "searched"):
            shutil.rmtree(cache / kind, ignore_errors=True)
        (found,) = by_tensorflow(compiled(layout, version, cache)[1], pruned=True)
        digests.add(digest_file(cache / "compiled" / found["key"] / "compiled"))
    assert len(digests) == 1


def test_pruning_that_costs_too_much_is_tuned_once_more_and_then_stops(made: Path, tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, unstructured=0.995, steps=3, epochs=1, learning_rate=1e-5)
    result, report = compiled(layout, version, cache, agreement=0.95)
    last = report["tfmot"]["steps"][-1]
    assert last["misses"]
    assert last["step"]["again"]
    assert "agreement with the float model" in report["tfmot"]["stopped"]
    assert "pruning stopped where" in result.why
    assert result.figures.agreement is not None
    assert result.figures.agreement >= 0.95


@pytest.mark.parametrize(
    ("name", "prune", "words"),
    [
        ("operator.keras", {"unstructured": 0.5}, r"Multiply \(layer 'multiply.*'\) is missing there"),
        ("meaning.keras", {"unstructured": 0.5}, "rebuilt in tf_keras this network answers otherwise"),
        ("net.saved", {"unstructured": 0.5}, "a SavedModel is a graph without layers"),
        ("net.keras", {"structured": 0.3}, "tfmot zeros single weights only"),
    ],
)
def test_what_tfmot_cant_prune_is_told_plainly_and_costs_itself_alone(
    made: Path, tmp_path: Path, cache: Path, name: str, prune: Any, words: str
) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, name, steps=1, epochs=1, **prune)
    _, report = compiled(layout, version, cache, agreement=0.5, ship_despite_quality=True)
    (left,) = report["left_out"]
    assert re.search(words, left["reason"]), left
    assert left["lasting"]
    assert "by tensorflow" in left["told"]
    assert by_tensorflow(report, pruned=False)
    assert not by_tensorflow(report, pruned=True)
    assert report["tfmot"] is None
    assert report["pruning"]["steps"]
