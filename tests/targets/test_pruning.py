"""Pruning on the real toolchain (torch, torch-pruning). It is installed on first use into EDGEFLEET_CACHE (default ~/.cache/edgefleet)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.steps import Limits
from edgefleet_controller.compile.toolchains import Cancelled, Toolchains
from edgefleet_controller.manifests import Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import MODEL_LAYER, Layout
from edgefleet_shared.errors import QualityError, ToolchainError
from safetensors.numpy import save_file
from support.networks import Net, blobs_of_light, device_class

TOOLCHAINS = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
CLASSES = 4  # of blobs_of_light


class Bench:
    """A layout, a fresh cache of compiled models, and the shared toolchains."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.layout = Layout(folder / "layout")
        self.cancel = threading.Event()

    def version(self, network: onnx.ModelProto, prune: dict[str, Any], **spec: Any) -> ModelVersion:
        (self.folder / "net.onnx").write_bytes(network.SerializeToString(deterministic=True))
        for seed, (split, count) in enumerate(
            {"calibration": 24, "holdout": 100, "golden": 8, "training": 400}.items()
        ):
            pictures, truth = blobs_of_light(count, seed)
            save_file({"image": pictures}, self.folder / f"{split}.safetensors")
            (self.folder / f"{split}.txt").write_text("\n".join(map(str, truth)) + "\n")
        training = {"path": "training.safetensors"} | ({"truth": "training.txt"} if spec.pop("labelled", False) else {})
        fields: dict[str, Any] = {
            "version": "1", "source": {"path": "net.onnx"}, "inputs": [{"name": "image", "mean": [127.5], "std": [64.0]}],
            "calibration": {"path": "calibration.safetensors"}, "golden": {"path": "golden.safetensors"},
            "holdout": {"path": "holdout.safetensors", "truth": "holdout.txt"},
            # As the class asks, and of answers: what follows the float model's answers may give them by other scores.
            "acceptance": {"min_agreement": 0.8, "min_cosine": 0.7},
            "prune": {"epochs": 2, "steps": 2, "batch": 32, "training": training, **prune},
        }  # fmt: skip
        manifest = Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": fields | spec})
        return import_model(manifest, self.folder, self.layout, cache=self.cache)

    def compile(
        self, version: ModelVersion, engine: str = "onnxruntime", *, prefer: str = "size", **more: Any
    ) -> CompileResult:
        accuracy = more.pop("accuracy", {"min_agreement": 0.8})
        search = {"effort": "quick", "prefer": prefer, "pruned": more.pop("pruned", True)}
        own = {name: more.pop(name) for name in ("precision", "budgets") if name in more}
        wanted = device_class(engine, arch=platform.machine(), accuracy=accuracy, search=search, **own)
        toolchains = Toolchains(TOOLCHAINS, cancel=self.cancel)
        return compile_version(version, wanted, self.layout, toolchains, cache=self.cache, **more)

    def report(self, result: CompileResult) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.layout.read(result.report, 10**7))
        return found

    def network(self, result: CompileResult) -> onnx.ModelProto:
        layer = self.layout.manifest(result.artifact.digest).layer(MODEL_LAYER)
        return onnx.load(self.layout.path(layer.digest))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def classifying(net: Net) -> onnx.ModelProto:
    """The network with a trained layer behind its 64 x 8 x 8 features."""
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    return answering(net)


def answering(net: Net) -> onnx.ModelProto:
    """The network with a trained layer behind its 256 features."""
    net.add("Reshape", net.constant(np.array([1, 256], np.int64)))
    features = net.last
    net.dense(256, CLASSES)
    model = net.model([1, CLASSES])
    fitted(model, features)
    return model


