"""The compile pipeline on real toolchains. They are installed on first use into EDGEFLEET_CACHE (default ~/.cache/edgefleet)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import zipfile
from pathlib import Path

import msgspec
import onnx
import pytest
from edgefleet_controller.compile import steps
from edgefleet_controller.compile.environments import Lock, lock_named
from edgefleet_controller.compile.port import installed_targets
from edgefleet_controller.compile.steps import Limits
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.watching import Cancelled
from edgefleet_controller.demo.models import normalised_twice, with_memory_bomb
from edgefleet_controller.manifests import Model
from edgefleet_shared import artifact, golden
from edgefleet_shared.errors import ArtifactError, ManifestError, ModelError, QualityError, ToolchainError
from support.compiling import ENGINES, HERE, TOOLCHAINS, Bench, class_here
from support.networks import Net, classifier, device_class, project


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


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


def test_openvino_is_one_zip_with_a_deflated_xml_and_a_stored_bin(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    result = bench.compile(version, class_here("openvino", precision="fp32"))
    layer = bench.layout.manifest(result.artifact.digest).layer(artifact.MODEL_LAYER)
    with zipfile.ZipFile(bench.layout.path(layer.digest)) as archive:
        ways = {entry.filename: entry.compress_type for entry in archive.infolist()}
        assert ways == {"model.xml": zipfile.ZIP_DEFLATED, "model.bin": zipfile.ZIP_STORED}


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


def test_a_network_that_a_bad_disk_changed_is_not_compiled(bench: Bench) -> None:
    """Its own answers would agree with it."""
    version = bench.version(project(bench.folder, classifier()))
    bench.layout.path(version.network).write_bytes(classifier(seed=1).SerializeToString(deterministic=True))
    with pytest.raises(ArtifactError, match=f"blob {version.network} was changed on disk"):
        bench.compile(version, class_here("onnxruntime", precision="fp32"))


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


def children() -> set[int]:
    """Pids, of the dead that nobody waited for too. Other tests' libraries may keep some, such as a resource tracker."""
    return {int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}


def test_an_engine_that_crashes_while_measuring_is_a_quality_miss_that_names_the_signal(bench: Bench) -> None:
    others = children()
    version = bench.version(project(bench.folder, classifier()))

    def crash(what: str, _done: int, _total: int) -> None:
        if what == "running held-out pictures":
            for pid in children() - others:
                os.kill(pid, signal.SIGSEGV)

    with pytest.raises(QualityError, match="engine died: SIGSEGV"):
        bench.compile(version, class_here(), progress=crash)


def test_a_compile_can_be_cancelled_and_leaves_no_process_and_no_half_result(bench: Bench) -> None:
    others = children()
    version = bench.version(project(bench.folder, classifier()))

    def stop(what: str, _done: int, _total: int) -> None:
        if what == "quantizing":
            bench.cancel.set()

    with pytest.raises(Cancelled, match="onnxruntime quantize was cancelled"):
        bench.compile(version, class_here(), progress=stop)
    assert children() <= others
    for kind in ("quantized", "compiled"):
        assert list((bench.folder / "cache" / kind).iterdir()) == []


def test_a_compile_that_takes_too_long_is_stopped(bench: Bench) -> None:
    others = children()
    version = bench.version(project(bench.folder, classifier()))
    with pytest.raises(ToolchainError, match="ran past its limit") as told:
        bench.compile(version, class_here(), limits=Limits(prepare_s=0.05))
    assert told.value.hint.endswith("fewer samples take less time: it has 16 to calibrate with, 32 are held out")
    assert children() <= others


def test_who_has_many_samples_has_as_much_more_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    version = bench.version(project(bench.folder, classifier()))
    monkeypatch.setattr(steps, "LIMITED_SAMPLES", 1)
    bench.compile(version, class_here(precision="fp32"), limits=Limits(prepare_s=1.0, measure_s=1.0))


