"""Targets that call a vendor's program, on recorded ones: the whole pipeline, strict about every argument; and what absence and failure say."""

from __future__ import annotations

import json
import os
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edgefleet_controller.compile import checking
from edgefleet_controller.compile.boards import Measure
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.tools import MissingTool
from edgefleet_controller.compile.watching import Cancelled
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.source.importing import import_model
from edgefleet_shared import artifact
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import AcceptanceFigures, judge
from edgefleet_shared.errors import ManifestError, ModelError, QualityError, ToolchainError, TrustError
from edgefleet_shared.work import Answer
from support import vendor_tools
from support.networks import classifier, device_class, project
from support.processes import assert_ends

TOOLCHAINS = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
CORAL, ACL, RK1808 = ("edgetpu_compiler",), ("atc", "amct_onnx"), ("rknn-toolkit1-python",)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder, self.layout = folder, Layout(folder / "layout")
        self.cancel = threading.Event()
        self.version = import_model(project(folder, classifier(), counts=(8, 24, 8)), folder, self.layout, cache=folder)

    def compile(
        self, engine: str, *, progress: Any = lambda *_: None, measure: Measure | None = None, **spec: Any
    ) -> CompileResult:
        made, toolchains = self.asked(engine, **spec), Toolchains(TOOLCHAINS, cancel=self.cancel)
        return compile_version(
            self.version, made, self.layout, toolchains, cache=self.folder / "cache", progress=progress, measure=measure
        )

    def asked(self, engine: str, **spec: Any) -> DeviceClass:
        return device_class(engine, arch="aarch64", **{"search": {"effort": "fixed", "prefer": "size"}, **spec})

    def on_board(self, times_ms: dict[str, float], agreement: float = 1.0) -> Measure:
        """A builder board, on which a compiled model takes the time of its precision (of ``times_ms``, by what is in its bytes)."""

        def measure(digest: str) -> Answer:
            manifest = self.layout.manifest(digest)
            model = self.layout.read(manifest.layer(artifact.MODEL_LAYER).digest, 10**8).decode()
            time_ms = next(ms for marked, ms in times_ms.items() if marked in model)
            figures = AcceptanceFigures(
                golden_count=8, agreement=agreement, cosine=agreement, load_ms=1.0, first_ms=1.0, p50_ms=time_ms, p95_ms=time_ms,
                peak_memory_bytes=1 << 20, providers=("NPU",), cpu_share=1.0,
            )  # fmt: skip
            return Answer(state="measured", by="atlas-1", report=judge(self.layout.config(manifest).contract, figures))

        return measure

    def shipped(self, result: CompileResult) -> bytes:
        layer = self.layout.manifest(result.artifact.digest).layer(artifact.MODEL_LAYER)
        return self.layout.read(layer.digest, 10**8)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_coral_ships_what_the_compiler_mapped_and_is_judged_by_the_file_before(bench: Bench, monkeypatch) -> None:
    programs = vendor_tools.install(monkeypatch, bench.folder / "vendor", *CORAL)
    result = bench.compile("coral")
    assert bench.shipped(result).endswith(b"mapped")
    assert result.figures.agreement >= 0.7
    assert "LiteRT on the CPU" in result.figures.stand_in
    assert result.figures.unmeasured == ("latency", "memory")
    assert result.quality == "passed"
    config = bench.layout.config(bench.layout.manifest(result.artifact.digest))
    assert (config.engine, config.contract.allowed_providers) == ("coral", ("EdgeTPU",))
    line = json.dumps(["-s", "-m", "13", "-t", "600", "-o", ".", "model.tflite"])
    assert vendor_tools.calls(programs, "edgetpu_compiler").count(line) == 1


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_ascend_calibrates_compiles_and_leaves_the_judging_to_the_board(
    bench: Bench, monkeypatch, precision: str
) -> None:
    programs = vendor_tools.install(monkeypatch, bench.folder / "vendor", *ACL)
    result = bench.compile("acl", precision=precision, options={"soc": "Ascend310P3"})
    assert bench.shipped(result) == b"IMODallow_fp32_to_fp16"
    figures = result.figures
    assert (figures.engine, figures.engine_version) == ("acl", "7.0.0.5.242")
    assert (figures.agreement, figures.p50_ms) == (None, None)
    assert figures.unmeasured == ("agreement", "latency", "memory")
    assert (result.quality, result.misses) == ("passed", ())
    (line,) = vendor_tools.calls(programs, "atc")
    assert {
        "--framework=5",
        "--soc_version=Ascend310P3",
        "--input_format=NCHW",
        "--input_shape=image:1,3,32,32",
    } <= set(json.loads(line))
    assert len(vendor_tools.calls(programs, "amct_onnx")) == (1 if precision == "int8" else 0)
    statement = json.loads(
        bench.layout.read(bench.layout.manifest(result.artifact.digest).layer(artifact.PROVENANCE_LAYER).digest, 10**6)
    )
    told = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {"name": "program atc", "annotations": {"version": "7.0.0.5.242"}} in told


