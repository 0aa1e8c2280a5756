"""Acceptance of real artifacts in the real sandboxed child, on every engine: verdict, reason, and figures that were measured."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from edgefleet_agent import slots
from edgefleet_agent.accept import accept
from edgefleet_shared import answers, golden
from edgefleet_shared.artifact import GOLDEN_LAYER, MODEL_LAYER
from edgefleet_shared.contract import TensorSpec, Verdict
from edgefleet_shared.reading import BoxDecoding
from support import artifacts

ENGINES = ("onnxruntime", "tflite", "openvino", "ncnn", "iree")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_good_model_passes_with_every_figure_measured(tmp_path: Path, engine: artifacts.EngineName) -> None:
    made = artifacts.make_artifact(slots.artifacts(tmp_path), engine=engine)
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.PASSED, report.reason
    figures = report.figures
    assert figures is not None
    assert figures.golden_count == 16
    assert figures.agreement == 1.0
    assert figures.cosine > 0.999
    assert 0 < figures.p50_ms <= figures.p95_ms
    assert figures.load_ms > 0
    assert 10 << 20 < figures.peak_memory_bytes < 1 << 30
    assert figures.providers == artifacts.PROVIDERS[engine]
    assert figures.cpu_share is not None
    assert figures.waited_share is not None
    assert report.unconfined == ()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_answers_otherwise_fails_on_agreement(tmp_path: Path, engine: artifacts.EngineName) -> None:
    made = artifacts.make_artifact(slots.artifacts(tmp_path), engine=engine, behaviour="wrong")
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.FAILED
    assert "agreement" in report.reason


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_no_model_fails_while_loading(tmp_path: Path, engine: artifacts.EngineName) -> None:
    made = artifacts.make_artifact(slots.artifacts(tmp_path), engine=engine, behaviour="corrupt")
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.FAILED
    assert "while loading the model" in report.reason


def test_a_model_that_kills_its_process_fails_with_signal_and_stage(tmp_path: Path) -> None:
    made = artifacts.make_artifact(slots.artifacts(tmp_path), behaviour="crash")
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.FAILED
    assert report.reason.startswith("killed by SIGFPE while running the first inference")


def test_the_golden_picture_that_kills_it_is_named(tmp_path: Path) -> None:
    shown = artifacts.pictures(1)
    shown[3, 0, 0, 0] = 255
    made = artifacts.make_artifact(slots.artifacts(tmp_path), behaviour="poison", golden_pictures=shown)
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.FAILED
    assert report.reason.startswith("killed by SIGFPE while running golden picture 3")


LIMITS = {
    "latency": ({"latency_p95_ms": 1e-6}, "latency_p95"),
    "memory": ({"peak_memory_bytes": 1 << 20}, "memory"),
    "providers": ({"allowed_providers": ("NpuExecutionProvider",)}, "providers"),
    "golden count": ({"min_golden": 17}, "golden_count"),
    "time": ({"time_limit_s": 0.2}, "over its time limit of 0.2 s"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_each_limit_of_the_contract_can_fail_a_model(tmp_path: Path, limit: str) -> None:
    changes, words = LIMITS[limit]
    contract = artifacts.make_contract(**changes)
    made = artifacts.make_artifact(slots.artifacts(tmp_path), contract=contract)
    report = accept(tmp_path, made.digest)
    assert report.verdict in (Verdict.FAILED, Verdict.INCONCLUSIVE, Verdict.ERROR)
    assert words in report.reason
    # A child that ran out of time before it touched the model says nothing about the model; a busy core neither.
    assert report.verdict is Verdict.FAILED or limit in ("time", "latency")


BUSY = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@pytest.fixture
def crowded_core() -> Iterator[None]:
    """This process, and what it starts, on one core, beside three that never pause."""
    cores = os.sched_getaffinity(0)
    core = min(cores)
    busy = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(core)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()
        os.sched_setaffinity(0, {core})
        yield
    finally:
        os.sched_setaffinity(0, cores)
        for process in busy:
            process.kill()
            process.communicate()


def test_time_that_runs_out_on_a_crowded_core_is_inconclusive(tmp_path: Path, crowded_core: None) -> None:
    contract = artifacts.make_contract(timed_runs=100_000_000, time_limit_s=30.0)
    made = artifacts.make_artifact(slots.artifacts(tmp_path), contract=contract)
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.INCONCLUSIVE, report.reason
    assert "over its time limit of 30 s while timing inferences: the board was busy" in report.reason


ACCEPT = """
import sys
from pathlib import Path
from edgefleet_agent.accept import accept
report = accept(Path(sys.argv[1]), sys.argv[2])
print(report.verdict.value, report.reason)
"""


@pytest.mark.parametrize(
    ("behaviour", "granted_mib", "said"),
    [
        ("good", 200, "inconclusive the board has no memory that the model may take"),
        ("corrupt", 4000, "failed onnxruntime can't load the model"),
    ],
    ids=["refused", "granted"],
)
def test_a_board_that_refuses_the_memory_that_a_model_may_take_can_not_tell(
    tmp_path: Path, behaviour: artifacts.Behaviour, granted_mib: int, said: str
) -> None:
    """What a process may write is limited from outside, as a kernel that promises no more than it has limits it."""
    large = artifacts.onnx_model(1, padding_bytes=100 << 20) if behaviour == "good" else None
    made = artifacts.make_artifact(slots.artifacts(tmp_path), behaviour=behaviour, content=large)
    limit = (granted_mib << 20, granted_mib << 20)
    ended = subprocess.run(
        [sys.executable, "-c", ACCEPT, str(tmp_path), made.digest], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limit),
    )  # fmt: skip
    assert ended.stdout.startswith(said), ended.stdout + ended.stderr


def test_a_temperature_ceiling_on_a_board_without_sensor_is_inconclusive(tmp_path: Path) -> None:
    from edgefleet_agent import sensors

    made = artifacts.make_artifact(slots.artifacts(tmp_path), contract=artifacts.make_contract(max_celsius=95.0))
    report = accept(tmp_path, made.digest)
    expected = Verdict.INCONCLUSIVE if sensors.hottest_celsius() is None else Verdict.PASSED
    assert report.verdict is expected


def test_outputs_within_tolerance_pass_and_outside_fail(tmp_path: Path) -> None:
    layout = slots.artifacts(tmp_path)
    contract = artifacts.make_contract(kind="raw", tolerance_abs=0.01, min_agreement=0.99, min_cosine=0.0)
    good = artifacts.make_artifact(layout, contract=contract)
    bad = artifacts.make_artifact(layout, contract=contract, behaviour="wrong", version="2")
    assert accept(tmp_path, good.digest).verdict is Verdict.PASSED
    assert accept(tmp_path, bad.digest).verdict is Verdict.FAILED


@pytest.mark.parametrize("layer", [MODEL_LAYER, GOLDEN_LAYER])
def test_one_changed_byte_fails_before_the_engine_sees_it(tmp_path: Path, layer: str) -> None:
    layout = slots.artifacts(tmp_path)
    made = artifacts.make_artifact(layout)
    path = layout.path(layout.manifest(made.digest).layer(layer).digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.FAILED
    assert "changed on disk" in report.reason


def test_an_unknown_artifact_fails_with_its_digest(tmp_path: Path) -> None:
    report = accept(tmp_path, "sha256:" + "0" * 64)
    assert report.verdict is Verdict.FAILED
    assert "no blob" in report.reason


def test_golden_pictures_of_another_size_fail(tmp_path: Path) -> None:
    made = artifacts.make_artifact(slots.artifacts(tmp_path), inputs=(TensorSpec("x", "FP32", (-1, 9, 9, 3)),))
    report = accept(tmp_path, made.digest)
    assert report.verdict is Verdict.FAILED
    assert "golden pictures of x" in report.reason


def test_answers_that_are_not_numbers_agree_with_nothing() -> None:
    reading = answers.Reading("classification", (TensorSpec("y", "FP32", (1, 2)),))
    given, reference = np.array([[np.nan, np.inf]], np.float32), {"y": np.array([[1.0, 2.0]], np.float32)}
    agreement, cosine = golden.compare(artifacts.make_contract(), reading, [{"y": given}], reference)
    assert agreement == 0.0
    assert np.isnan(cosine)


SEEN = np.array(
    [[1, 1, 3, 3, 0.9, 0], [4, 4, 7, 7, 0.8, 2], [5, 1, 7, 2, 0.1, 0]], np.float32
)  # the last below the threshold
END_TO_END = BoxDecoding(decoder="end_to_end", threshold=0.5, nms_iou=0.45, match_iou=0.5)


def detector(tmp_path: Path, rows: np.ndarray, wanted: np.ndarray = SEEN, **contract: Any) -> str:
    """An artifact whose model sees ``rows`` in every picture, where the float one sees ``wanted``."""
    made = artifacts.make_artifact(
        slots.artifacts(tmp_path), content=artifacts.detector_model(rows), references=np.stack([wanted] * 16), statistics=None,
        outputs=(TensorSpec("y", "FP32", (-1, *rows.shape)),),
        contract=artifacts.make_contract(**({"kind": "detection", "min_cosine": 0.0, "detection": END_TO_END} | contract)),
    )  # fmt: skip
    return made.digest


@pytest.mark.parametrize(
    "rows",
    [SEEN, SEEN[[1, 0, 2]], SEEN + np.array([0.2, 0, 0.2, 0, -0.05, 0]), SEEN * np.array([[1], [1], [-1]])],
    ids=["the same", "in another order", "nearly there", "another box below the threshold"],
)
def test_a_detector_that_reports_the_same_boxes_passes(tmp_path: Path, rows: np.ndarray) -> None:
    report = accept(tmp_path, detector(tmp_path, rows))
    assert report.verdict is Verdict.PASSED, report.reason
    assert report.figures is not None
    assert report.figures.agreement == 1.0


@pytest.mark.parametrize(
    ("rows", "agreement"),
    [
        (SEEN * np.array([1, 1, 1, 1, 0.6, 1]), 0.5),
        (SEEN + np.array([0, 0, 0, 0, 0.5, 0]), 2 / 3),
        (SEEN + np.array([2, 2, 2, 2, 0, 0]), 0.0),
        (SEEN + np.array([0, 0, 0, 0, 0, 1]), 0.0),
        (SEEN * np.array([1, 1, 1, 1, 0, 1]), 0.0),
    ],
    ids=["a box is gone", "a box is new", "elsewhere", "other classes", "blind"],
)
def test_a_detector_that_reports_other_boxes_fails(tmp_path: Path, rows: np.ndarray, agreement: float) -> None:
    report = accept(tmp_path, detector(tmp_path, rows))
    assert report.verdict is Verdict.FAILED
    assert report.reason.startswith("agreement")
    assert report.figures is not None
    assert report.figures.agreement == pytest.approx(agreement)


@pytest.mark.parametrize(
    ("contract", "wanted", "words"),
    [
        ({"detection": msgspec.structs.replace(END_TO_END, decoder="yolov3", anchors=((1, 1),), masks=((0,),))}, SEEN, "yolov3 takes"),
        ({}, SEEN * np.array([1, 1, 1, 1, 0, 1]), "finds no box in any golden picture"),
    ],
    ids=["another decoder", "nothing to find"],
)  # fmt: skip
def test_a_detector_that_nothing_could_be_compared_of_does_not_pass(
    tmp_path: Path, contract: dict[str, Any], wanted: np.ndarray, words: str
) -> None:
    report = accept(tmp_path, detector(tmp_path, SEEN, wanted, **contract))
    assert report.verdict is Verdict.FAILED
    assert words in report.reason


def test_the_resident_half_imports_nothing_heavy() -> None:
    code = (
        "import sys, edgefleet_agent.accept, edgefleet_agent.board, edgefleet_agent.runtime.control, edgefleet_agent.notify;"
        "print([m for m in ('numpy','pydantic','safetensors','onnxruntime','asyncio','uvloop','tuf','cryptography') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
