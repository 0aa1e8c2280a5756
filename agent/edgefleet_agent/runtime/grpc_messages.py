"""The gRPC face's messages: receives Triton's protobuf messages, hands on what the HTTP face takes, and its answers as messages. Pure.

Source: KServe Open Inference Protocol v2 (gRPC) and Triton's extensions of it, :file:`open_inference.proto`. Tensors pass as the bytes they
are. Refused with a reason: BYTES and BF16 tensors. Not handled here: connections (:mod:`grpc_gateway`), what lies in a region (:mod:`regions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from edgefleet_shared.malformed import MALFORMED
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from edgefleet_agent.runtime import grpc_wire, open_inference_pb2
from edgefleet_agent.runtime.json_data import MAX_PIECES
from edgefleet_agent.runtime.protocol import MAX_RANK, RegionUse, region_use
from edgefleet_agent.runtime.tensors import NUMPY, element_count

pb: Any = open_inference_pb2  # its messages are made from a descriptor when it is imported

# As google.rpc.Code has them.
CODES = {
    400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 413: "RESOURCE_EXHAUSTED", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE",
}  # fmt: skip
# Which field of InferTensorContents holds a datatype's values.
_CONTENTS = {
    "BOOL": "bool_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
}
_CONTENTS |= {f"INT{bits}": "int_contents" for bits in (8, 16, 32)} | {
    f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)
}

Bytes = bytes | bytearray
Read = Callable[[RegionUse], Bytes]
Write = Callable[[RegionUse, bytes], None]


class CallError(Exception):
    """A call that ends without an answer: its gRPC status and what is wrong."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def failed(status: int, body: bytes) -> CallError:
    """The HTTP face's refusal as the call's end."""
    try:
        message = str(msgspec.json.decode(body)["error"])
    except (*MALFORMED, KeyError, TypeError):
        message = f"the runtime answered with status {status}"
    return CallError(CODES.get(status, "INTERNAL"), message)


def parse_request(message: bytes, most_bytes: int) -> Any:
    """An infer request, once it is known to become no more than it is.

    Args:
        most_bytes: how many its typed values may take.

    Raises:
        CallError: it is none, or would become too much. DecodeError: it is none.
    """
    with _refused():
        grpc_wire.check_request(message, most_bytes)
    return pb.ModelInferRequest.FromString(message)


def parse_question(message: bytes, parse: Callable[[bytes], Any]) -> Any:
    """A message that has no tensors. Raises like :func:`parse_request`."""
    with _refused():
        grpc_wire.check_question(message)
    return parse(message)


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except grpc_wire.NotAMessage as exc:
        raise CallError("INTERNAL", f"not a message of this call: {exc}") from exc
    except grpc_wire.TooLarge as exc:
        raise CallError("RESOURCE_EXHAUSTED", str(exc)) from exc


def to_http(request: Any, read: Read, most_bytes: int) -> tuple[bytes, list[Bytes]]:
    """An infer request as the HTTP face takes it: its JSON header, and each input's bytes.

    Args:
        read: what lies in a region. May raise RequestError.
        most_bytes: how long it may be.

    Raises:
        CallError: raw and typed contents do not fit the inputs, or all are too large.
        RequestError: a region can't be read.
    """
    raw = list(request.raw_input_contents)
    uses = [region_use(f"input {t.name!r}", _parameters(t)) for t in request.inputs]
    given = sum(use is None for use in uses)
    if raw and len(raw) != given:
        raise CallError("INVALID_ARGUMENT", f"{len(raw)} raw contents for {given} inputs")
    _bounded(sum(map(len, raw)) + sum(use.size for use in uses if use is not None), most_bytes)
    inputs: list[dict[str, Any]] = []
    tensors: list[Bytes] = []
    left = iter(raw)
    for tensor, use in zip(request.inputs, uses, strict=True):
        if tensor.HasField("contents") and (raw or use is not None):
            raise CallError(
                "INVALID_ARGUMENT",
                f"input {tensor.name!r} has typed contents beside {'raw ones' if raw else 'a region'}",
            )
        if use is not None:
            tensors.append(read(use))
        else:
            tensors.append(next(left) if raw else _typed(tensor))
        inputs.append(
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(tensors[-1])},
            }
        )
    header: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    if request.id:
        header["id"] = request.id
    if request.outputs:
        header["outputs"] = [
            {
                "name": output.name,
                "parameters": {k: v for k, v in _parameters(output).items() if not k.startswith("shared_memory_")}
                | {"binary_data": True},
            }
            for output in request.outputs
        ]
    encoded = msgspec.json.encode(header)
    _bounded(len(encoded) + sum(map(len, tensors)), most_bytes)
    return encoded, tensors


