"""The gRPC face: Triton's own gRPC client unchanged against the real gateway and the real runtime."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from edgefleet_shared.contract import TensorSpec
from onnx import TensorProto
from support import artifacts
from support.runtimes import Runtime, running, until
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

X = np.random.default_rng(7).random((2, 8, 8, 3), np.float32)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with running(tmp_path_factory.mktemp("board")) as made:
        made.install(made.add("1"))
        yield made.start()


@pytest.fixture(scope="module")
def address(runtime: Runtime) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgefleet_agent.runtime.grpc_gateway", "--state", str(runtime.state), "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    yield process.stdout.readline().removeprefix("listening at ").strip()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(address)
    yield made
    made.close()


def tensor(x: np.ndarray = X) -> triton.InferInput:
    made = triton.InferInput("x", list(x.shape), "FP32")
    made.set_data_from_numpy(x)
    return made


def test_tritonclient_finds_the_server_live_ready_and_described(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("toy")
    assert client.is_model_ready("toy", "1")
    assert not client.is_model_ready("toy", "9")
    assert client.get_server_metadata().name == "edgefleet-runtime"
    metadata = client.get_model_metadata("toy")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("toy", ["1"], "onnxruntime_fp32")
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [("x", "FP32", [-1, 8, 8, 3])]


def health(channel: grpc.Channel, service: bytes) -> bytes:
    """What is asked and answered by grpc.health.v1: field 1, the service's name; field 1, 1 for serving and 2 for not."""
    return channel.unary_unary("/grpc.health.v1.Health/Check")(b"\n%c%b" % (len(service), service), timeout=20)


@pytest.mark.parametrize("service", [b"", b"inference.GRPCInferenceService", b"grpc.health.v1.Health"])
def test_a_probe_of_kubernetes_finds_it_serving(address: str, service: bytes) -> None:
    with grpc.insecure_channel(address) as channel:
        assert health(channel, service) == b"\x08\x01"


def test_a_probe_asks_for_a_service_that_is_not_here_or_for_a_stream_and_is_told_so(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as told:
            health(channel, b"another.Service")
        assert told.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as told:
            next(channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=20))
        assert told.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "streams" in told.value.details()


def test_it_can_listen_on_a_unix_socket_and_says_so(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgefleet_agent.runtime.grpc_gateway", "--state", str(runtime.state), "--listen", f"unix:{path}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"listening at unix:{path}"
        client = triton.InferenceServerClient(f"unix:{path}")
        np.testing.assert_allclose(client.infer("toy", [tensor()]).as_numpy("y"), artifacts.truth(1, X), atol=1e-4)
        client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_tritonclient_infers_with_and_without_a_version_and_asynchronously(
    client: triton.InferenceServerClient,
) -> None:
    for options in ({}, {"model_version": "1"}, {"request_id": "r-1"}, {"outputs": [triton.InferRequestedOutput("y")]}):
        result = client.infer("toy", [tensor()], **options)
        np.testing.assert_allclose(result.as_numpy("y"), artifacts.truth(1, X), atol=1e-4)
        assert result.get_response().model_version == "1"
        assert result.get_response().id == options.get("request_id", "")
    answers: queue.Queue[Any] = queue.Queue()
    for _ in range(20):
        client.async_infer("toy", [tensor()], callback=lambda result, error: answers.put((result, error)))
    for _ in range(20):
        result, error = answers.get(timeout=30)
        assert error is None
        np.testing.assert_allclose(result.as_numpy("y"), artifacts.truth(1, X), atol=1e-4)


def test_tritonclient_is_told_what_it_did_wrong(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="not served here") as caught:
        client.infer("other", [tensor()])
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="has shape") as caught:
        client.infer("toy", [tensor(np.zeros((1, 4, 4, 3), np.float32))])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="one request may have"):
        client.infer("toy", [tensor(np.zeros((4000, 8, 8, 3), np.float32))])
    shared = triton.InferInput("x", list(X.shape), "FP32")
    shared.set_shared_memory("somebody's", X.nbytes)
    with pytest.raises(InferenceServerException, match="is registered by this user") as caught:
        client.infer("toy", [shared])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def call(address: str, request: Any) -> Any:
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            service_pb2.ModelInferResponse.FromString,
        )  # fmt: skip
        return infer(request, timeout=30)


def request(x: np.ndarray = X, raw: int = 0, typed: bool = True, model: str = "toy") -> Any:
    made = service_pb2.ModelInferRequest(model_name=model)
    entry = made.inputs.add(name="x", datatype="FP32", shape=list(x.shape))
    if typed:
        entry.contents.fp32_contents.extend(x.ravel().tolist())
    made.raw_input_contents.extend([x.tobytes()] * raw)
    return made


