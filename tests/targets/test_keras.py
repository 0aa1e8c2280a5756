"""Networks in TensorFlow's formats on the real toolchain. It is installed on first use into EDGEFLEET_CACHE (default ~/.cache/edgefleet).

The files are made there too: TensorFlow is no dependency of the tests.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from edgefleet_controller.compile import search
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.converters import to_onnx
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import MODEL_LAYER, Layout, digest_file
from edgefleet_shared.errors import ModelError
from onnx import numpy_helper
from safetensors.numpy import save_file
from support.networks import device_class, write_pictures

TOOLCHAINS = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))

MAKE = """
import sys, numpy as np, tensorflow as tf, keras
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
folder = sys.argv[1]
keras.utils.set_random_seed(0)
L = keras.layers
x = inputs = keras.Input((32, 32, 3), name="image")
x = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(x)))
y = L.Conv2D(16, 1)(L.ReLU()(L.DepthwiseConv2D(3, padding="same")(x)))
x = L.Add()([x, y])
x = L.Conv2D(32, 3, strides=2, padding="same", activation="relu")(x)
x = L.AveragePooling2D(4)(x)
model = keras.Model(inputs, L.Dense(6, name="scores")(L.Flatten()(x)))
for layer in model.layers:  # normalisation that does something
    if isinstance(layer, L.BatchNormalization):
        layer.set_weights([w + 0.1 * np.random.default_rng(1).random(w.shape) for w in layer.get_weights()])
model.save(f"{folder}/net.keras")
model.save(f"{folder}/net.h5")
model.export(f"{folder}/net.saved")
call = tf.function(lambda image: model(image, training=False), input_signature=[tf.TensorSpec([1, 32, 32, 3], tf.float32, name="image")])
frozen = convert_variables_to_constants_v2(call.get_concrete_function())
converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen])
open(f"{folder}/net.tflite", "wb").write(converter.convert())
chance = np.random.default_rng(2)
sparse = keras.models.clone_model(model)
sparse.set_weights([w * (np.random.default_rng(3).random(w.shape) < 0.1) if w.ndim > 1 else w for w in model.get_weights()])
called = tf.function(lambda image: sparse(image, training=False), input_signature=[tf.TensorSpec([1, 32, 32, 3], tf.float32, name="image")])
thin = tf.lite.TFLiteConverter.from_concrete_functions([convert_variables_to_constants_v2(called.get_concrete_function())])
thin.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
open(f"{folder}/sparse.tflite", "wb").write(thin.convert())
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([chance.normal(0, 1, (1, 32, 32, 3)).astype(np.float32)] for _ in range(32))
converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
converter.inference_input_type = converter.inference_output_type = tf.int8
open(f"{folder}/net-int8.tflite", "wb").write(converter.convert())
shown = chance.normal(0, 1, (1, 32, 32, 3)).astype(np.float32)
np.save(f"{folder}/shown.npy", shown)
np.save(f"{folder}/answer.npy", model(shown, training=False).numpy())
fitted = keras.models.clone_model(model)
fitted.set_weights(model.get_weights())
fitted.compile(keras.optimizers.Adam(1e-5), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
fitted.fit(chance.normal(0, 1, (32, 32, 32, 3)), chance.integers(0, 6, 32), epochs=2, verbose=0)
fitted.save(f"{folder}/fitted.keras")
fitted.save(f"{folder}/fitted.h5")
np.save(f"{folder}/fitted.npy", fitted(shown, training=False).numpy())
inside = keras.Sequential([keras.Input((32, 32, 3)), L.Conv2D(4, 3, activation="relu")], name="inside")
inside.compile("adam", "mse")
whole = keras.Sequential([keras.Input((32, 32, 3), name="image"), inside, L.Flatten(), L.Dense(6)])
whole.compile("adam", "mse")
whole.save(f"{folder}/inside.keras")
lambdas = keras.Sequential([keras.Input((32, 32, 3), name="image"), L.Lambda(lambda x: x * 2), L.Flatten(), L.Dense(6)])
lambdas.save(f"{folder}/lambda.keras")
lambdas.save(f"{folder}/lambda.h5")
def small(first, **more):
    inputs = keras.Input((32, 32, 3), name="image")
    x = L.Conv2D(16, 3, strides=2, padding="same", **more)(first(inputs) if first else inputs)
    x = L.AveragePooling2D(4)(L.Conv2D(32, 3, strides=2, padding="same", **more)(x))
    return keras.Model(inputs, L.Dense(6, name="scores")(L.Flatten()(x)))
adapted = L.Normalization()
adapted.adapt(chance.normal(1, 2, (64, 32, 32, 3)).astype(np.float32))
for name, built in {
    "gelu": small(None, activation="gelu"), "adapted": small(adapted), "told": small(L.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 0.5])),
}.items():
    built.save(f"{folder}/{name}.keras")
    np.save(f"{folder}/{name}.npy", built(shown, training=False).numpy())
