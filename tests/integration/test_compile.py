"""The compile pipeline on real toolchains. They are installed on first use into EDGEFLEET_CACHE (default ~/.cache/edgefleet)."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import threading
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.environments import Lock, lock_named
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult, all_targets
from edgefleet_controller.compile.steps import Limits
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.watching import Cancelled
from edgefleet_controller.demo.models import normalised_twice, with_memory_bomb
from edgefleet_controller.manifests import DeviceClass, Model
from edgefleet_controller.source import ModelVersion, import_model
from edgefleet_shared import artifact, golden
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import ManifestError, ModelError, QualityError, ToolchainError
from safetensors.numpy import save_file
from support.networks import Net, classifier, device_class, project

TOOLCHAINS = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
ENGINES = ("onnxruntime", "tflite", "openvino")
HERE = platform.machine()


class Bench:
    """A layout, a fresh cache of compiled models, and the shared toolchains."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = Layout(folder / "layout")
        self.cancel = threading.Event()

    def version(self, manifest: Model) -> ModelVersion:
        return import_model(manifest, self.folder, self.layout, cache=self.folder / "cache")

    def compile(self, version: ModelVersion, target: DeviceClass, **more: Any) -> CompileResult:
        toolchains = Toolchains(TOOLCHAINS, cancel=self.cancel)
        return compile_version(version, target, self.layout, toolchains, cache=self.folder / "cache", **more)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def class_here(engine: str = "onnxruntime", **spec: Any) -> DeviceClass:
    return device_class(engine, arch=HERE, **spec)


@pytest.mark.parametrize("engine", ENGINES)
def test_int8_comes_out_whole_small_and_the_same_each_time(bench: Bench, engine: str) -> None:
    net = Net()
    net.conv(3, 64, stride=2)
    net.relu6()
    net.conv(64, 128)
    net.relu6()
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(128, 10)
    version = bench.version(project(bench.folder, net.model([1, 10])))
    # Whether so small a network gets faster by int8 is this CPU's affair: the class asks for size.
    small = class_here(engine, search={"effort": "fixed", "prefer": "size"})
    result = bench.compile(version, small)
    figures = result.figures
    assert not result.cached
    assert figures.agreement is not None
    assert figures.agreement >= 0.8
    assert figures.agreement_low < figures.agreement <= figures.agreement_high
    assert figures.compiled_bytes < 0.6 * figures.float_bytes
    assert figures.p50_ms > 0
    assert figures.float_p50_ms > 0
    assert figures.unmeasured == ()
    assert 20e6 < figures.peak_memory_bytes < 400e6

    manifest = bench.layout.manifest(result.artifact.digest)
    config = bench.layout.config(manifest)
    assert (config.engine, config.precision, config.requires.arch) == (engine, "int8", HERE)
    assert [(t.name, t.datatype, t.shape) for t in config.inputs] == [("image", "FP32", (1, 3, 32, 32))]
    for blob in manifest.blobs():
        bench.layout.check(blob)
    inputs, references = golden.unpack(
        bench.layout.read(manifest.layer(artifact.GOLDEN_LAYER).digest, 10**8), config.encoding
    )
    assert inputs["image"].shape == (8, 3, 32, 32)
    assert references["scores"].shape == (8, 10)
    statement = json.loads(bench.layout.read(manifest.layer(artifact.PROVENANCE_LAYER).digest, 10**6))
    model = manifest.layer(artifact.MODEL_LAYER)
    assert statement["subject"][0]["digest"]["sha256"] == model.digest.removeprefix("sha256:")
    bom = json.loads(bench.layout.read(manifest.layer(artifact.MLBOM_LAYER).digest, 10**6))
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    assert {"numpy", "onnx"} <= {c["name"] for c in bom["components"]}

    shutil.rmtree(bench.folder / "cache" / "compiled")
    again = bench.compile(version, small)
    assert not again.cached
    assert again.artifact.digest == result.artifact.digest