def test_ranges_are_taken_from_samples_that_are_spread_over_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MOST_CALIBRATION", 10)
    assert steps.calibrating(28) == list(range(0, 28, 3))
    assert steps.calibrating(7) == list(range(7))
    version = bench.version(project(bench.folder, classifier(), counts=(28, 32, 8)))
    seen: list[tuple[str, int]] = []
    result = bench.compile(
        version,
        class_here(search={"effort": "fixed", "prefer": "size"}),
        progress=lambda what, _, of: seen.append((what, of)),
    )
    assert {of for what, of in seen if what == "ranges of activations"} == {10}
    report = json.loads(bench.layout.read(result.report, 10**7))
    assert report["calibration"] == {"samples": 10, "of": 28}
    assert b"10 samples, evenly spread over 28" in bench.layout.read(result.page, 10**7)


def test_an_operator_that_tflite_lacks_is_named_with_its_node(bench: Bench) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Hardmax", axis=1)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    version = bench.version(project(bench.folder, net.model([1, 8])))
    with pytest.raises(ModelError, match=rf"tflite has no operator Hardmax \(node '{lost}'\)") as caught:
        bench.compile(version, class_here("tflite"))
    assert "docs/generated/tflite-operators.md" in caught.value.hint


def test_an_operator_that_openvino_lacks_is_named_with_its_node_whatever_int8_added(bench: Bench) -> None:
    net = Net()
    net.conv(3, 8)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    lost = net.add("Scaler", domain="ai.onnx.ml", offset=[0.0], scale=[2.0])
    model = net.model([1, 8], opset=21, ir_version=10, extra=[onnx.helper.make_opsetid("ai.onnx.ml", 1)])
    version = bench.version(project(bench.folder, model))
    with pytest.raises(ModelError, match=rf"openvino has no operator ai\.onnx\.ml\.Scaler \(node '{lost}'\)"):
        bench.compile(version, class_here("openvino"))


def test_an_operator_of_onnx_that_openvino_lacks_or_can_not_place_is_named_with_its_node(bench: Bench) -> None:
    for pair, opset, words in (
        (("Optional", "OptionalGetElement"), 16, r"openvino has no operator Optional \(node 'n1'\)"),
        (("SplitToSequence", "ConcatFromSequence"), 13, r"openvino can't read operator Conv \(node 'n3'\): .*rank"),
    ):
        net = Net()
        net.conv(3, 8)
        net.add(pair[0])
        net.add(pair[1], **({"axis": 0} if opset == 13 else {}))
        net.conv(8, 8)
        net.add("GlobalAveragePool")
        net.add("Flatten")
        version = bench.version(project(bench.folder, net.model([1, 8], opset=opset)))
        with pytest.raises(ModelError, match=words):
            bench.compile(version, class_here("openvino", precision="fp32"))


def test_a_network_that_names_an_operator_set_twice_can_be_made_int8(bench: Bench) -> None:
    """Converters of trees and such write it so, and onnxruntime's QDQ writer looks for exactly one."""
    model = classifier()
    model.opset_import.add(domain="", version=model.opset_import[0].version)
    version = bench.version(project(bench.folder, model))
    assert bench.compile(version, class_here(search={"effort": "fixed", "prefer": "size"})).precision == "int8"


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
    with pytest.raises(ManifestError, match="target ncnn makes no fp16; it makes fp32"):
        bench.compile(version, class_here("ncnn", precision="fp16"))
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
    for name in sorted({target.toolchain for target in installed_targets().targets.values()}):
        lock = lock_named(name).hashed
        assert "://" not in lock
        packages = re.findall(r"^\S+==\S+.*(?:\n {4}--hash=.*)+", lock, re.M)
        assert len(packages) == len(re.findall(r"^\S+==", lock, re.M)) > 5