left, right = keras.Input((32, 32, 3), name="b"), keras.Input((32, 32, 3), name="a")
seen = L.GlobalAveragePooling2D()(L.Concatenate()([L.Conv2D(8, 3)(left), L.Conv2D(8, 5, padding="valid")(L.ZeroPadding2D(1)(right))]))
named = keras.Model({"one": left, "other": right}, {"zz": L.Dense(6, name="first")(seen), "aa": L.Dense(6, name="second")(seen)})
named.save(f"{folder}/named.keras")
said = named({"one": shown, "other": -shown}, training=False)
np.save(f"{folder}/first.npy", said["zz"].numpy())
np.save(f"{folder}/second.npy", said["aa"].numpy())
taken = keras.Input((32, 32, 3), name="image", dtype="uint8")
x = L.AveragePooling2D(8)(L.Conv2D(16, 3, activation="relu", padding="same")(L.Rescaling(1 / 255.0)(taken)))
bytes_in = keras.Model(taken, L.Dense(6, name="scores")(L.Flatten()(x)))
bytes_in.save(f"{folder}/bytes.keras")
np.save(f"{folder}/bytes.npy", bytes_in(np.arange(3072).astype(np.uint8).reshape(1, 32, 32, 3), training=False).numpy())
for policy in ("mixed_float16", "mixed_bfloat16"):
    exact = small(None, activation="relu")
    keras.mixed_precision.set_global_policy(policy)
    mixed = small(None, activation="relu")
    keras.mixed_precision.set_global_policy("float32")
    mixed.set_weights(exact.get_weights())
    mixed.save(f"{folder}/{policy}.keras")
    np.save(f"{folder}/{policy}.npy", exact(shown, training=False).numpy())
class Counting(tf.Module):
    def __init__(self):
        self.seen = tf.Variable(tf.zeros([1, 4]))
    @tf.function(input_signature=[tf.TensorSpec([1, 4], tf.float32, name="image")])
    def __call__(self, image):
        self.seen.assign_add(image)
        return {"sum": self.seen.read_value() * 2.0}
counting = Counting()
stateful = tf.lite.TFLiteConverter.from_concrete_functions([counting.__call__.get_concrete_function()], counting)
stateful.experimental_enable_resource_variables = True
open(f"{folder}/stateful.tflite", "wb").write(stateful.convert())
class Reader(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([1, 32, 32, 3], tf.float32)])
    def __call__(self, image):
        return tf.reduce_sum(image) + tf.cast(tf.strings.length(tf.io.read_file("/etc/passwd")), tf.float32)
reader = Reader()
tf.saved_model.save(reader, f"{folder}/reader.saved", signatures=reader.__call__.get_concrete_function())
sequence = keras.Input((20, 8), name="steps")
keras.Model(sequence, keras.layers.Dense(3)(keras.layers.LSTM(4)(sequence))).save(f"{folder}/recurrent.keras")
class Served(tf.Module):
    def __init__(self):
        super().__init__()
        self.weight = tf.Variable(tf.random.stateless_normal([3, 4], seed=[1, 2]))
    @tf.function(input_signature=[tf.TensorSpec([1, 32, 32, 3], tf.float32, name="image")])
    def scores(self, image):
        return {"scores": tf.matmul(tf.reduce_mean(image, [1, 2]), self.weight)}
    @tf.function(input_signature=[tf.TensorSpec([1, 32, 32, 3], tf.float32, name="image")])
    def colour(self, image):
        return {"colour": tf.reduce_mean(image, [1, 2])}
