"""One contract for every engine adapter: the same small network must be loaded, answered, and refused alike by all."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from edgefleet_agent.runtime import engines
from edgefleet_agent.runtime.engines.fake import FakeEngine
from edgefleet_agent.runtime.engines.port import Binder, Engine
from edgefleet_shared import golden
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError
from support import artifacts, ascend, iree, nvidia, vendors

SEED = 3


class Case:
    """An adapter, a good model file for it, and what the model must answer."""

    def __init__(self, label: str, engine: Engine, content: bytes, tolerance: float) -> None:
        self.label, self.engine, self.content, self.tolerance = label, engine, content, tolerance
        name = engine.name if engine.name in artifacts.PROVIDERS else "onnxruntime"
        self.config = artifacts.make_config(engine=name)  # type: ignore[arg-type]

    def answer(self, x: np.ndarray) -> np.ndarray:
        if self.engine.name == "fake":
            return np.repeat(x.reshape(len(x), -1).mean(axis=1, keepdims=True), artifacts.CLASSES, axis=1)
        return artifacts.truth(SEED, x)


BUILDERS = {
    "onnxruntime": ("onnxruntime", lambda: artifacts.onnx_model(SEED), 1e-4),
    "onnxruntime, file with batch 1": ("onnxruntime", lambda: artifacts.onnx_model(SEED, batch=1), 1e-4),
    "tflite": ("tflite", lambda: artifacts.tflite_model(SEED), 1e-4),
    "tflite, int8 file": ("tflite", lambda: artifacts.tflite_model(SEED, quantized=True), 0.25),
    "openvino": ("openvino", lambda: artifacts.openvino_model(SEED), 1e-3),
    "openvino, file with batch 1": ("openvino", lambda: artifacts.openvino_model(SEED, batch=1), 1e-3),
    "ncnn": ("ncnn", lambda: artifacts.ncnn_model(SEED), 1e-4),
    "iree": ("iree", lambda: iree.module(artifacts.onnx_model(SEED)), 1e-4),
    "iree, file with batch 1": ("iree", lambda: iree.module(artifacts.onnx_model(SEED, batch=1)), 1e-4),
    "tensorrt, recorded interface": ("tensorrt", lambda: b"PLAN" + artifacts.onnx_model(SEED), 1e-4),
    "tensorrt, recorded interface, file with batch 1": (
        "tensorrt",
        lambda: b"PLAN" + artifacts.onnx_model(SEED, batch=1),
        1e-4,
    ),
    "tensorrt-rtx, recorded interface": ("tensorrt-rtx", lambda: b"PLAN" + artifacts.onnx_model(SEED), 1e-4),
    "acl, recorded interface": ("acl", lambda: b"OM" + bytes([SEED]), 1e-4),
    "rknn, recorded interface": ("rknn", lambda: b"RKNN" + bytes([SEED]), 1e-4),
    "coral, recorded interface": ("coral", lambda: artifacts.tflite_model(SEED, quantized=True), 0.25),
    "fake": ("fake", lambda: msgspec.json.encode({"scale": 1.0, "offset": 0.0}), 1e-4),
}


@pytest.fixture(params=BUILDERS)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    name, build, tolerance = BUILDERS[request.param]
    if name == "rknn":
        vendors.install_rknn(monkeypatch, tmp_path / "vendor")
    if name == "tensorrt":
        nvidia.install(monkeypatch, tmp_path / "vendor")
    if name == "tensorrt-rtx":
        nvidia.install(monkeypatch, tmp_path / "vendor", "tensorrt_rtx", "tensorrt-rtx")
    if name == "acl":
        ascend.install(monkeypatch, tmp_path / "vendor")
    if name == "coral":
        vendors.install_edge_tpu(monkeypatch, ("edgetpu-custom-op",))
    engine: Engine = FakeEngine() if name == "fake" else engines.find(name)
    if engine.available() is None:
        pytest.skip(f"{name}: {engine.missing()}")
    return Case(request.param, engine, build(), tolerance)


@pytest.fixture
def model_path(case: Case, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(case.content)
    return path


def encoded(count: int) -> np.ndarray:
    return golden.encode_pictures(artifacts.pictures(SEED, count), artifacts.ENCODING)


def test_an_available_engine_tells_its_version_and_lacks_nothing(case: Case) -> None:
    assert case.engine.available()
    assert case.engine.missing() == ""


def test_the_answer_is_the_networks_answer_with_the_promised_name_type_and_shape(case: Case, model_path: Path) -> None:
    session = case.engine.load(model_path, case.config, threads=1)
    x = encoded(1)
    outputs = session.run({"x": x})
    assert list(outputs) == ["y"]
    assert outputs["y"].dtype == np.float32
    assert outputs["y"].shape == (1, artifacts.CLASSES)
    np.testing.assert_allclose(outputs["y"], case.answer(x), atol=case.tolerance)


def test_a_batch_is_answered_row_for_row_like_single_pictures(case: Case, model_path: Path) -> None:
    session = case.engine.load(model_path, case.config, threads=1)
    x = encoded(5)
    together = session.run({"x": x})["y"]
    single = np.concatenate([session.run({"x": x[i : i + 1]})["y"] for i in range(5)])
    assert together.shape == (5, artifacts.CLASSES)
    np.testing.assert_allclose(together, single, atol=1e-5)


def test_an_answer_is_not_overwritten_by_the_next_inference(case: Case, model_path: Path) -> None:
    session = case.engine.load(model_path, case.config, threads=1)
    x = encoded(2)
    first = session.run({"x": x[:1]})["y"]
    before = first.copy()
    session.run({"x": x[1:]})
    np.testing.assert_array_equal(first, before)


def test_a_loaded_session_names_what_really_computes(case: Case, model_path: Path) -> None:
    session = case.engine.load(model_path, case.config, threads=1)
    assert session.providers
    assert set(session.providers) <= {
        "CPU", "CPUExecutionProvider", "NPU", "EdgeTPU", "TensorRT", "TensorRT-RTX", "local-sync",
    }  # fmt: skip


@pytest.mark.parametrize("case", ["onnxruntime", "onnxruntime, file with batch 1"], indirect=True)
def test_a_session_that_was_told_where_tensors_lie_answers_there_as_it_does_otherwise(
    case: Case, model_path: Path
) -> None:
    session = case.engine.load(model_path, case.config, threads=1)
    assert isinstance(session, Binder)
    pictures = encoded(4)
    x, y = np.empty_like(pictures[:1]), np.zeros((1, artifacts.CLASSES), np.float32)
    compute = session.bind({"x": x}, {"y": y})
    assert compute is not None
    for i in range(4):
        x[:] = pictures[i : i + 1]
        compute()
        np.testing.assert_array_equal(y, session.run({"x": pictures[i : i + 1]})["y"])


def test_what_onnxruntime_can_not_compute_is_in_its_error_and_not_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A client that sends such a request again and again would fill the board's journal."""
    path = tmp_path / "model"
    path.write_bytes(artifacts.table_model([1.0, 2.0, 4.0]))
    config = artifacts.make_config(inputs=(TensorSpec("x", "INT64", (-1,)),), outputs=(TensorSpec("y", "FP32", (-1,)),))
    session = engines.find("onnxruntime").load(path, config, 1)
    assert session.run({"x": np.array([2, 0])})["y"].tolist() == [4.0, 1.0]
    with pytest.raises(EngineError, match="idx=9"):
        session.run({"x": np.array([9])})
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x08\x09" + bytes(400)])
def test_bytes_that_are_no_model_are_refused(case: Case, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(EngineError):
        case.engine.load(path, case.config, threads=1).run({"x": encoded(1)})


def test_a_file_whose_tensors_differ_from_the_promise_is_refused(case: Case, model_path: Path) -> None:
    if case.engine.name == "fake":
        pytest.skip("the fake has no tensors of its own to differ")
    promised = msgspec.structs.replace(
        case.config,
        inputs=(TensorSpec("other", "FP32", (-1, 8, 8, 3)), TensorSpec("x", "FP32", (-1, 8, 8, 3))),
    )
    with pytest.raises(EngineError, match=r"promises|in the artifact"):
        case.engine.load(model_path, promised, threads=1)


def test_an_answer_of_another_type_than_promised_is_refused_at_loading_or_made_one_of_it(
    case: Case, model_path: Path
) -> None:
    promised = msgspec.structs.replace(case.config, outputs=(TensorSpec("y", "INT64", (-1, artifacts.CLASSES)),))
    found, told = "", ""
    try:
        session = case.engine.load(model_path, promised, threads=1)
    except EngineError as exc:
        told = exc.message
    else:
        found = session.run({"x": encoded(1)})["y"].dtype.name
    assert found == "int64" or "promises" in told or "in the artifact" in told


def test_an_unknown_engine_is_refused_with_the_known_names() -> None:
    with pytest.raises(EngineError, match="onnxruntime"):
        engines.find("abacus")


@pytest.mark.parametrize(
    ("operators", "providers"),
    [
        (("edgetpu-custom-op",), ("EdgeTPU",)),
        (("QUANTIZE", "edgetpu-custom-op", "DEQUANTIZE"), ("EdgeTPU",)),
        (("QUANTIZE", "DEQUANTIZE"), ("CPU",)),
        (("QUANTIZE", "edgetpu-custom-op", "SOFTMAX"), ("EdgeTPU", "CPU")),
        (("CONV_2D", "FULLY_CONNECTED"), ("CPU",)),
    ],
)
def test_what_the_edge_tpu_leaves_to_the_cpu_is_told(monkeypatch, tmp_path, operators, providers) -> None:
    given = vendors.install_edge_tpu(monkeypatch, operators)
    path = tmp_path / "model"
    path.write_bytes(artifacts.tflite_model(SEED, quantized=True))
    session = engines.find("coral").load(path, artifacts.make_config(engine="tflite"), threads=1)
    assert session.providers == providers
    assert given == ["the Edge TPU"]


def test_a_board_without_an_edge_tpu_says_so() -> None:
    coral = engines.find("coral")
    if coral.available() is None:
        pytest.skip(f"no TFLite interpreter here: {coral.missing()}")
    with pytest.raises(EngineError, match=r"no Edge TPU answers.*libedgetpu\.so\.1"):
        coral.load_library()


def test_a_board_without_rockchips_package_says_so() -> None:
    rknn = engines.find("rknn")
    assert rknn.available() is None
    assert "rknn-toolkit-lite2" in rknn.missing()
    with pytest.raises(EngineError, match="rknn-toolkit-lite2 does not load"):
        rknn.load_library()


def test_an_npu_that_answers_with_a_status_instead_of_outputs_is_an_error(monkeypatch, tmp_path) -> None:
    vendors.install_rknn(monkeypatch, tmp_path / "vendor")
    path = tmp_path / "model"
    path.write_bytes(b"RKNN" + bytes([SEED]))
    session = engines.find("rknn").load(path, artifacts.make_config(), threads=1)
    session.run({"x": encoded(1)})
    monkeypatch.setattr(vendors.RKNNLite, "inference", lambda *_, **__: None)
    with pytest.raises(EngineError, match="answered nothing"):
        session.run({"x": encoded(1)})


def test_an_npu_that_does_not_start_is_told_and_let_go(monkeypatch, tmp_path) -> None:
    vendors.install_rknn(monkeypatch, tmp_path / "vendor")
    path = tmp_path / "model"
    path.write_bytes(b"RKNN" + bytes([SEED]))
    let_go = []
    monkeypatch.setattr(vendors.RKNNLite, "init_runtime", lambda self: -1)
    monkeypatch.setattr(vendors.RKNNLite, "release", lambda self: let_go.append(self))
    with pytest.raises(EngineError, match=r"can't start the NPU.*librknnrt"):
        engines.find("rknn").load(path, artifacts.make_config(), threads=1)
    assert len(let_go) == 1


def openvino_blob(xml_way: int, bin_way: int, spoil: str = "") -> bytes:
    """The classifier's, with its members compressed so or so."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(artifacts.openvino_model(SEED))) as whole, zipfile.ZipFile(stream, "w") as made:
        for name, way in (("model.xml", xml_way), ("model.bin", bin_way)):
            content = whole.read(name)
            if name == "model.xml" and spoil == "bomb":
                content += b" " * (65 << 20)
            made.writestr(name, content, way)
    blob = stream.getvalue()
    if spoil == "size":
        entry = blob.rindex(b"PK\1\2") + 20  # of model.bin in the directory: its size, stored and whole
        return blob[:entry] + (0xF0000000).to_bytes(4, "little") * 2 + blob[entry + 8 :]
    return blob[:60] + bytes(40) + blob[100:] if spoil == "stream" else blob


@pytest.mark.parametrize("way", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_openvinos_xml_may_be_deflated(way: int, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(openvino_blob(way, zipfile.ZIP_STORED))
    session = engines.find("openvino").load(tmp_path / "model", artifacts.make_config(engine="openvino"), threads=1)
    x = encoded(1)
    np.testing.assert_allclose(session.run({"x": x})["y"], artifacts.truth(SEED, x), atol=1e-3)


@pytest.mark.parametrize(
    ("ways", "spoil", "told"),
    [
        ((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED), "", "model.bin in the OpenVINO blob is compressed"),
        ((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED), "bomb", "model.xml in the OpenVINO blob has .* bytes"),
        ((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED), "stream", "not an OpenVINO blob"),
        ((zipfile.ZIP_STORED, zipfile.ZIP_STORED), "size", "model.bin .* says of itself that it has 4026531840 bytes"),
        ((zipfile.ZIP_LZMA, zipfile.ZIP_STORED), "", "model.xml in the OpenVINO blob is compressed by method 14"),
    ],
)
def test_an_openvino_blob_that_would_swell_or_is_broken_is_refused(
    ways: tuple[int, int], spoil: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "model").write_bytes(openvino_blob(*ways, spoil))
    with pytest.raises(EngineError, match=told):
        engines.find("openvino").load(tmp_path / "model", artifacts.make_config(engine="openvino"), threads=1)