def _bounded(body_bytes: int, most_bytes: int) -> None:
    if body_bytes > most_bytes:
        raise CallError("RESOURCE_EXHAUSTED", f"the request has {body_bytes} bytes, {most_bytes} are allowed")


def wanted_regions(request: Any) -> dict[str, RegionUse]:
    """Where the client wants outputs put, by name. Raises RequestError."""
    uses = {output.name: region_use(f"output {output.name!r}", _parameters(output)) for output in request.outputs}
    return {name: use for name, use in uses.items() if use is not None}


def _parameters(tensor: Any) -> dict[str, Any]:
    return {key: _value(value) for key, value in tensor.parameters.items()}


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None


def _typed(tensor: Any) -> bytes:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise CallError("INVALID_ARGUMENT", f"input {tensor.name!r}: {tensor.datatype!r} has no typed contents here")
    given = getattr(tensor.contents, field)
    # Each value becomes an object on its way: how many there are is looked at first.
    if len(given) != element_count(tensor.shape):
        raise CallError(
            "INVALID_ARGUMENT",
            f"input {tensor.name!r}: {len(given)} values do not fill shape {list(tensor.shape[: MAX_RANK + 1])}",
        )
    if len(given) > MAX_PIECES:
        raise CallError(
            "INVALID_ARGUMENT", f"input {tensor.name!r}: more than {MAX_PIECES} typed values; send raw contents"
        )
    dtype = NUMPY[tensor.datatype]
    # Left to itself, numpy takes small numbers beside ones above half of 64 bits' range for fractions.
    values = np.array(given, {"i": np.int64, "u": np.uint64}.get(dtype.kind))
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise CallError("INVALID_ARGUMENT", f"input {tensor.name!r}: a value does not fit {tensor.datatype}")
    return values.astype(dtype).tobytes()


def to_grpc(header: bytes, tensors: bytes, regions: dict[str, RegionUse], write: Write) -> Message:
    """The HTTP face's answer as the message.

    Args:
        regions: where outputs go that the client wants in regions; of these only the place is told, as Triton does.
        write: puts one there. May raise RequestError.
    """
    answer = msgspec.json.decode(header)
    message = pb.ModelInferResponse(
        model_name=answer["model_name"], model_version=answer["model_version"], id=answer.get("id", "")
    )
    at = 0
    for output in answer["outputs"]:
        entry = message.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        size = output["parameters"]["binary_data_size"]
        content = tensors[at : at + size]
        at += size
        use = regions.get(output["name"])
        if use is not None:
            write(use, content)
            content = b""  # a place in the list there is for each output
            entry.parameters["shared_memory_region"].string_param = use.name
            entry.parameters["shared_memory_offset"].int64_param = use.offset
            entry.parameters["shared_memory_byte_size"].int64_param = size
        message.raw_output_contents.append(content)
    return message


def described(found: object, kind: type[Any]) -> Message:
    """What the HTTP face says as JSON as a message of ``kind``, as much of it as that has."""
    message: Message = ParseDict(found, kind(), ignore_unknown_fields=True)
    return message