served = Served()
scores, colour = served.scores.get_concrete_function(), served.colour.get_concrete_function()
for name, others in {"first": {"train": colour}, "behind": {"explain": colour}}.items():  # TensorFlow's converter writes them by name
    tf.saved_model.save(served, f"{folder}/{name}.saved", signatures={"serving_default": scores, **others})
    lite = tf.lite.TFLiteConverter.from_saved_model(f"{folder}/{name}.saved", signature_keys=["serving_default", *others])
    open(f"{folder}/signed-{name}.tflite", "wb").write(lite.convert())
tf.saved_model.save(served, f"{folder}/named.saved", signatures={"predict": scores})
tf.saved_model.save(served, f"{folder}/several.saved", signatures={"predict": scores, "explain": scores})
unsigned = tf.Module()
unsigned.weight = tf.Variable(1.0)
tf.saved_model.save(unsigned, f"{folder}/unsigned.saved")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one network in every format, and hostile ones."""
    folder = tmp_path_factory.mktemp("keras")
    python = Toolchains(TOOLCHAINS).ensure("keras").python
    (folder / "make.py").write_text(MAKE)
    environment = {"PATH": os.environ["PATH"], "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, str(folder / "make.py"), str(folder)], check=True, env=environment, cwd=folder, timeout=500)
    for split, count in {"calibration": 16, "holdout": 32, "golden": 8}.items():
        write_pictures(folder / split, count, seed=len(split))
    return folder


def manifest(path: str, name: str = "image", **spec: Any) -> Model:
    picture = {"name": name, "layout": "NHWC", "mean": [127.5], "std": [64.0]}
    fields = {
        "version": "1",
        "source": {"path": path},
        "inputs": [picture],
        **{s: {"path": s} for s in ("calibration", "holdout", "golden")},
    }
    return Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": fields | spec})


def imported(folder: Path, layout: Layout, path: str, **more: Any) -> ModelVersion:
    return import_model(manifest(path, **more), folder, layout, cache=TOOLCHAINS)


def compiled(version: ModelVersion, layout: Layout, cache: Path, engine: str, **spec: Any) -> CompileResult:
    fields: dict[str, Any] = {"search": {"effort": "quick", "prefer": "size"}, "accuracy": {"min_agreement": 0.7}}
    wanted = device_class(engine, arch=platform.machine(), **(fields | spec))
    return compile_version(version, wanted, layout, Toolchains(TOOLCHAINS), cache=cache)


def answers(layout: Layout, version: ModelVersion, shown: Any) -> Any:
    import onnx.reference

    run = onnx.reference.ReferenceEvaluator(onnx.load(layout.path(version.network)))
    return run.run(None, {version.inputs[0].name: shown})[0]


@pytest.mark.parametrize("name", ["net.keras", "net.h5", "net.saved", "net.tflite"])
def test_a_network_answers_as_onnx_what_it_did_and_keeps_its_names(made: Path, tmp_path: Path, name: str) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, name)
    assert [(t.name, t.shape) for t in version.inputs] == [("image", (1, 32, 32, 3))]
    assert np.allclose(answers(layout, version, np.load(made / "shown.npy")), np.load(made / "answer.npy"), atol=1e-4)
    assert version.as_is == ""
    assert imported(made, layout, name).digest == version.digest


@pytest.mark.parametrize("name", ["fitted.keras", "fitted.h5"])
def test_a_network_is_taken_with_the_optimizer_that_it_was_trained_by(made: Path, tmp_path: Path, name: str) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, name)
    assert np.allclose(answers(layout, version, np.load(made / "shown.npy")), np.load(made / "fitted.npy"), atol=1e-4)


@pytest.mark.parametrize("name", ["gelu", "adapted", "told", "mixed_float16", "mixed_bfloat16"])
def test_a_network_answers_in_float_what_its_weights_say(made: Path, tmp_path: Path, name: str) -> None:
    """Keras' own gelu, normalisation by what it was adapted to or told, and mixed precision, in which a GPU trained it."""
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, f"{name}.keras")
    assert [(t.name, t.datatype) for t in (*version.inputs, *version.outputs)] == [
        ("image", "FP32"),
        ("scores", "FP32"),
    ]
    assert np.allclose(answers(layout, version, np.load(made / "shown.npy")), np.load(made / f"{name}.npy"), atol=1e-4)
    wanted = {"effort": "full", "prefer": "size"}
    result = compiled(version, layout, tmp_path / "cache", "tflite", search=wanted)
    assert (result.precision, result.quality) == ("int8", "passed")
    report = json.loads(layout.read(result.report, 10**7))
    assert report["left_out"] == []
    assert any(one["recipe"]["quantizer"] == "tensorflow" for one in report["candidates"])