def seer(pads: list[int] | None = None, middle: int = 0) -> onnx.ModelProto:
    """A network that sees the quarter with the bright spot: random convolutions, and a last layer fitted to their outputs.

    Args:
        pads: of the convolutions with a stride; None: even ones.
        middle: so many convolutions of 12 channels, each of its own width, after the shortcut.
    """
    net = Net(1)
    net.conv(3, 32, stride=2, pads=pads)
    net.relu6()
    shortcut = net.last
    net.conv(32, 32, group=32)
    net.relu6()
    net.conv(32, 32, 1, pads=[0, 0, 0, 0])
    net.add("Add", shortcut)
    net.add("Relu")
    for number in range(middle):
        net.conv(12 if number else 32, 12)
        net.add("Relu")
    net.conv(12 if middle else 32, 64, stride=2, pads=pads)
    net.add("Relu")
    return classifying(net)


def fitted(model: onnx.ModelProto, features: str) -> None:
    """Give the last layer the weights of a linear regression from its inputs to the classes."""
    import onnx.reference

    pictures, truth = blobs_of_light(300, 99)
    inputs = ((pictures.astype(np.float32) - 127.5) / 64).transpose(0, 3, 1, 2)
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    seen.graph.output.append(onnx.helper.make_tensor_value_info(features, onnx.TensorProto.FLOAT, [1, 256]))
    run = onnx.reference.ReferenceEvaluator(seen)
    x = np.concatenate([run.run(None, {"image": one[None]})[0] for one in inputs])
    wanted = np.eye(CLASSES)[truth] * 8 - 2
    x1 = np.hstack([x, np.ones((len(x), 1))])
    solved = np.linalg.solve(x1.T @ x1 + 0.5 * np.eye(x1.shape[1]), x1.T @ wanted)
    (dense,) = (node for node in model.graph.node if node.op_type == "Gemm")
    for tensor in model.graph.initializer:
        values = {dense.input[1]: solved[:-1].T, dense.input[2]: solved[-1]}.get(tensor.name)
        if values is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values, np.float32), tensor.name))


