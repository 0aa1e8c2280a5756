"""TensorRT and Ascend: what the engines' common contract does not ask. Recorded interfaces; building also on the real tensorrt_rtx."""

from __future__ import annotations

import gc
import inspect
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest
from edgefleet_agent.runtime import engines
from edgefleet_agent.runtime.engines import devices
from edgefleet_agent.runtime.engines.port import Builder
from edgefleet_agent.runtime.engines.tensorrt import TensorrtEngine
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError
from support import artifacts, ascend, nvidia
from support.ascend import Npu
from support.nvidia import Gpu

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
CONFIG = artifacts.make_config()
X = np.random.default_rng(1).random((1, 8, 8, 3), np.float32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    return nvidia.install(monkeypatch, tmp_path / "vendor")


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Npu:
    return ascend.install(monkeypatch, tmp_path / "vendor")


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(artifacts.onnx_model(3))
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan"
    path.write_bytes(b"PLAN" + artifacts.onnx_model(3))
    return path


@pytest.fixture
def om_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.om"
    path.write_bytes(b"OM\x03")
    return path


# --- who builds


def test_only_tensorrt_of_all_engines_builds_on_the_board() -> None:
    assert {name for name in engines.names() if isinstance(engines.find(name), Builder)} == {"tensorrt"}


# --- TensorRT


def test_what_is_built_is_loaded_and_answers(gpu: Gpu, onnx_file: Path, tmp_path: Path) -> None:
    engine, plan, steps = TensorrtEngine(), io.BytesIO(), []
    engine.build(onnx_file, CONFIG, 1 << 30, plan, lambda *step: steps.append(step))
    assert ("building: Building Engine", 2, 2) in steps
    path = tmp_path / "plan"
    path.write_bytes(plan.getvalue())
    answer = engine.load(path, CONFIG, 1).run({"x": X})["y"]
    np.testing.assert_allclose(answer, artifacts.truth(3, X), atol=1e-4)


def test_a_plan_depends_on_engine_driver_and_gpu(gpu: Gpu) -> None:
    key = TensorrtEngine().build_key()
    assert key == "tensorrt 10.3.0, driver CUDA 12060, Orin (compute 8.7)"


def test_a_network_that_the_parser_refuses_says_why(gpu: Gpu, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no network")
    with pytest.raises(EngineError, match="can't read the network: Failed to parse"):
        TensorrtEngine().build(broken, CONFIG, 1 << 30, io.BytesIO(), lambda *step: None)


def test_a_build_that_answers_nothing_is_an_error_with_the_loggers_reason(
    gpu: Gpu, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = sys.modules["tensorrt"]

    def refuse(self: object, network: object, config: object) -> None:
        self._logger.log(trt.ILogger.Severity.ERROR, "Could not find any implementation for node conv")  # type: ignore[attr-defined]

    monkeypatch.setattr(trt.Builder, "build_serialized_network", refuse)
    with pytest.raises(EngineError, match="Could not find any implementation for node conv"):
        TensorrtEngine().build(onnx_file, CONFIG, 1 << 30, io.BytesIO(), lambda *step: None)


def test_sizes_that_stay_open_beside_the_batch_are_refused(gpu: Gpu, onnx_file: Path) -> None:
    config = msgspec.structs.replace(CONFIG, inputs=(TensorSpec("x", "FP32", (-1, -1, 8, 3)),))
    with pytest.raises(EngineError, match="leaves sizes open"):
        TensorrtEngine().build(onnx_file, config, 1 << 30, io.BytesIO(), lambda *step: None)


def test_a_tensor_that_the_plan_wants_in_host_memory_is_given_there(gpu: Gpu, plan_file: Path) -> None:
    sys.modules["tensorrt"].on_host = {"y"}  # type: ignore[attr-defined]
    session = TensorrtEngine().load(plan_file, CONFIG, 1)
    first = session.run({"x": X})["y"]
    before = first.copy()
    np.testing.assert_allclose(first, artifacts.truth(3, X), atol=1e-4)
    session.run({"x": -X})
    np.testing.assert_array_equal(first, before)


def test_what_cuda_gave_is_given_back(gpu: Gpu, plan_file: Path) -> None:
    session = TensorrtEngine().load(plan_file, CONFIG, 1)
    session.run({"x": X})
    assert gpu.held
    del session
    gc.collect()
    assert gpu.held == {}
    assert gpu.streams == set()


@pytest.mark.parametrize("refusal", ["set_tensor_address", "set_input_shape"])
def test_a_load_that_fails_halfway_gives_back_what_it_had(
    gpu: Gpu, plan_file: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"].IExecutionContext, refusal, lambda *_: False)  # type: ignore[attr-defined]
    with pytest.raises(EngineError):
        TensorrtEngine().load(plan_file, CONFIG, 1)
    gc.collect()
    assert gpu.held == {}
    assert gpu.streams == set()


def test_no_memory_for_a_context_is_an_error(gpu: Gpu, plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"].ICudaEngine, "create_execution_context", lambda self: None)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="no memory to run the plan"):
        TensorrtEngine().load(plan_file, CONFIG, 1)


def test_an_inference_that_answers_false_is_an_error_and_the_next_one_is_right(
    gpu: Gpu, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = TensorrtEngine().load(plan_file, CONFIG, 1)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["tensorrt"].IExecutionContext, "execute_async_v3", lambda *_: False)  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="TensorRT failed"):
            session.run({"x": X})
    assert gpu.waiting == []
    np.testing.assert_allclose(session.run({"x": X})["y"], artifacts.truth(3, X), atol=1e-4)


def test_a_board_without_the_driver_says_so(gpu: Gpu) -> None:
    gpu.present = False
    with pytest.raises(EngineError, match=r"no NVIDIA GPU answers: .*InsufficientDriver") as caught:
        TensorrtEngine().load_library()
    assert "device files" in caught.value.hint


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_board_without_nvidias_packages_says_which(name: str) -> None:
    engine = engines.find(name)
    assert engine.available() is None
    assert "tensorrt" in engine.missing()
    assert "cuda-python" in engine.missing()
    with pytest.raises(EngineError, match="does not load"):
        engine.load_library()


def test_an_old_tensorrt_is_refused(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = sys.modules["tensorrt"]
    monkeypatch.setattr(trt, "NetworkDefinitionCreationFlag", object())
    with pytest.raises(EngineError, match="TensorRT 10"):
        TensorrtEngine().load_library()


REAL = """
import io, json, sys
from pathlib import Path
sys.path.append(sys.argv[1])  # behind our own: only NVIDIA's packages come from there
import tensorrt_rtx_bindings as trt  # tensorrt_rtx itself has no wheel, and does nothing but import this
from edgefleet_agent.runtime.engines.nvidia import Library, NvidiaSession
from edgefleet_agent.runtime.engines.tensorrt import build_plan
from edgefleet_shared.errors import EngineError
sys.path.append(sys.argv[2])
from support import artifacts
folder, config = Path(sys.argv[3]), artifacts.make_config()
told = {"steps": [], "lacking": []}
for name in ("model.onnx", "broken"):
    plan = io.BytesIO()
    try:
        build_plan(trt, folder / name, config, 1 << 30, plan, lambda *step: told["steps"].append(step))
        told[name] = len(plan.getvalue())
        (folder / "plan").write_bytes(plan.getvalue())
    except EngineError as exc:
        told[name] = exc.message
class NoCuda:
    def call(self, *arguments):
        raise EngineError("called without a driver")
try:
    NvidiaSession(Library(trt, NoCuda()), folder / "plan", config, "TensorRT-RTX")
except EngineError as exc:
    told["loading"] = exc.message
for part, names in json.loads(sys.argv[4]).items():
    told["lacking"] += [f"{part}.{n}" for n in names if not hasattr(getattr(trt, part, None), n)]
print(json.dumps(told))
"""


def recorded() -> dict[str, list[str]]:
    """Every class of the recorded interface and its public methods."""
    module = nvidia.tensorrt(Gpu())
    parts = {name: part for name, part in vars(module).items() if inspect.isclass(part)}
    return {
        name: [n for n in vars(part) if not n.startswith("_")] for name, part in parts.items() if name != "ILogger"
    } | {"ILogger": ["log", "Severity"]}


def test_the_real_tensorrt_rtx_builds_a_plan_and_has_every_name_that_was_recorded(onnx_file: Path) -> None:
    python = Path(Toolchains(CACHE).ensure("tensorrt-rtx").python)
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    (onnx_file.parent / "broken").write_bytes(b"no network")
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REAL), str(site), str(tests), str(onnx_file.parent), msgspec.json.encode(recorded()).decode()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = msgspec.json.decode(done.stdout.splitlines()[-1])
    assert told["model.onnx"] > 1000
    assert any(doing.startswith("building: ") and total > 0 for doing, _, total in told["steps"])
    assert "can't read the network" in told["broken"]
    assert told["lacking"] == []
    # Without a driver the real one answers None, and says why to its logger alone.
    assert told["loading"].startswith("TensorRT can't load the plan: ")


# --- Ascend


def test_what_the_npu_gave_is_given_back(npu: Npu, om_file: Path) -> None:
    session = engines.find("acl").load(om_file, CONFIG, 1)
    session.run({"x": X})
    assert {"model", "context", "memory", "buffer", "dataset", "description", "device"} <= set(npu.left)
    del session
    gc.collect()
    assert npu.left == {}


@pytest.mark.parametrize("function", ["malloc", "set_device"])
def test_an_npu_that_refuses_halfway_gets_back_what_it_gave(npu: Npu, om_file: Path, function: str) -> None:
    npu.fail[function] = 207001
    with pytest.raises(EngineError, match="207001"):
        engines.find("acl").load(om_file, CONFIG, 1)
    gc.collect()
    assert set(npu.left) <= {"device"}


def test_a_program_that_runs_on_the_npus_own_processor_copies_within_the_device(npu: Npu, om_file: Path) -> None:
    npu.on_device = True
    answer = engines.find("acl").load(om_file, CONFIG, 1).run({"x": X})["y"]
    np.testing.assert_allclose(answer, artifacts.truth(3, X), atol=1e-4)


def test_a_status_instead_of_an_inference_is_an_error(npu: Npu, om_file: Path) -> None:
    session = engines.find("acl").load(om_file, CONFIG, 1)
    npu.fail["execute"] = 507011
    with pytest.raises(EngineError, match=r"acl\.mdl\.execute answered 507011"):
        session.run({"x": X})


def test_a_second_start_in_one_process_is_no_error(npu: Npu, om_file: Path) -> None:
    engines.find("acl").load_library()
    engines.find("acl").load(om_file, CONFIG, 1).run({"x": X})


def test_a_board_whose_npu_does_not_answer_says_so(npu: Npu) -> None:
    npu.count = 0
    with pytest.raises(EngineError, match="no Ascend NPU answers"):
        engines.find("acl").load_library()


def test_cann_tells_its_version_by_its_folder(npu: Npu) -> None:
    assert engines.find("acl").available() == "8.0.RC3"


def test_a_board_without_cann_says_so() -> None:
    engine = engines.find("acl")
    assert engine.available() is None
    assert "CANN" in engine.missing()
    with pytest.raises(EngineError, match="pyACL does not load"):
        engine.load_library()


# --- the confinement


def test_an_engine_gets_the_device_files_of_its_kind_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["/dev/davinci0", "/dev/nvidia0", "/dev/nvidiactl", "/dev/sda", "/dev/rknpu0"]

    def find(pattern: str) -> list[str]:
        import fnmatch

        return fnmatch.filter(there, pattern)

    monkeypatch.setattr("edgefleet_agent.runtime.engines.devices.glob.glob", find)
    assert devices.of("tensorrt") == ("/dev/nvidia0", "/dev/nvidiactl")
    assert devices.of("acl") == ("/dev/davinci0",)
    assert devices.of("rknn") == ("/dev/rknpu0",)
    assert devices.of("onnxruntime") == ()