def test_a_keras_network_whose_inputs_and_outputs_have_names_keeps_them_apart(made: Path, tmp_path: Path) -> None:
    import onnx.reference

    converted = to_onnx(made / "named.keras", "keras", TOOLCHAINS, lambda *_: None)
    run = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(converted.onnx))
    shown = np.load(made / "shown.npy")
    said = dict(zip(run.output_names, run.run(None, {"b": shown, "a": -shown}), strict=True))
    assert sorted(said) == ["first", "second"]
    for name, values in said.items():
        assert np.allclose(values, np.load(made / f"{name}.npy"), atol=1e-4)


def test_a_keras_network_that_takes_bytes_is_given_bytes(made: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    chance = np.random.default_rng(5)
    for split, count in {"calibration": 16, "holdout": 32, "golden": 8}.items():
        pictures = np.repeat(chance.integers(0, 256, (count, 4, 4, 3)), 8, axis=1).repeat(8, axis=2).astype(np.uint8)
        save_file({"image": np.ascontiguousarray(pictures)}, made / f"{split}.safetensors")
    sets: dict[str, Any] = {split: {"path": f"{split}.safetensors"} for split in ("calibration", "holdout", "golden")}
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 1e-3}}
    version = imported(made, layout, "bytes.keras", inputs=[], **sets, **raw)
    assert version.inputs[0].datatype == "UINT8"
    shown = np.arange(3072).astype(np.uint8).reshape(1, 32, 32, 3)
    assert np.allclose(answers(layout, version, shown), np.load(made / "bytes.npy"), atol=1e-4)
    full = {"effort": "full", "prefer": "size"}
    result = compiled(version, layout, tmp_path / "cache", "tflite", search=full, precision="fp32")
    assert result.quality == "passed"
    assert json.loads(layout.read(result.report, 10**7))["left_out"] == []


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite"])
@pytest.mark.parametrize("name", ["net.keras", "net.tflite"])
def test_it_compiles_to_int8(made: Path, tmp_path: Path, name: str, engine: str) -> None:
    layout = Layout(tmp_path / "layout")
    result = compiled(imported(made, layout, name), layout, tmp_path / "cache", engine)
    assert (result.precision, result.quality) == ("int8", "passed")
    assert result.figures.compiled_bytes < result.figures.float_bytes