def weights(model: onnx.ModelProto) -> int:
    """Entries of convolutions and dense layers."""
    constants = {i.name: i for i in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    count = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            source = made.get(node.input[1])
            name = source.input[0] if source is not None else node.input[1]
            count += int(np.prod(constants[name].dims))
    return count


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_half_of_the_weights_go_channel_by_channel_and_the_answers_stay(bench: Bench, engine: str) -> None:
    version = bench.version(seer(), {"structured": 0.5})
    result = bench.compile(version, engine)
    whole = bench.compile(version, engine, pruned=False)
    report = bench.report(result)
    assert report["recipe"]["pruned"]
    assert report["pruning"]["stopped"] == ""
    assert [round(s["sparsity"], 1) for s in report["pruning"]["steps"]][-1] >= 0.5
    assert result.figures.agreement >= 0.8
    assert (
        result.figures.wire_bytes < 0.8 * whole.figures.wire_bytes
    )  # most of so small a file of OpenVINO's is its XML
    assert result.figures.compiled_bytes < whole.figures.compiled_bytes
    assert bench.report(whole)["pruning"] is None
    if engine == "onnxruntime":
        assert weights(bench.network(result)) <= 0.5 * weights(bench.network(whole))


def test_little_more_than_was_asked_goes_where_layers_are_narrow(bench: Bench) -> None:
    """Layers whose channels go four at a time lose them one after the other, not all at once."""
    version = bench.version(seer(middle=4), {"structured": 0.1, "steps": 1})
    (step, *_) = bench.report(bench.compile(version, precision="fp32"))["pruning"]["steps"]
    assert 0.1 <= step["sparsity"] < 0.25


def test_convolutions_with_uneven_pads_as_keras_has_them_lose_channels_too(bench: Bench) -> None:
    version = bench.version(seer([0, 0, 1, 1]), {"structured": 0.5})
    result = bench.compile(version)
    whole = bench.compile(version, pruned=False)
    assert bench.report(result)["recipe"]["pruned"]
    assert weights(bench.network(result)) <= 0.5 * weights(bench.network(whole))


def test_a_network_of_todays_operator_set_loses_channels_too(bench: Bench) -> None:
    """As torch exports: operators that newer sets have again, and axes of a mean that are an input."""
    model = seer()
    model.opset_import[0].version, model.ir_version = 22, 10
    (last,) = [node for node in model.graph.node if node.output[0] == "scores"]
    last.output[0] = "linear"
    for name, axes in (("two", [2]), ("mean", [2])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{name}/axes"))
    model.graph.node.extend([
        onnx.helper.make_node("Unsqueeze", ["linear", "two/axes"], ["two"], name="two"),
        onnx.helper.make_node("ReduceMean", ["two", "mean/axes"], ["scores"], name="mean", keepdims=0),
    ])  # fmt: skip
    result = bench.compile(bench.version(model, {"structured": 0.5}), precision="fp32")
    assert result.recipe.startswith("fp32, 5")
    assert weights(bench.network(result)) < 0.55 * weights(model)


def test_the_same_inputs_give_the_same_digest_when_everything_is_made_again(bench: Bench) -> None:
    version = bench.version(seer(), {"structured": 0.4, "unstructured": 0.3}, labelled=True)
    first = bench.compile(version)
    shutil.rmtree(bench.cache)
    again = bench.compile(version)
    assert "pruned" in first.recipe
    assert again.artifact.digest == first.artifact.digest
    other = bench.compile(bench.version(seer(), {"structured": 0.4, "unstructured": 0.3, "seed": 1}, labelled=True))
    assert other.artifact.digest != first.artifact.digest


def test_zeros_leave_the_file_as_large_and_cost_fewer_bytes_on_the_wire(bench: Bench) -> None:
    version = bench.version(seer(), {"unstructured": 0.7, "epochs": 8})
    sparse, dense = (bench.compile(version, prefer="transfer", pruned=pruned).figures for pruned in (True, False))
    assert abs(sparse.compiled_bytes - dense.compiled_bytes) < 200
    assert sparse.wire_bytes < 0.75 * dense.wire_bytes
    assert sparse.wire_bytes < 0.3 * sparse.float_wire_bytes


def test_pruning_that_costs_too_much_stops_says_where_and_leaves_the_last_good_network(bench: Bench) -> None:
    version = bench.version(seer(), {"structured": 0.995, "steps": 4, "epochs": 1, "learning_rate": 1e-4})
    result = bench.compile(version, accuracy={"min_agreement": 0.95})
    report = bench.report(result)
    assert "pruning stopped where" in result.why
    assert "agreement with the float model" in report["pruning"]["stopped"]
    last = report["pruning"]["steps"][-1]
    assert last["misses"]
    assert last["step"]["again"]
    assert result.figures.agreement >= 0.95
    assert report["recipe"]["sparsity"] < last["sparsity"]


def test_a_class_may_decline_and_a_float_class_may_have_it(bench: Bench) -> None:
    version = bench.version(seer(), {"structured": 0.5})
    pruned = bench.compile(version, precision="fp32")
    whole = bench.compile(version, precision="fp32", pruned=False)
    assert pruned.recipe.startswith("fp32, 5")
    assert whole.recipe == "fp32"
    assert pruned.figures.compiled_bytes < 0.6 * whole.figures.compiled_bytes


def test_pruning_can_be_cancelled_and_leaves_no_half_result(bench: Bench) -> None:
    version = bench.version(seer(), {"structured": 0.5})

    def stop(what: str, _done: int, _total: int) -> None:
        if what == "tuning the pruned network":
            bench.cancel.set()

    with pytest.raises(Cancelled, match="pruning prune was cancelled"):
        bench.compile(version, progress=stop)
    assert list((bench.cache / "pruned").iterdir()) == []


def test_pruning_that_takes_too_long_is_stopped(bench: Bench) -> None:
    version = bench.version(seer(), {"structured": 0.5})
    with pytest.raises(ToolchainError, match="pruning prune ran past its limit"):
        bench.compile(version, limits=Limits(prune_s=0.5))


def test_a_normalisation_of_each_picture_loses_the_channels_that_it_scales(bench: Bench) -> None:
    net = Net(1)
    net.conv(3, 32, stride=2)
    ones, zeros = (net.constant(np.full(32, value, np.float32)) for value in (1.0, 0.0))
    net.add("InstanceNormalization", ones, zeros)
    net.add("Relu")
    net.conv(32, 64, stride=2)
    net.add("Relu")
    model = classifying(net)
    result = bench.compile(bench.version(model, {"structured": 0.4}))
    report = bench.report(result)
    assert report["recipe"]["pruned"]
    assert report["left_out"] == []


def test_a_normalisation_of_a_layer_loses_the_values_that_it_scales(bench: Bench) -> None:
    net = Net(1)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 64, stride=2)
    net.add("Relu")
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    net.add("Reshape", net.constant(np.array([1, 256], np.int64)))
    ones, zeros = (net.constant(np.full(256, value, np.float32)) for value in (1.0, 0.0))
    net.add("LayerNormalization", ones, zeros)
    features = net.last
    net.dense(256, CLASSES)
    model = net.model([1, CLASSES], opset=17)
    fitted(model, features)
    result = bench.compile(bench.version(model, {"structured": 0.4}))
    assert bench.report(result)["recipe"]["pruned"]
    assert weights(bench.network(result)) <= 0.65 * weights(model)


def flattened(before: str) -> onnx.ModelProto:
    """Convolutions, then a node that knows the channels it is given, then a dense layer."""
    net = Net(1)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 48)
    net.add("Relu")
    net.conv(48, 64, stride=2)
    net.add("Relu")
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    match before:
        case "pixels side by side":
            net.add("Transpose", perm=[0, 2, 3, 1])
        case "in two halves":
            net.add("Split", net.constant(np.array([32, 32], np.int64)), axis=1)
            net.nodes[-1].output.append("second half")
            net.add("Concat", "second half", axis=1)
        case "each by its own factor":
            net.add("Mul", net.constant(net.rng.uniform(0.5, 1.5, (1, 64, 1, 1)).astype(np.float32)))
    return answering(net)