def test_typed_contents_are_the_same_tensor_as_raw_ones(address: str) -> None:
    for made in (request(), request(raw=1, typed=False)):
        answer = call(address, made)
        values = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(X), -1)
        np.testing.assert_allclose(values, artifacts.truth(1, X), atol=1e-4)


def test_typed_whole_numbers_of_both_halves_of_their_range_come_through(address: str, runtime: Runtime) -> None:
    values = [0, (1 << 63) + 1, (1 << 64) - 1]
    echo: dict[str, Any] = {
        "model": "counts", "content": artifacts.echo_model(TensorProto.UINT64, 3), "statistics": None,
        "inputs": (TensorSpec("x", "UINT64", (-1, 3)),), "outputs": (TensorSpec("y", "UINT64", (-1, 3)),),
    }  # fmt: skip
    runtime.client.load(runtime.add("2", **echo))
    made = service_pb2.ModelInferRequest(model_name="counts")
    made.inputs.add(name="x", datatype="UINT64", shape=[1, 3]).contents.uint64_contents.extend(values)
    assert np.frombuffer(call(address, made).raw_output_contents[0], np.uint64).tolist() == values


def unknown_datatype() -> Any:
    made = request(raw=1, typed=False)
    made.inputs[0].datatype = "FP31"
    return made


def value_too_large() -> Any:
    made = service_pb2.ModelInferRequest(model_name="toy")
    made.inputs.add(name="x", datatype="UINT8", shape=[1]).contents.uint_contents.append(256)
    return made


def unserved_contents() -> Any:
    made = service_pb2.ModelInferRequest(model_name="toy")
    made.inputs.add(name="x", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
    return made


HOSTILE = {
    "no input": (lambda: service_pb2.ModelInferRequest(model_name="toy"), "INVALID_ARGUMENT"),
    "no model": (lambda: request(model=""), "NOT_FOUND"),
    "a model outside": (lambda: request(model="../../../metrics"), "NOT_FOUND"),
    "a model whose name has no end": (lambda: request(model="a" * 10_000), "NOT_FOUND"),
    "raw and typed": (lambda: request(raw=1), "INVALID_ARGUMENT"),
    "more contents than inputs": (lambda: request(raw=2, typed=False), "INVALID_ARGUMENT"),
    "no contents": (lambda: request(typed=False), "INVALID_ARGUMENT"),
    "an unknown datatype": (unknown_datatype, "INVALID_ARGUMENT"),
    "contents nobody serves": (unserved_contents, "INVALID_ARGUMENT"),
    "a value that does not fit": (value_too_large, "INVALID_ARGUMENT"),
    "no protobuf": (lambda: b"\xff" * 100, "INTERNAL"),
    "a request of 65 MiB": (lambda: request(np.zeros((65 << 20) // 768 * 192, np.float32), raw=1, typed=False), "RESOURCE_EXHAUSTED"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_call_is_refused_and_the_next_one_answered(address: str, case: str) -> None:
    make, code = HOSTILE[case]
    with pytest.raises(grpc.RpcError) as caught:
        call(address, make())
    assert caught.value.code().name == code, caught.value.details()
    assert len(call(address, request()).raw_output_contents) == 1


@pytest.mark.parametrize(("shape", "why"), [([1, 8, 8, 3], "do not fill"), ([5_000_000], "send raw contents")])
def test_typed_contents_without_measure_are_not_made_a_tensor_of(address: str, shape: list[int], why: str) -> None:
    """A byte each on the wire, an object each in the gateway."""
    made = service_pb2.ModelInferRequest(model_name="toy")
    made.inputs.add(name="x", datatype="UINT8", shape=shape).contents.uint_contents.extend([0] * 5_000_000)
    with pytest.raises(grpc.RpcError) as caught:
        call(address, made)
    assert why in str(caught.value.details())
    assert len(call(address, request()).raw_output_contents) == 1


def test_a_runtime_that_was_started_again_is_found_again(
    client: triton.InferenceServerClient, runtime: Runtime, address: str
) -> None:
    client.infer("toy", [tensor()])
    runtime.stop(signal.SIGKILL)
    with pytest.raises(InferenceServerException, match="does not answer"):
        client.infer("toy", [tensor()])
    with grpc.insecure_channel(address) as channel:
        assert health(channel, b"") == b"\x08\x02"
    runtime.start()
    until(client.is_server_ready, what="the runtime being ready again")
    np.testing.assert_allclose(client.infer("toy", [tensor()]).as_numpy("y"), artifacts.truth(1, X), atol=1e-4)


def test_an_address_that_others_could_reach_is_refused(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "edgefleet_agent.runtime.grpc_gateway",
        "--state",
        str(tmp_path),
        "--listen",
        "0.0.0.0:0",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "not loopback" in ended.stderr