def test_openvino_is_one_stored_zip_with_xml_and_bin(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    result = bench.compile(version, class_here("openvino", precision="fp32"))
    layer = bench.layout.manifest(result.artifact.digest).layer(artifact.MODEL_LAYER)
    with zipfile.ZipFile(bench.layout.path(layer.digest)) as archive:
        assert archive.namelist() == ["model.xml", "model.bin"]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def test_classes_with_one_engine_share_a_compile_and_times_of_another_architecture_stay_unmeasured(
    bench: Bench,
) -> None:
    version = bench.version(project(bench.folder, classifier()))
    here = bench.compile(version, class_here("tflite", search={"effort": "quick", "prefer": "size"}))
    board = device_class("tflite", arch="armv7l")
    there = bench.compile(version, board)
    assert (here.cached, there.cached) == (False, True)
    assert here.key == there.key
    assert here.artifact.digest != there.artifact.digest
    assert there.figures.unmeasured == ("latency",)
    assert there.figures.p50_ms is None
    assert there.figures.agreement == here.figures.agreement


def test_measuring_is_never_cached(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    seen: list[str] = []
    target = class_here(precision="fp32")
    bench.compile(version, target)
    result = bench.compile(version, target, progress=lambda what, _done, _total: seen.append(what))
    assert result.cached
    assert "running held-out pictures" in seen
    assert "timing" in seen
    assert "quantizing" not in seen


@pytest.mark.parametrize("engine", ENGINES)
def test_twice_normalised_calibration_is_caught_and_ships_only_by_force(bench: Bench, engine: str) -> None:
    picture = {"name": "image", "mean": [127.0], "std": [128.0]}
    manifest = project(bench.folder, classifier(), inputs=[picture])
    sound = bench.version(manifest)
    normalised_twice(bench.layout.path(sound.calibration.digest), sound.encoding, bench.folder / "twice.safetensors")
    fields = manifest.spec.model_dump()
    fields["calibration"] = {"path": "twice.safetensors"}
    fields["version"] = "2"
    broken = bench.version(Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": fields}))
    target = class_here(engine, accuracy={"min_agreement": 0.9}, search={"effort": "quick", "prefer": "size"})
    with pytest.raises(
        QualityError, match=r"agreement with the float model 0\.\d+ .*budget 0\.900.*not like the held-out"
    ):
        bench.compile(broken, target)
    forced = bench.compile(broken, target, ship_despite_quality=True)
    assert forced.quality == "forced"
    assert any("agreement" in miss for miss in forced.misses)
    right = bench.compile(sound, target, ship_despite_quality=True).figures
    assert forced.figures.agreement < right.agreement - 0.1
    assert forced.figures.sqnr_db < right.sqnr_db - 3


def test_a_model_that_outgrows_its_memory_budget_is_killed_and_ships_only_by_force(bench: Bench) -> None:
    bomb = onnx.load_model_from_string(with_memory_bomb(classifier(1000).SerializeToString()))
    version = bench.version(project(bench.folder, bomb, counts=(8, 8, 8)))
    target = class_here(precision="fp32", budgets={"latency_p95_ms": 100.0, "memory_bytes": 300_000_000})
    with pytest.raises(QualityError, match=r"engine died: over its memory limit of \d+ bytes \(SIGKILL\)"):
        bench.compile(version, target)
    forced = bench.compile(version, target, ship_despite_quality=True)
    assert forced.figures.agreement is None
    assert forced.figures.unmeasured == ("agreement", "latency", "memory")


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()]


def test_an_engine_that_crashes_while_measuring_is_a_quality_miss_that_names_the_signal(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))

    def crash(what: str, _done: int, _total: int) -> None:
        if what == "running held-out pictures":
            for pid in children():
                os.kill(pid, signal.SIGSEGV)

    with pytest.raises(QualityError, match="engine died: SIGSEGV"):
        bench.compile(version, class_here(), progress=crash)


def test_a_compile_can_be_cancelled_and_leaves_no_process_and_no_half_result(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))

    def stop(what: str, _done: int, _total: int) -> None:
        if what == "quantizing":
            bench.cancel.set()

    with pytest.raises(Cancelled, match="onnxruntime quantize was cancelled"):
        bench.compile(version, class_here(), progress=stop)
    assert children() == []
    for kind in ("quantized", "compiled"):
        assert list((bench.folder / "cache" / kind).iterdir()) == []