@pytest.mark.parametrize("before", ["each by its own factor", "in two halves"])
def test_channels_that_a_node_counts_stay_and_others_go(bench: Bench, before: str) -> None:
    model = flattened(before)
    result = bench.compile(bench.version(model, {"structured": 0.3, "steps": 1}), precision="fp32")
    report = bench.report(result)
    assert report["left_out"] == []
    assert report["recipe"]["pruned"]
    assert weights(bench.network(result)) <= 0.75 * weights(model)


def test_a_dense_layer_behind_channels_that_lie_last_loses_no_others_than_went(bench: Bench) -> None:
    """So little is tuned here that what was taken wrongly would stay wrong."""
    model = flattened("pixels side by side")
    version = bench.version(model, {"structured": 0.3, "steps": 1, "learning_rate": 1e-6})
    (step, *_) = bench.report(bench.compile(version, precision="fp32"))["pruning"]["steps"]
    assert step["sparsity"] >= 0.3
    assert step["agreement"] >= 0.8


def test_where_no_channel_can_go_the_nodes_that_count_them_are_named(bench: Bench) -> None:
    net = Net(1)
    net.conv(3, 64, stride=16)
    net.add("Transpose", perm=[0, 2, 3, 1])
    turned = net.nodes[-1].name
    net.add("Reshape", net.constant(np.array([1, 256], np.int64)))
    features = net.last
    net.dense(256, CLASSES)
    model = net.model([1, CLASSES])
    fitted(model, features)
    version = bench.version(model, {"structured": 0.3}, holdout={"path": "holdout.safetensors"})
    result = bench.compile(version, precision="fp32", accuracy={"min_agreement": 0.1})
    (left,) = bench.report(result)["left_out"]
    assert f"Transpose '{turned}'" in left["reason"]