def test_relu6_compiles_with_full_effort(made: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    wanted = {"effort": "full", "prefer": "size"}
    result = compiled(imported(made, layout, "net.keras"), layout, tmp_path / "cache", "onnxruntime", search=wanted)
    assert result.quality == "passed"
    tried = json.loads(layout.read(result.report, 10**7))["candidates"]
    int8 = [one for one in tried if one["recipe"]["precision"] == "int8"]
    assert len(int8) > 3
    assert not any(one["died"] or one["misses"] for one in int8)
    # So small a network is hardly smaller in int8 than in half precision, which is the more exact.
    least = min(one["figures"]["compiled_bytes"] for one in tried)
    assert result.figures.compiled_bytes <= least * search.ALIKE


def test_a_quantized_tflite_is_taken_as_it_is_and_measured(made: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, "net-int8.tflite")
    result = compiled(version, layout, tmp_path / "cache", "tflite")
    layer = layout.manifest(result.artifact.digest).layer(MODEL_LAYER)
    assert layer.digest == version.as_is == digest_file(made / "net-int8.tflite")
    assert result.recipe == "int8, as it came"
    assert result.figures.agreement is not None
    assert result.figures.p50_ms is not None
    other = compiled(version, layout, tmp_path / "cache", "onnxruntime")
    assert other.recipe.startswith("int8, minmax")


@pytest.mark.parametrize("name", ["lambda.keras", "lambda.h5"])
def test_a_lambda_layer_is_refused_unloaded(made: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"names .*Lambda.* which would run code of the file's choice"):
        imported(made, Layout(tmp_path / "layout"), name)


def test_a_layer_of_a_class_that_keras_does_not_have_is_named(made: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(made / "net.keras") as source, zipfile.ZipFile(made / "custom.keras", "w") as copy:
        for entry in source.namelist():
            content = source.read(entry)
            if entry == "config.json":
                config = json.loads(content)
                layer = next(one for one in config["config"]["layers"] if one["class_name"] == "Conv2D")
                layer |= {"class_name": "Scale", "module": None, "registered_name": "mine>Scale"}
                where, content = layer["config"]["name"], json.dumps(config).encode()
            copy.writestr(entry, content)
    with pytest.raises(ModelError, match=rf"a class of its own, mine>Scale \(layer '{where}'\)") as caught:
        imported(made, Layout(tmp_path / "layout"), "custom.keras")
    assert "model.export(folder)" in caught.value.hint


def test_a_tflite_that_remembers_what_it_was_asked_before_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"keeps values from one call to the next \(.*VAR_HANDLE") as caught:
        imported(made, Layout(tmp_path / "layout"), "stateful.tflite")
    assert "as inputs and outputs" in caught.value.hint


def test_custom_operators_of_a_tflite_are_named_with_what_to_do(made: Path, tmp_path: Path) -> None:
    content = (made / "net.tflite").read_bytes()
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    codes = {code.builtinCode: code for code in model.operatorCodes}
    for known, name in ((schema.BuiltinOperator.CONV_2D, "Warp"), (schema.BuiltinOperator.ADD, "Blend")):
        codes[known].builtinCode = codes[known].deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
        codes[known].customCode = name
    for operator in model.subgraphs[0].operators:
        if model.operatorCodes[operator.opcodeIndex].customCode:
            operator.builtinOptions, operator.builtinOptionsType = None, 0
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    (made / "custom.tflite").write_bytes(builder.Output())
    with pytest.raises(ModelError, match=r"custom operators, .*: Warp \(3 times\), Blend \(convert") as caught:
        imported(made, Layout(tmp_path / "layout"), "custom.tflite")
    assert "built-in operators alone" in caught.value.hint


def test_a_recurrent_layer_is_refused_with_what_makes_it_one_that_can_be_served(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"branches or loops .*: \S*(lstm|gru)\S*while_loop") as caught:
        imported(made, Layout(tmp_path / "layout"), "recurrent.keras")
    assert "unroll=True" in caught.value.hint


def test_of_a_saved_model_the_only_signature_is_taken_and_others_are_told(made: Path, tmp_path: Path) -> None:
    assert imported(made, Layout(tmp_path / "layout"), "named.saved").outputs[0].name == "scores"
    for name, told in (
        ("several", r"has the signatures explain, predict, and no serving_default"),
        ("unsigned", r"has no signature, such as serving_default"),
    ):
        with pytest.raises(ModelError, match=told) as caught:
            imported(made, Layout(tmp_path / "layout"), f"{name}.saved")
        assert "signatures=" in caught.value.hint


def test_of_a_tflite_file_with_several_signatures_only_the_one_that_boards_would_run_is_served(
    made: Path, tmp_path: Path
) -> None:
    (output,) = imported(
        made, Layout(tmp_path / "layout"), "signed-first.tflite", name="serving_default_image:0"
    ).outputs
    assert output.shape == (1, 4)
    with pytest.raises(ModelError, match=r"signatures explain, serving_default; .* run the first, explain") as caught:
        imported(made, Layout(tmp_path / "layout"), "signed-behind.tflite", name="explain_image:0")
    assert "signature_keys" in caught.value.hint


def test_a_saved_model_that_reads_files_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has the operator ReadFile"):
        imported(made, Layout(tmp_path / "layout"), "reader.saved")


def rewritten(source: Path, target: Path, change: Any) -> None:
    """A .keras file with another configuration."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as out:
        for name in archive.namelist():
            content = archive.read(name)
            out.writestr(name, json.dumps(change(json.loads(content))) if name == "config.json" else content)


def module_of_the_files_choice(config: Any) -> Any:
    """The attack of CVE-2025-1550: a layer's class by module and name, which is imported."""
    config["config"]["layers"][1] |= {"module": "os", "class_name": "system"}
    return config


def function_by_name(config: Any) -> Any:
    config["config"]["layers"][1]["config"]["activation"] = {
        "module": "keras.utils",
        "class_name": "function",
        "config": "get_file",
    }
    return config


def model_inside(config: Any) -> Any:
    config["config"]["layers"][1] |= {"module": "keras.layers", "class_name": "TFSMLayer"}
    return config


def code_to_compile_a_model_inside_with(config: Any) -> Any:
    """Keras sets aside how the whole model was compiled; a model inside it is compiled again, by what the file names."""
    (inside,) = (layer for layer in config["config"]["layers"] if layer["class_name"] == "Sequential")
    inside["compile_config"] = {"optimizer": {"module": "os", "class_name": "system", "config": {}}}
    return config


def lambda_inside(config: Any) -> Any:
    config["config"]["layers"][1] |= {"module": "keras.layers", "class_name": "Lambda"}
    return config


def registered_elsewhere(config: Any) -> Any:
    """An object that a module of the file's choice registers when it is imported."""
    config["config"]["layers"][1] |= {
        "module": "antigravity",
        "class_name": "Dense",
        "registered_name": "antigravity>Dense",
    }
    return config


ATTACKS = [
    module_of_the_files_choice, function_by_name, model_inside, code_to_compile_a_model_inside_with, lambda_inside, registered_elsewhere,
]  # fmt: skip


def test_weights_that_are_stored_sparse_are_read(made: Path, tmp_path: Path) -> None:
    """The import itself holds the ONNX network's answers against TFLite's."""
    layout = Layout(tmp_path / "layout")
    version = imported(made, layout, "sparse.tflite")
    model = onnx.load_from_string(layout.read(version.network, 10**8))
    weights = [numpy_helper.to_array(i) for i in model.graph.initializer if len(i.dims) > 1]
    assert any(np.mean(w == 0) > 0.8 for w in weights), "nothing in it was sparse"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_configuration_that_names_code_is_refused(made: Path, tmp_path: Path, attack: Any) -> None:
    source = "inside.keras" if attack is code_to_compile_a_model_inside_with else "fitted.keras"
    rewritten(made / source, made / f"{attack.__name__}.keras", attack)
    with pytest.raises(ModelError, match="would run code of the file's choice"):
        imported(made, Layout(tmp_path / "layout"), f"{attack.__name__}.keras")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.h5", lambda whole: whole["net.h5"][:3000], "no whole Keras model"),
        ("cut.tflite", lambda whole: whole["net.tflite"][:900], "can't be loaded|broke over this file"),
        ("noise.tflite", lambda whole: whole["net.tflite"][:8] + bytes(5000), "can't be loaded|broke over this file"),
    ],
)
def test_a_damaged_file_is_told(made: Path, tmp_path: Path, name: str, content: Any, words: str) -> None:
    (made / name).write_bytes(content({n: (made / n).read_bytes() for n in ("net.h5", "net.tflite")}))
    with pytest.raises(ModelError, match=words):
        imported(made, Layout(tmp_path / "layout"), name)


def test_weights_alone_are_told(made: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(made / "net.keras") as archive:
        (made / "weights.h5").write_bytes(archive.read("model.weights.h5"))
    with pytest.raises(ModelError, match="weights alone; save the whole model"):
        imported(made, Layout(tmp_path / "layout"), "weights.h5")
