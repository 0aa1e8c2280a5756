"""Every engine that this machine has, behind the real runtime, in a worker that is confined."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children.tflite.onnx_to_tflite import convert
from edgefleet_shared.contract import TensorSpec
from onnx import TensorProto, helper, numpy_helper
from support import artifacts
from support.runtimes import Load, Runtime, running

ENGINES = ("onnxruntime", "tflite", "openvino", "iree")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_is_served_on_several_threads_and_its_worker_is_wholly_confined(tmp_path: Path, engine: str) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1", engine=engine))
        runtime.start("--threads", "2")
        x = np.random.default_rng(1).random((3, 8, 8, 3), np.float32)
        status, answer = runtime.infer(x)
        assert status == 200
        np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (3, -1)), artifacts.truth(1, x), atol=1e-3)
        with Load(runtime) as load:
            load.seen("1")
        assert (load.failed, load.wrong) == ([], 0)
        assert runtime.version("1").unconfined == ()
        if engine == "iree":
            assert runtime.version("1").providers == ("local-task",)


def test_weights_of_an_openvino_model_are_held_once_while_it_is_loaded(tmp_path: Path) -> None:
    """Twice would decide which boards can load it at all."""
    ballast_bytes = 200 << 20
    with zipfile.ZipFile(io.BytesIO(artifacts.openvino_model(1))) as archive:
        xml, weights = archive.read("model.xml"), archive.read("model.bin")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model.xml", xml)
        archive.writestr("model.bin", weights + np.random.default_rng(0).bytes(ballast_bytes))
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1", engine="openvino", content=stream.getvalue()))
        runtime.start()
        x = np.random.default_rng(1).random((1, 8, 8, 3), np.float32)
        status, answer = runtime.infer(x)
        assert status == 200
        np.testing.assert_allclose(answer["outputs"][0]["data"], artifacts.truth(1, x).ravel(), atol=1e-3)
        told = Path(f"/proc/{runtime.version('1').pid}/status").read_text()
        now, most = (int(re.search(rf"^{key}:\s+(\d+) kB", told, re.M)[1]) << 10 for key in ("VmRSS", "VmHWM"))
        assert now > ballast_bytes
        assert most < now + ballast_bytes // 4


WEIGHTS = np.random.default_rng(0).random((3, 2)).astype(np.float32)
PAIR: dict[str, Any] = {
    "inputs": (TensorSpec("left", "FP32", (-1, 3)), TensorSpec("right", "FP32", (-1, 2))),
    "outputs": (TensorSpec("difference", "FP32", (-1, 2)), TensorSpec("total", "FP32", (-1, 2))),
    "statistics": None,
}


def pair() -> onnx.ModelProto:
    """A network of two inputs and two outputs that are not to be mistaken for each other, for one sample at a time."""

    def value(name: str, size: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])

    nodes = [
        helper.make_node("MatMul", ["left", "weights"], ["product"]),
        helper.make_node("Sub", ["product", "right"], ["difference"]),
        helper.make_node("Add", ["product", "right"], ["total"]),
    ]
    graph = helper.make_graph(
        nodes, "pair", [value("left", 3), value("right", 2)], [value("difference", 2), value("total", 2)],
        [numpy_helper.from_array(WEIGHTS, "weights")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=9)


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite"])
def test_several_inputs_and_outputs_are_told_apart_and_a_batch_that_is_none_is_its_clients_fault(
    tmp_path: Path, engine: str
) -> None:
    """Counted as the model's, it would have a good version taken back."""
    content = pair().SerializeToString() if engine == "onnxruntime" else bytes(convert(pair()).content)
    rng = np.random.default_rng(1)

    def ask(runtime: Runtime, left: np.ndarray, right: np.ndarray) -> tuple[int, Any]:
        inputs = [
            {"name": name, "datatype": "FP32", "shape": list(values.shape), "data": values.ravel().tolist()}
            for name, values in (("right", right), ("left", left))
        ]
        return runtime.ask("POST", "/v2/models/toy/infer", json.dumps({"inputs": inputs}).encode())

    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1", engine=engine, content=content, **PAIR))
        runtime.start()
        for count in (1, 3, 1):
            left, right = rng.random((count, 3)).astype(np.float32), rng.random((count, 2)).astype(np.float32)
            status, answer = ask(runtime, left, right)
            assert status == 200, answer
            found = {t["name"]: np.reshape(t["data"], t["shape"]) for t in answer["outputs"]}
            np.testing.assert_allclose(found["difference"], left @ WEIGHTS - right, atol=1e-4)
            np.testing.assert_allclose(found["total"], left @ WEIGHTS + right, atol=1e-4)
        status, answer = ask(runtime, np.zeros((3, 3), np.float32), np.zeros((2, 2), np.float32))
        assert (status, "one and the same first axis" in answer["error"]) == (400, True)
        assert runtime.version("1").failed == 0
        assert runtime.version("1").requests == 3