def test_a_network_that_can_not_be_pruned_is_compiled_whole_and_the_report_says_why(bench: Bench) -> None:
    model = seer()
    (scores,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["linear" if name == scores.name else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Hardmax", ["linear"], [scores.name], name="one-hot", axis=-1))
    result = bench.compile(bench.version(model, {"structured": 0.5}))
    assert result.quality == "passed"
    assert "this network can't be trained, so not pruned" in result.why
    (left,) = bench.report(result)["left_out"]
    assert "50% pruned" in left["told"]
    assert "Hardmax" in left["reason"]


def test_budgets_that_only_a_pruned_network_could_meet_are_missed_with_why_it_is_not_pruned(bench: Bench) -> None:
    model = seer()
    (scores,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["linear" if name == scores.name else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Hardmax", ["linear"], [scores.name], name="one-hot", axis=-1))
    small = {"latency_p95_ms": 100.0, "memory_bytes": 1024**3, "size_bytes": 20_000}
    with pytest.raises(QualityError, match=r"budget 20000.*this network can't be trained, so not pruned.*Hardmax"):
        bench.compile(bench.version(model, {"structured": 0.5}), budgets=small)


def of_one_sample() -> onnx.ModelProto:
    """A network with a constant beside its channels, which stands there for one sample."""
    net = Net(1)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("Concat", net.constant(net.rng.normal(size=(1, 4, 8, 8)).astype(np.float32)), axis=1)
    net.conv(20, 16)
    net.add("Flatten")
    net.dense(1024, CLASSES)
    return net.model([1, CLASSES])


@pytest.mark.parametrize("prune", [{"structured": 0.5}, {"unstructured": 0.5}])
def test_a_network_that_takes_one_sample_only_is_compiled_whole_and_what_would_tune_it_is_told(
    bench: Bench, prune: dict[str, Any]
) -> None:
    version = bench.version(of_one_sample(), prune, holdout={"path": "holdout.safetensors"})
    result = bench.compile(version, accuracy={"min_agreement": 0.01}, precision="fp32")
    assert result.recipe == "fp32"
    (left,) = bench.report(result)["left_out"]
    assert "takes one sample at a time: Concat 'n2': " in left["reason"]
    assert "prune.batch: 1" in left["reason"]


def test_a_network_that_takes_one_sample_only_is_pruned_one_at_a_time(bench: Bench) -> None:
    prune = {"unstructured": 0.5, "batch": 1, "epochs": 1, "steps": 1, "learning_rate": 1e-5}
    version = bench.version(of_one_sample(), prune, holdout={"path": "holdout.safetensors"})
    result = bench.compile(version, accuracy={"min_agreement": 0.01}, precision="fp32")
    report = bench.report(result)
    assert report["left_out"] == []
    assert report["pruning"]["steps"][-1]["sparsity"] >= 0.49


@pytest.mark.parametrize("slope", [(32, 1, 1), (1, 32, 1, 1)])
def test_a_slope_of_each_channel_goes_with_it(bench: Bench, slope: tuple[int, ...]) -> None:
    net = Net(1)
    net.conv(3, 32, stride=4)
    net.add("PRelu", net.constant(net.rng.uniform(0.1, 0.3, slope).astype(np.float32)))
    up = (net.rng.normal(size=(32, 32, 2, 2)) / 8).astype(np.float32)
    net.add("ConvTranspose", net.constant(up), kernel_shape=[2, 2], strides=[2, 2])
    net.add("PRelu", net.constant(np.full((1, 1, 1), 0.2, np.float32)))
    net.conv(32, 64, stride=2)
    net.add("Relu")
    result = bench.compile(bench.version(classifying(net), {"structured": 0.4, "steps": 1}), precision="fp32")
    report = bench.report(result)
    assert report["left_out"] == []
    assert report["recipe"]["pruned"]
    assert result.figures.agreement >= 0.8


def test_slopes_that_differ_within_a_channel_stay_and_others_channels_go(bench: Bench) -> None:
    net = Net(1)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 64, stride=2)
    net.add("PRelu", net.constant(net.rng.uniform(0.1, 0.3, (64, 8, 8)).astype(np.float32)))
    result = bench.compile(bench.version(classifying(net), {"structured": 0.3, "steps": 1}), precision="fp32")
    report = bench.report(result)
    assert report["left_out"] == []
    assert report["recipe"]["pruned"]