def test_a_compile_that_takes_too_long_is_stopped(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    with pytest.raises(ToolchainError, match="ran past its limit"):
        bench.compile(version, class_here(), limits=Limits(prepare_s=0.05))
    assert children() == []


def test_an_operator_that_tflite_lacks_is_named_with_its_node(bench: Bench) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Hardmax", axis=1)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    version = bench.version(project(bench.folder, net.model([1, 8])))
    with pytest.raises(ModelError, match=rf"tflite has no operator Hardmax \(node '{lost}'\)"):
        bench.compile(version, class_here("tflite"))


def test_an_operator_that_onnxruntime_lacks_is_named_with_its_node(bench: Bench) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Sparkle", domain="acme.ai")
    model = net.model([1, 8, 32, 32], extra=[onnx.helper.make_opsetid("acme.ai", 1)])
    version = bench.version(project(bench.folder, model))
    with pytest.raises(ModelError, match=rf"no operator acme\.ai\.Sparkle \(node '{lost}'\)"):
        bench.compile(version, class_here())


def test_what_a_target_can_not_make_is_refused_before_anything_is_installed(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    with pytest.raises(ManifestError, match="target tflite makes no fp16; it makes fp32, int8"):
        bench.compile(version, class_here("tflite", precision="fp16"))
    with pytest.raises(ManifestError, match="compiles for engine tflite, not openvino"):
        bench.compile(version, class_here("openvino", target="tflite"))
    with pytest.raises(ToolchainError, match=r"no target abacus installed; have: .*onnxruntime, openvino, .*tflite"):
        bench.compile(version, class_here("abacus"))


def test_a_damaged_toolchain_is_told_with_what_to_do(bench: Bench) -> None:
    whole = Toolchains(TOOLCHAINS).ensure("onnxruntime")
    broken = msgspec.structs.replace(whole, python=str(bench.folder / "gone" / "python"))
    with pytest.raises(ToolchainError, match=r"can't start .*gone/python.*fleet toolchain check"):
        Toolchains(TOOLCHAINS).run(broken, "ort", {"action": "measure"}, bench.folder, bench.folder / "log", limit_s=5)


def test_an_installation_that_fails_says_why_and_is_tried_again(bench: Bench) -> None:
    bad = Lock("onnxruntime", "msgspec==0.19.0 --hash=sha256:" + "0" * 64 + "\n")
    for _ in range(2):
        with pytest.raises(ToolchainError, match="can't install the onnxruntime toolchain"):
            Toolchains(bench.folder / "cache").ensure(bad)


def test_locks_are_hashed_and_name_no_index() -> None:
    for name in sorted({target.toolchain for target in all_targets().values()}):
        lock = lock_named(name).hashed
        assert "://" not in lock
        packages = re.findall(r"^\S+==\S+.*(?:\n {4}--hash=.*)+", lock, re.M)
        assert len(packages) == len(re.findall(r"^\S+==", lock, re.M)) > 5


def wide(net: Net) -> list[int]:
    """Pads that TFLite can't express, pools, normalisation, squeeze and excite, concatenation."""
    net.conv(3, 8, stride=2, pads=[1, 1, 1, 1])
    net.add("Relu")
    net.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    trunk = net.last
    net.add("GlobalAveragePool")
    net.conv(8, 8, 1, pads=[0, 0, 0, 0])
    net.add("HardSigmoid", alpha=1 / 6, beta=0.5)
    net.add("Mul", trunk)
    left = net.last
    net.conv(8, 4, 1, pads=[0, 0, 0, 0])
    net.add("HardSwish")
    net.add("Concat", left, axis=1)
    values = [net.constant(net.rng.uniform(0.5, 1.5, 12).astype(np.float32)) for _ in range(4)]
    net.add("BatchNormalization", *values, epsilon=1e-3)
    net.add("LeakyRelu", alpha=0.1)
    net.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("Add", net.constant(net.rng.normal(size=(12, 1, 1)).astype(np.float32)))
    net.add("Sigmoid")
    net.add("Reshape", net.constant(np.array([0, -1], np.int64)))
    net.dense(192, 6)
    net.add("Softmax", axis=-1)
    return [1, 6]


def shapes(net: Net) -> list[int]:
    """Transposes, squeezes, reductions, padding, arithmetic over another order."""
    net.add("Pad", net.constant(np.array([0, 0, 1, 2, 0, 0, 1, 0], np.int64)))
    net.conv(3, 6, 5, pads=[0, 0, 0, 0], stride=3)
    net.add("Sub", net.constant(np.array(0.25, np.float32)))
    net.add("Transpose", perm=[0, 2, 3, 1])
    net.add("Mul", net.constant(net.rng.normal(size=6).astype(np.float32)))
    net.add("Transpose", perm=[0, 3, 1, 2])
    net.conv(6, 6, 3, group=6)
    net.add("Tanh")
    net.add("ReduceMean", axes=[2], keepdims=0)
    net.add("Unsqueeze", net.constant(np.array([2], np.int64)))
    net.add("ReduceMax", axes=[3], keepdims=1)
    net.add("Squeeze", net.constant(np.array([2, 3], np.int64)))
    net.add("Clip", net.constant(np.array(-0.5, np.float32)), net.constant(np.array(0.5, np.float32)))
    net.add("MatMul", net.constant(net.rng.normal(size=(6, 4)).astype(np.float32)))
    return [1, 4]


@pytest.mark.parametrize("build", [wide, shapes])
def test_a_float_tflite_answers_as_onnxruntime_does(bench: Bench, build: Any) -> None:
    net = Net(3)
    shape = build(net)
    raw = {"output": {"kind": "raw"}, "acceptance": {"min_agreement": 1.0, "tolerance_abs": 1e-4}}
    version = bench.version(project(bench.folder, net.model(shape, opset=14), **raw))
    target = class_here("tflite", precision="fp32", accuracy={"min_agreement": 1.0})
    assert bench.compile(version, target).figures.agreement == 1.0


def test_a_network_of_onnxs_early_days_whose_bias_is_a_row_is_quantized(bench: Bench) -> None:
    net = Net(3)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("Flatten")
    net.add("MatMul", net.constant(net.rng.normal(size=(1024, 10)).astype(np.float32)))
    net.add("Add", net.constant(net.rng.normal(size=(1, 10)).astype(np.float32)))
    model = net.model([1, 10], opset=8, ir_version=3)
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in model.graph.initializer
    )
    result = bench.compile(
        bench.version(project(bench.folder, model)), class_here(search={"effort": "full", "prefer": "size"})
    )
    assert result.precision == "int8"
    assert result.candidates > 3


def unlike_channels(octaves: float) -> onnx.ModelProto:
    """A classifier two of whose middle value's channels are 2 ** octaves times as wide as they were, taken back by the weights that read
    them: it answers as without, and int8 leaves nothing of the other channels."""
    net = Net(5)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 32)
    net.add("Relu")
    net.conv(32, 32, 1, pads=[0, 0, 0, 0])
    net.add("Relu")
    net.conv(32, 64)
    net.conv(64, 32)
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    net.add("Flatten")
    net.dense(512, 10)
    model = net.model([1, 10])
    constants = {i.name: i for i in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    maker, reader = convolutions[1], convolutions[2]
    factors = np.where(np.arange(32) < 2, 2.0**octaves, 1.0).astype(np.float32)
    for name, by in (
        (maker.input[1], factors[:, None, None, None]), (maker.input[2], factors), (reader.input[1], 1 / factors[None, :, None, None]),
    ):  # fmt: skip
        values = onnx.numpy_helper.to_array(constants[name]) * by
        constants[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_network_that_int8_breaks_is_noticed_and_mixed_precision_wins_it_back(bench: Bench, engine: str) -> None:
    version = bench.version(project(bench.folder, unlike_channels(10), counts=(16, 64, 8)))
    wanted = {"accuracy": {"min_agreement": 0.95}, "budgets": {"latency_p95_ms": 100.0, "memory_bytes": 1 << 30}}
    plain = class_here(engine, search={"effort": "fixed", "prefer": "size"}, **wanted)
    with pytest.raises(QualityError, match="agreement with the float model"):
        bench.compile(version, plain)
    broken = bench.compile(version, plain, ship_despite_quality=True).figures
    mended = bench.compile(version, class_here(engine, search={"effort": "quick", "prefer": "size"}, **wanted))
    assert mended.precision == "int8"
    assert "nodes in float" in mended.recipe
    assert 1 - mended.figures.agreement <= (1 - broken.agreement) / 2
    assert mended.figures.compiled_bytes <= 1.3 * broken.compiled_bytes
    told = json.loads(bench.layout.read(mended.report, 10**7))
    assert told["layers"][0]["noise"] > 10 * told["layers"][-1]["noise"]
    assert len(told["candidates"]) > 2


def test_what_is_no_faster_in_int8_is_shipped_in_float_and_the_result_says_why(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    result = bench.compile(
        version, class_here("tflite", search={"effort": "quick", "prefer": "accuracy"}, accuracy={"min_agreement": 1.0})
    )
    assert (result.precision, result.figures.agreement) == ("fp32", 1.0)
    assert "no int8 candidate is better here" in result.why
    config = bench.layout.config(bench.layout.manifest(result.artifact.digest))
    assert config.precision == "fp32"


def test_when_nothing_fits_the_budgets_are_told_with_by_how_much(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    budgets = {"latency_p95_ms": 100.0, "memory_bytes": 1 << 30, "size_bytes": 2000}
    with pytest.raises(QualityError, match=r"size \d+ bytes, budget 2000.*came closest of \d+ candidates"):
        bench.compile(version, class_here(budgets=budgets, search={"effort": "full"}))


def test_a_full_search_is_made_once_and_ends_in_the_same_digest(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    target = class_here(search={"effort": "full", "prefer": "size"})
    seen: list[str] = []
    first = bench.compile(version, target)
    assert first.candidates > 5
    for kind in ("compiled", "quantized", "statistics", "prepared"):
        shutil.rmtree(bench.folder / "cache" / kind)
    again = bench.compile(version, target, progress=lambda what, _done, _total: seen.append(what))
    assert again.artifact.digest == first.artifact.digest
    assert not again.cached
    assert "sensitivity of layers" not in seen
    fresh = Bench(bench.folder)
    shutil.rmtree(bench.folder / "cache")
    assert fresh.compile(version, target).artifact.digest == first.artifact.digest, (
        "size decides: times have no part in it"
    )


def test_a_detector_compiles_and_is_judged_by_its_boxes(bench: Bench) -> None:
    net = Net(2)
    net.conv(3, 32, stride=4)
    net.add("Relu")
    net.conv(32, 14, stride=2)
    model = net.model([1, 14, 4, 4])
    detection = {"decoder": "yolov3", "anchors": [[8, 8], [16, 16]], "masks": [[0, 1]], "threshold": 0.4}
    manifest = project(
        bench.folder, model, output={"kind": "detection", "detection": detection}, acceptance={"tolerance_abs": 0.5}
    )
    result = bench.compile(bench.version(manifest), class_here(search={"effort": "fixed", "prefer": "size"}))
    shares = result.figures.shares
    assert shares["box_recall"].of > 20
    assert result.figures.agreement == min(shares["box_recall"].value, shares["box_precision"].value)
    config = bench.layout.config(bench.layout.manifest(result.artifact.digest))
    assert config.contract.kind == "raw"


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_a_head_that_joins_pixels_and_scores_is_won_back_where_it_joins_them(bench: Bench, engine: str) -> None:
    """YOLOv8's: in int8 a step of the joined output is larger than any score, and beside the pixels that is hardly noise."""
    net = Net(5)
    net.conv(3, 32, stride=4)
    trunk = net.add("Relu")
    net.conv(32, 4, stride=2)
    net.add("Sigmoid")
    boxes = net.add("Mul", net.constant(np.array(320, np.float32)))
    net.last = trunk
    net.conv(32, 2, stride=2)
    scores = net.add("Sigmoid")
    net.add("Concat", scores, first=boxes, axis=1)
    net.add("Reshape", net.constant(np.array([1, 6, 16], np.int64)))
    told = {"decoder": "yolov8", "threshold": 0.6, "nms_iou": 0.9}
    manifest = project(
        bench.folder,
        net.model([1, 6, 16]),
        output={"kind": "detection", "detection": told},
        acceptance={"tolerance_abs": 9.0},
    )
    wanted = class_here(engine, search={"effort": "full", "prefer": "size"}, accuracy={"min_agreement": 0.9})
    result = bench.compile(bench.version(manifest), wanted)
    report = json.loads(bench.layout.read(result.report, 10**7))
    assert result.figures.sqnr_db_by_output.keys() == {"scores, boxes", "scores, scores"}
    good = [c["figures"] for c in report["candidates"] if c["recipe"]["precision"] == "int8" and not c["misses"]]
    assert max(f["sqnr_db_by_output"]["scores, scores"] for f in good) > 20
    if engine == "tflite":  # which rounds its outputs too
        plain = report["candidates"][0]["figures"]
        assert plain["sqnr_db_by_output"]["scores, scores"] < 10 < plain["sqnr_db_by_output"]["scores, boxes"]


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_a_recogniser_whose_answers_put_their_steps_first_is_judged_line_by_line(bench: Bench, engine: str) -> None:
    """Steps x batch x classes, as PyTorch's recurrent networks have it: the first axis is no batch."""
    net = Net(3)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.conv(16, 5, stride=2)
    net.add("Reshape", net.constant(np.array([1, 5, 16], np.int64)))
    net.add("Transpose", perm=[2, 0, 1])
    (bench.folder / "characters.txt").write_text("a\nb\nc\n")
    manifest = project(
        bench.folder, net.model([16, 1, 5]),
        output={"kind": "text", "text": {"characters": "characters.txt"}}, acceptance={"tolerance_abs": 0.5},
    )  # fmt: skip
    version = bench.version(manifest)
    result = bench.compile(
        version, class_here(engine, search={"effort": "fixed", "prefer": "size"}, accuracy={"min_agreement": 0.3})
    )
    assert result.figures.samples == version.holdout.count
    content = bench.layout.read(
        bench.layout.manifest(result.artifact.digest).layer(artifact.GOLDEN_LAYER).digest, 10**8
    )
    _, references = golden.unpack(content, version.encoding)
    assert references["scores"].shape == (version.golden.count, 16, 1, 5)


def test_a_network_with_masks_of_minus_infinity_is_calibrated_all_the_same(bench: Bench) -> None:
    net = Net()
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("Mul", net.constant(np.array(8, np.float32)))
    mask = np.zeros((1, 16, 8, 8), np.float32)
    mask[..., -1] = -np.inf
    net.add("Add", net.constant(mask))
    net.add("Softmax", axis=-1)
    net.conv(16, 16, stride=2)
    net.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("Flatten")
    net.dense(64, 10)
    version = bench.version(project(bench.folder, net.model([1, 10])))
    target = class_here("openvino", search={"effort": "full", "prefer": "accuracy"}, accuracy={"min_agreement": 1.0})
    result = bench.compile(version, target)
    told = json.loads(bench.layout.read(result.report, 10**7))
    assert result.figures.agreement == 1.0
    assert {"int8", "fp16", "fp32"} == {c["recipe"]["precision"] for c in told["candidates"]}


def by_colour(folder: Path, trained: dict[str, Any], declared: dict[str, Any]) -> Model:
    """A network that says which of three colours a picture has, how bright it is taken into account, and labelled pictures; ``trained`` is
    how it takes its input, ``declared`` how the manifest says."""
    scale = {"mean": 0.0, "std": 255.0} | {k: v for k, v in trained.items() if k in ("mean", "std")}
    net = Net()
    net.add("GlobalAveragePool")
    net.add("Flatten")
    # Red, green, blue, in the order in which they come; and a fourth class for dark pictures.
    colours = [[3, -1, -1], [-1, 3, -1], [-1, -1, 3]]
    rows = np.array(
        [*(row[::-1] if trained.get("colour") == "BGR" else row for row in colours), [-3, -3, -3]], np.float32
    )
    # What the network sees of grey level g is (g - mean) / std: taken back here, so that it judges g / 255.
    weight = rows * np.float32(scale["std"] / 255)
    bias = rows.sum(axis=1) * np.float32(scale["mean"] / 255) + np.array([0, 0, 0, 2.2], np.float32)
    net.add("Gemm", net.constant(weight), net.constant(bias.astype(np.float32)), transB=1)
    manifest = project(folder, net.model([1, 4]), counts=(8, 8, 8), inputs=[{"name": "image", **declared}])
    chance, truth = np.random.default_rng(0), []
    pictures = chance.integers(0, 40, (80, 32, 32, 3))
    for number, picture in enumerate(pictures):
        truth.append(number % 4)
        if number % 4 < 3:
            picture[..., number % 4] += int(chance.integers(120, 200))
    save_file({"image": pictures.astype(np.uint8)}, folder / "holdout.safetensors")
    (folder / "truth.txt").write_text("\n".join(map(str, truth)))
    fields = manifest.spec.model_dump() | {"holdout": {"path": "holdout.safetensors", "truth": "truth.txt"}}
    return Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": fields})


SCALED = {"std": [255.0]}


@pytest.mark.parametrize(
    ("trained", "declared", "words"),
    [
        (
            {"colour": "BGR"},
            SCALED,
            r"answers \d+ of 64 .* as the manifest describes its input, and 64 with colour BGR",
        ),
        ({}, {"colour": "BGR", **SCALED}, r"and 64 with colour RGB"),
        ({}, {"mean": [127.5], "std": [127.5]}, r"and 64 with x / 255"),
        ({"mean": 127.5, "std": 127.5}, SCALED, r"and 64 with \(x - 127\.5\) / 127\.5"),
        ({"colour": "BGR", "mean": 127.5, "std": 127.5}, SCALED, r"and 64 with colour BGR and \(x - 127\.5\) / 127\.5"),
    ],
)
def test_an_input_described_otherwise_than_the_network_takes_it_is_told_with_what_would_be_right(
    bench: Bench, trained: dict[str, Any], declared: dict[str, Any], words: str
) -> None:
    version = bench.version(by_colour(bench.folder, trained, declared))
    with pytest.raises(QualityError, match=words):
        bench.compile(version, class_here(precision="fp32"))


def test_an_input_described_rightly_is_not_suspected(bench: Bench) -> None:
    version = bench.version(by_colour(bench.folder, {"colour": "BGR"}, {"colour": "BGR", **SCALED}))
    assert bench.compile(version, class_here(precision="fp32")).quality == "passed"
