"""Messages that are small on the line and large once they are taken apart: what they would become is found out before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from support import artifacts, control_group
from support.runtimes import Runtime, gateway, running
from tritonclient.grpc import service_pb2

SIZE = 28 << 20
X = np.random.default_rng(7).random((2, 8, 8, 3), np.float32)
INFER = "ModelInfer"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with running(tmp_path_factory.mktemp("board")) as made:
        made.install(made.add("1"))
        yield made.start()


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