def test_a_builder_board_times_what_can_not_be_run_here_at_all(bench: Bench, monkeypatch) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *ACL)
    board = bench.on_board({"allow_fp32_to_fp16": 2.0, "must_keep_origin_dtype": 5.0})
    result = bench.compile("acl", measure=board)
    assert result.quality == "passed"
    assert (result.figures.p50_ms, result.figures.float_p50_ms, result.figures.timed_on) == (2.0, 5.0, "atlas-1")
    assert result.figures.peak_memory_bytes == 1 << 20
    assert result.figures.unmeasured == ("agreement",)


def test_what_a_builder_board_finds_slower_than_float_gives_way_to_it(bench: Bench, monkeypatch) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *ACL)
    board = bench.on_board({"allow_fp32_to_fp16": 5.0, "must_keep_origin_dtype": 2.0})
    result = bench.compile("acl", measure=board, search={"effort": "quick", "prefer": "latency"})
    assert bench.shipped(result) == b"IMODmust_keep_origin_dtype"
    assert (result.precision, result.figures.p50_ms) == ("fp32", 2.0)
    assert "slower than float on acl" in result.why


def test_what_a_builder_board_refuses_and_this_host_can_not_run_is_not_shipped(bench: Bench, monkeypatch) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *ACL)
    with pytest.raises(QualityError, match="refused by the builder board atlas-1: agreement"):
        bench.compile("acl", measure=bench.on_board({"": 1.0}, agreement=0.2))


def test_what_a_board_alone_can_judge_is_taken_by_the_controller_and_what_this_host_can_judge_is_not_so(
    bench: Bench, monkeypatch
) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *ACL, *CORAL)
    for engine, taken in (("acl", True), ("coral", False)):
        result = bench.compile(engine)
        unjudged = msgspec.structs.replace(result.figures, agreement=None)
        asked = bench.asked(engine).model_dump_json()
        with nullcontext() if taken else pytest.raises(TrustError, match="agreement None, budget"):
            row = checking.checked(
                msgspec.structs.replace(result, figures=unjudged), bench.version, asked, bench.layout, 0.0, despite_quality=False, by="far"
            )  # fmt: skip
            assert row.state == "compiled"


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_rk1808s_older_toolkit_runs_in_its_own_python(bench: Bench, monkeypatch, precision: str) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *RK1808)
    result = bench.compile("rknn", target="rk1808", precision=precision)
    assert bench.shipped(result) == b"RKNN1rk1808"
    assert (result.figures.engine, result.figures.engine_version) == ("rknn", "1.7.5")
    assert result.figures.unmeasured == ("agreement", "latency", "memory")


@pytest.mark.parametrize(
    ("engine", "target", "program", "where"),
    [
        ("coral", None, "edgetpu_compiler", "coral.ai"),
        ("acl", None, "atc", "hiascend.com"),
        ("rknn", "rk1808", "rknn-toolkit1-python", "GitHub releases"),
    ],
)
def test_a_program_that_is_not_here_is_told_with_where_it_comes_from(
    bench: Bench, engine, target, program, where
) -> None:
    with pytest.raises(MissingTool, match=rf"{program} is not on PATH .*{where}"):
        bench.compile(engine, target=target)


def test_float16_for_ascend_needs_no_quantizer(bench: Bench, monkeypatch) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", "atc")
    assert bench.compile("acl", precision="fp16").quality == "passed"
    with pytest.raises(MissingTool, match="amct_onnx is not on PATH"):
        bench.compile("acl", precision="int8")


@pytest.mark.parametrize(
    ("names", "engine", "version", "told"),
    [
        (CORAL, "coral", "2.1.302470888", r"edgetpu_compiler at .* has version 2\.1, this target knows >=14,<17"),
        (CORAL, "coral", "\\x07\\xff segmentation", r"edgetpu_compiler at .* tells no version: 'Edge TPU Compiler"),
        (ACL, "acl", "1.77.T1", r"atc at .* has version 1\.77\.T1, this target knows >=5,<10"),
    ],
)
def test_a_program_of_another_version_is_refused_before_anything_is_made(
    bench, monkeypatch, names, engine, version, told
) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *names, version=version)
    with pytest.raises(ToolchainError, match=told):
        bench.compile(engine)
    assert not (bench.folder / "cache").exists()


