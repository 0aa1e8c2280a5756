"""What a gRPC message would become is counted in its bytes."""

from __future__ import annotations

import pytest
from edgefleet_agent.runtime import grpc_wire
from edgefleet_agent.runtime.grpc_messages import pb
from edgefleet_agent.runtime.protocol import MAX_TENSORS

MOST_BYTES = 1 << 20


def request() -> bytes:
    """Of as many tensors as one may have, each with all that a client sends."""
    made = pb.ModelInferRequest(model_name="toy", model_version="1", id="an id")
    made.parameters["priority"].int64_param = 1
    for number in range(MAX_TENSORS):
        given = made.inputs.add(name=f"x{number}", datatype="INT64", shape=[1, 2])
        given.parameters["shared_memory_offset"].int64_param = 0
        given.contents.int64_contents.extend([-1, number])
        made.outputs.add(name=f"y{number}").parameters["binary_data"].bool_param = True
        made.raw_input_contents.append(bytes(10_000))
    content: bytes = made.SerializeToString()
    return content


def test_the_largest_request_that_is_meant_may_be_parsed() -> None:
    grpc_wire.check_request(request(), MOST_BYTES)


def test_typed_values_count_as_what_they_become() -> None:
    made = pb.ModelInferRequest()
    made.inputs.add().contents.int64_contents.extend([0] * (MOST_BYTES // 8))
    grpc_wire.check_request(made.SerializeToString(), MOST_BYTES)
    made.inputs[0].contents.int64_contents.append(-1)  # ten bytes on the line
    with pytest.raises(grpc_wire.TooLarge, match=f"{MOST_BYTES + 8} bytes"):
        grpc_wire.check_request(made.SerializeToString(), MOST_BYTES)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"\x2b\x2c", "kind 3"),
        (b"\x2e", "kind 6"),
        (b"\x02\x00", "number 0"),
        (b"\x2a\x02\x00", "in the middle"),
        (b"\x2d\x00\x00\x00", "in the middle"),
        (b"\x2a", "without end"),
        (b"\x78" + b"\xff" * 11, "without end"),
        (b"\x2a\x02\x2a\x05", "in the middle"),
    ],
)
def test_what_is_no_message_is_not_parsed(message: bytes, why: str) -> None:
    with pytest.raises(grpc_wire.NotAMessage, match=why):
        grpc_wire.check_request(message, MOST_BYTES)
