"""Messages that are small on the line and large once they are taken apart: what they would become is found out before."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from edgefleet_shared.contract import TensorSpec
from support import artifacts, control_group
from support.runtimes import Runtime, gateway, running, until
from tritonclient.grpc import service_pb2

SIZE = 28 << 20
X = np.random.default_rng(7).random((2, 8, 8, 3), np.float32)
INFER = "ModelInfer"

WIDTH = 1_000_000  # values of an answer to what is small


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with running(tmp_path_factory.mktemp("board")) as made:
        made.install(made.add("1"))
        made.start()
        made.client.load(
            made.add(
                "2", model="wide", content=artifacts.wide_model(WIDTH), statistics=None,
                inputs=(TensorSpec("x", "FP32", (-1, 4)),), outputs=(TensorSpec("y", "FP32", (-1, WIDTH)),),
            )
        )  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def address(runtime: Runtime) -> Iterator[str]:
    """Of a gateway on a board with little memory."""
    with control_group.made() as group, gateway(runtime, preexec_fn=group.join) as (found, process):
        yield found
        assert process.poll() is None


def field(number: int, content: bytes) -> bytes:
    """A field of protobuf that has a length."""
    length, left = b"", len(content)
    while left > 127:
        length, left = length + bytes([left & 127 | 128]), left >> 7
    return bytes([number << 3 | 2]) + length + bytes([left]) + content


def an_input(*more: bytes) -> bytes:
    return field(5, field(1, b"x") + field(2, b"INT64") + b"".join(more))


def entries() -> bytes:
    return b"".join(field(4, field(1, b"%06d" % n)) for n in range(SIZE // 10))


# Call, what is sent, which words say what is wrong with it.
LARGE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "inputs": (INFER, lambda: field(5, b"") * (SIZE // 2), "parts"),
    "outputs": (INFER, lambda: field(6, b"") * (SIZE // 2), "parts"),
    "raw contents": (INFER, lambda: field(7, b"") * (SIZE // 2), "parts"),
    "fields that nobody knows": (INFER, lambda: b"\x78\x00" * (SIZE // 2), "parts"),
    "parameters": (INFER, entries, "parts"),
    "parameters of an input": (INFER, lambda: an_input(entries()), "parts"),
    "a shape": (INFER, lambda: an_input(field(3, bytes(SIZE))), "beside its contents"),
    "a name": (INFER, lambda: field(1, b"n" * SIZE), "beside its contents"),
    "typed values of 8 bytes in one": (INFER, lambda: an_input(field(5, field(3, bytes(SIZE)))), "send raw contents"),
    "texts": (INFER, lambda: an_input(field(5, field(8, b"") * (SIZE // 2))), "parts"),
    "a group in a group in a group": (INFER, lambda: b"\x7b" * SIZE, "not a message of this call"),
    "what ends in the middle": (INFER, lambda: field(5, bytes(SIZE))[:-1], "not a message of this call"),
    "a question that is no question": ("ServerLive", lambda: b"\x78\x00" * (SIZE // 2), "are allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_what_would_become_many_times_its_size_is_refused_as_it_came(address: str, case: str) -> None:
    name, make, words = LARGE[case]
    with grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError) as told:
            channel.unary_unary(f"/inference.GRPCInferenceService/{name}")(make(), timeout=20)
        assert words in str(told.value.details()), told.value
        made = service_pb2.ModelInferRequest(model_name="toy")
        made.inputs.add(name="x", datatype="FP32", shape=list(X.shape)).contents.fp32_contents.extend(X.ravel())
        infer = channel.unary_unary(f"/inference.GRPCInferenceService/{INFER}")
        answer = service_pb2.ModelInferResponse.FromString(infer(made.SerializeToString(), timeout=20))
        values = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(X), -1)
        np.testing.assert_allclose(values, artifacts.truth(1, X), atol=1e-4)


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def greeting(window_bytes: int) -> bytes:
    """How HTTP/2 begins, of a client that takes so many bytes of each answer."""
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, struct.pack(">HI", 4, window_bytes))


def wide_call(stream: int) -> bytes:
    """A call on a stream of a connection of HTTP/2 that is answered with 4 MB."""
    fields = {
        b":method": b"POST", b":scheme": b"http", b":path": b"/inference.GRPCInferenceService/ModelInfer",
        b":authority": b"board", b"te": b"trailers", b"content-type": b"application/grpc",
    }  # fmt: skip
    head = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields.items())
    made = service_pb2.ModelInferRequest(model_name="wide")
    made.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    made.raw_input_contents.append(bytes(16))
    message = made.SerializeToString()
    return frame(1, 4, stream, head) + frame(0, 1, stream, struct.pack(">BI", 0, len(message)) + message)


def test_answers_that_nobody_reads_leave_memory_for_those_of_others(runtime: Runtime) -> None:
    with (
        control_group.made() as group,
        gateway(runtime, preexec_fn=group.join) as (found, process),
    ):
        host, _, port = found.rpartition(":")
        links = [socket.create_connection((host, int(port))) for _ in range(2)]
        for link in links:
            link.sendall(greeting(0) + b"".join(wide_call(stream) for stream in range(1, 120, 2)))
        until(lambda: asked(runtime) >= 120 or process.poll() is not None, 60, "all of them being computed")
        assert process.poll() is None
        with grpc.insecure_channel(found, [("grpc.max_receive_message_length", -1)]) as channel:
            made = service_pb2.ModelInferRequest(model_name="wide")
            made.inputs.add(name="x", datatype="FP32", shape=[1, 4])
            made.raw_input_contents.append(bytes(16))
            infer = channel.unary_unary(f"/inference.GRPCInferenceService/{INFER}")
            until(lambda: taken(infer, made.SerializeToString()) > 4 * WIDTH, what="who reads being answered")
        for link in links:
            link.close()
        until(lambda: resident_mib(process.pid) < 120, what="the memory being given back")


def taken(infer: grpc.UnaryUnaryMultiCallable, message: bytes) -> int:
    """How many bytes the answer has; none where there is no room for it."""
    try:
        return len(infer(message, timeout=20))
    except grpc.RpcError as exc:
        if exc.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return 0


def asked(runtime: Runtime) -> int:
    """How many inferences of the wide model were asked for."""
    for line in runtime.get("/metrics")[1].decode().splitlines():
        if line.startswith('edgefleet_runtime_requests_total{model="wide"'):
            return int(line.split()[-1])
    return 0


def resident_mib(pid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) >> 10