def test_another_version_of_a_program_compiles_anew(bench: Bench, monkeypatch) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "one", *ACL)
    first = bench.compile("acl")
    assert bench.compile("acl").cached
    vendor_tools.install(monkeypatch, bench.folder / "two", *ACL, version="8.0.1")
    second = bench.compile("acl")
    assert not second.cached
    assert second.key != first.key


@pytest.mark.parametrize(
    ("names", "engine", "behaviour", "error", "told"),
    [
        (ACL, "acl", "stop('E19010: No parser is registered for Op [head/boxes, optype [ai.onnx::13::NonMaxSuppression]].')", ModelError, r"atc has no operator NonMaxSuppression \(node 'head/boxes'\)"),
        (ACL, "acl", "stop('EZ3003: [PID: 9] No supported Ops kernel and engine are found for [n7], optype [Det].')", ModelError, r"atc has no operator Det \(node 'n7'\)"),
        (ACL, "acl", "os.kill(os.getpid(), 11)", ToolchainError, "atc ended with signal 11: it printed nothing"),
        (ACL, "acl", "sys.stdout.buffer.write(bytes(range(256)) * 9); sys.exit(3)", ToolchainError, "atc ended with status 3"),
        (ACL, "acl", "sys.exit(0)", ToolchainError, r"atc ended well, but wrote no compiled\.om"),
        (CORAL, "coral", "print('Number of operations that will run on Edge TPU: 0'); print('SOFTMAX   1   Operation is working on an unsupported data type'); Path('model_edgetpu.tflite').write_bytes(b'x'); sys.exit(0)", ModelError, r"none of the network's operators runs on the Edge TPU \(SOFTMAX x 1: Operation is working"),
        (CORAL, "coral", "print('Internal compiler error. Aborting!'); sys.exit(1)", ModelError, "edgetpu_compiler refuses the network: Internal compiler error"),
        (CORAL, "coral", "print('?\\x00?'); Path('model_edgetpu.tflite').write_bytes(b'x'); sys.exit(0)", ToolchainError, "does not tell how much it mapped"),
    ],
    ids=["parser", "kernel", "crash", "rubbish", "no file", "nothing mapped", "internal error", "no figures"],
)  # fmt: skip
def test_a_program_that_fails_is_told_by_its_reason(
    bench: Bench, monkeypatch, names, engine, behaviour, error, told
) -> None:
    if engine == "acl":  # amct does its part
        vendor_tools.install(monkeypatch, bench.folder / "vendor", "amct_onnx")
    vendor_tools.install(monkeypatch, bench.folder / "vendor", names[0], behaviour=behaviour)
    with pytest.raises(error, match=told):
        bench.compile(engine)


def test_rk1808s_toolkit_that_gives_a_status_is_told_by_its_step(bench: Bench, monkeypatch) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *RK1808, behaviour="return -1")
    with pytest.raises(
        ToolchainError, match=r"rknn-toolkit ended with status 1: error: can't build the network \(status -1\)"
    ):
        bench.compile("rknn", target="rk1808")


def test_a_cancelled_compile_ends_the_vendors_program_too(bench: Bench, monkeypatch) -> None:
    pids = bench.folder / "pid"
    sleep = f"Path({str(pids)!r}).write_text(str(os.getpid()))\nimport signal\nsignal.pause()"
    vendor_tools.install(monkeypatch, bench.folder / "vendor", "amct_onnx")
    vendor_tools.install(monkeypatch, bench.folder / "vendor", "atc", behaviour=sleep)

    def wait_for_it(what: str, _done: int, _total: int) -> None:
        if what == "compiling":
            threading.Thread(target=cancel_when_it_runs, daemon=True).start()

    def cancel_when_it_runs() -> None:
        while not (pids.exists() and pids.read_text()):
            threading.Event().wait(0.02)
        bench.cancel.set()

    with pytest.raises(Cancelled, match="onnxruntime compile was cancelled"):
        bench.compile("acl", progress=wait_for_it)
    assert_ends(int(pids.read_text()), "the vendor's program")


def test_an_option_with_a_chip_that_the_toolkit_does_not_know_is_refused(bench: Bench, monkeypatch) -> None:
    vendor_tools.install(monkeypatch, bench.folder / "vendor", *RK1808)
    with pytest.raises(ManifestError, match="target rk1808 knows no chip 'rk3588'; it knows rk1808, rk3399pro"):
        bench.compile("rknn", target="rk1808", options={"chip": "rk3588"})