def test_when_nothing_fits_the_budgets_are_told_with_by_how_much(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    budgets = {"latency_p95_ms": 100.0, "memory_bytes": 1 << 30, "size_bytes": 2000}
    target = class_here(budgets=budgets, search={"effort": "full"})
    with pytest.raises(QualityError, match=r"size \d+ bytes, budget 2000.*came closest of \d+ candidates") as caught:
        bench.compile(version, target)
    told = json.loads(bench.layout.read(caught.value.report, 10**7))
    assert len(told["candidates"]) > 5
    assert all(any("budget 2000" in miss for miss in one["misses"]) for one in told["candidates"])
    assert b"nothing is shipped" in bench.layout.read(caught.value.page, 10**7)
    assert f"fleet model report {version.model} {version.version} {target.name}" in caught.value.hint


def test_a_latency_budget_that_this_host_could_hold_for_no_candidate_fails_the_compile(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    budgets = {"latency_p95_ms": 0.0005, "memory_bytes": 1 << 30}
    with pytest.raises(QualityError, match=r"latency p50 \d+\.\d+ ms on this host, budget 0.0005 for p95") as caught:
        bench.compile(version, class_here(budgets=budgets))
    assert "precision fp32" not in caught.value.hint  # float is no faster: it was among the candidates
    result = bench.compile(version, class_here(budgets=budgets, measure_on="builder"))
    assert "latency" in result.figures.unmeasured


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


def test_a_quick_search_for_size_ships_half_precision_where_int8_is_larger_than_float(bench: Bench) -> None:
    # So few weights that what stands around them in int8 takes more bytes than they save.
    net = Net()
    for _ in range(16):
        net.conv(3, 3, 1)
        net.add("LeakyRelu", alpha=0.5)
    net.add("AveragePool", kernel_shape=[8, 8], strides=[8, 8])
    net.add("Flatten")
    net.dense(48, 10)
    version = bench.version(project(bench.folder, net.model([1, 10])))
    fixed = class_here("openvino", accuracy={"min_agreement": 0.1}, search={"effort": "fixed", "prefer": "size"})
    assert (
        bench.compile(version, fixed).figures.compiled_bytes
        > 1.3 * bench.compile(version, class_here("openvino", precision="fp32")).figures.compiled_bytes
    ), "this network's int8 should be the larger one"
    quick = class_here("openvino", accuracy={"min_agreement": 0.1}, search={"effort": "quick", "prefer": "size"})
    result = bench.compile(version, quick)
    assert result.precision == "fp16"
    assert "fp16 is shipped" in result.why
    assert result.figures.compiled_bytes < result.figures.float_bytes


@pytest.mark.parametrize("engine", ENGINES)
def test_the_float_models_bytes_are_those_that_its_engine_would_have(bench: Bench, engine: str) -> None:
    version = bench.version(project(bench.folder, classifier()))
    small = class_here(engine, accuracy={"min_agreement": 0.1}, search={"effort": "fixed", "prefer": "size"})
    int8, exact = (bench.compile(version, one).figures for one in (small, class_here(engine, precision="fp32")))
    assert int8.float_bytes == exact.compiled_bytes == exact.float_bytes
    assert int8.float_wire_bytes == exact.wire_bytes


def test_a_cache_that_a_power_cut_emptied_or_somebody_altered_is_made_again(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    small = class_here(search={"effort": "quick", "prefer": "size"})
    first = bench.compile(version, small)
    kinds = [folder for folder in (bench.folder / "cache").iterdir() if folder.name not in ("locks", "logs")]
    files = [file for kind in kinds for file in kind.rglob("*") if file.is_file()]
    assert {"compiled", "prepared", "quantized", "searched"} <= {kind.name for kind in kinds}
    for harm in (lambda content: b"", lambda content: content[:-1] + bytes([content[-1] ^ 1])):
        for file in files:
            content = file.read_bytes()
            file.unlink()  # not in place: one file may lie in several folders
            file.write_bytes(harm(content))
        assert bench.compile(version, small).artifact.digest == first.artifact.digest


def test_a_network_of_which_tflite_can_quantize_nothing_is_shipped_in_float_and_says_why(bench: Bench) -> None:
    net = Net()
    net.add("Floor")
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 0.1}}
    version = bench.version(project(bench.folder, net.model([1, 3, 32, 32]), **raw))
    result = bench.compile(version, class_here("tflite", search={"effort": "quick"}))
    assert (result.precision, result.quality) == ("fp32", "passed")
    assert "fp32 is shipped, because int8 can't be made: no operator of this network can be quantized" in result.why
    report = json.loads(bench.layout.read(result.report, 10**7))
    assert [one["lasting"] for one in report["left_out"]] == [True]
