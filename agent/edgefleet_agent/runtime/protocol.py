"""The Open Inference Protocol's infer message: receives an HTTP body, hands on tensors; and back. Pure.

Source: KServe Open Inference Protocol v2 (HTTP/REST) and Triton's binary tensor data extension: the body is a JSON header of
``Inference-Header-Content-Length`` bytes, then each binary tensor in the header's order, little-endian, no padding.

Not handled here: sockets (:mod:`http`), which version answers (:mod:`switchboard`). Refused with a reason: BYTES and BF16
tensors, shared memory regions, Triton's classification extension.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec

from edgefleet_agent.runtime.tensors import NUMPY, element_count

MAX_TENSORS = 256
MAX_RANK = 16
MAX_ID_CHARACTERS = 1024


class RequestError(Exception):
    """A request that can't be answered; ``status`` is the HTTP status, the message goes to the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class InputTensor:
    """One tensor of a request: little-endian bytes of ``datatype`` in row-major order."""

    __slots__ = ("data", "datatype", "name", "shape")

    def __init__(self, name: str, datatype: str, shape: tuple[int, ...], data: bytes | memoryview) -> None:
        self.name, self.datatype, self.shape, self.data = name, datatype, shape, data


class OutputTensor:
    """One tensor of an answer, like :class:`InputTensor`."""

    __slots__ = ("data", "datatype", "name", "shape")

    def __init__(self, name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> None:
        self.name, self.datatype, self.shape, self.data = name, datatype, shape, data


class InferRequest:
    """A parsed request. ``outputs`` maps each wanted output to whether it is wanted in binary; None means all of them, each
    as ``binary`` says."""

    __slots__ = ("binary", "id", "inputs", "outputs")

    def __init__(self, id: str, inputs: list[InputTensor], outputs: dict[str, bool] | None, binary: bool) -> None:
        self.id, self.inputs, self.outputs, self.binary = id, inputs, outputs, binary


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw(b"")


class _Wanted(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Header(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Wanted] = []


class _Output(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] = {}
    data: list[Any] | None = None


class _Answer(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_Output]
    id: str = ""


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_data = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def parse_infer(body: bytes, header_length: str | None) -> InferRequest:
    """Parse an infer request.

    Args:
        body: the whole HTTP body, decompressed.
        header_length: the value of ``Inference-Header-Content-Length``, None when the header is absent.

    Raises:
        RequestError: 400, with what is wrong.
    """
    view = memoryview(body)
    length = len(view)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
            raise RequestError(400, f"Inference-Header-Content-Length is not a length: {header_length[:40]!r}")
        length = int(header_length)
        if length > len(view):
            raise RequestError(
                400, f"Inference-Header-Content-Length is {length}, but the body has only {len(view)} bytes"
            )
    try:
        header = _decode_header(view[:length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RequestError(400, f"the request is not an inference request: {exc}") from exc
    if not header.inputs or len(header.inputs) > MAX_TENSORS or len(header.outputs) > MAX_TENSORS:
        raise RequestError(400, f"a request has 1 to {MAX_TENSORS} inputs and at most {MAX_TENSORS} outputs")
    if len(header.id) > MAX_ID_CHARACTERS:
        raise RequestError(400, f"the id is longer than {MAX_ID_CHARACTERS} characters")
    inputs, offset = [], length
    for entry in header.inputs:
        tensor, offset = _input(entry, view, offset)
        inputs.append(tensor)
    if offset != len(view):
        raise RequestError(400, f"{len(view) - offset} bytes follow the last binary tensor")
    if len({tensor.name for tensor in inputs}) != len(inputs):
        raise RequestError(400, "an input is given twice")
    binary = _flag(header.parameters, "binary_data_output", False)
    wanted = None
    if header.outputs:
        wanted = {}
        for output in header.outputs:
            if output.name in wanted:
                raise RequestError(400, f"output {output.name!r} is asked for twice")
            for unsupported in ("classification", "shared_memory_region"):
                if output.parameters.get(unsupported):
                    raise RequestError(400, f"output {output.name!r}: {unsupported} is not supported by this server")
            wanted[output.name] = _flag(output.parameters, "binary_data", binary)
    return InferRequest(header.id, inputs, wanted, binary)


def _input(entry: _Input, body: memoryview, offset: int) -> tuple[InputTensor, int]:
    """One input and where the next binary tensor starts."""
    name = entry.name
    dtype = NUMPY.get(entry.datatype)
    if dtype is None:
        raise RequestError(400, f"input {name!r}: datatype {entry.datatype!r} is not served; one of {', '.join(NUMPY)}")
    if len(entry.shape) > MAX_RANK or any(n < 0 or n > 1 << 40 for n in entry.shape):
        raise RequestError(400, f"input {name!r}: not a shape: {entry.shape[: MAX_RANK + 1]}")
    expected = element_count(entry.shape) * dtype.itemsize
    shape = tuple(entry.shape)
    if entry.parameters.get("shared_memory_region"):
        raise RequestError(400, f"input {name!r}: shared memory is not supported by this server")
    size = entry.parameters.get("binary_data_size")
    if size is None:
        return InputTensor(name, entry.datatype, shape, _from_json(entry, dtype, expected)), offset
    if len(entry.data):
        raise RequestError(400, f"input {name!r} has data both in JSON and in binary")
    if type(size) is not int or size != expected:
        raise RequestError(
            400, f"input {name!r}: binary_data_size is {size!r}, {entry.datatype} {list(shape)} has {expected} bytes"
        )
    if offset + size > len(body):
        raise RequestError(400, f"input {name!r}: the body ends {offset + size - len(body)} bytes too early")
    return InputTensor(name, entry.datatype, shape, body[offset : offset + size]), offset + size


def _from_json(entry: _Input, dtype: np.dtype[Any], expected: int) -> bytes:
    """The tensor of a JSON ``data`` field, nested or flat."""
    name = entry.name
    if not len(entry.data):
        raise RequestError(400, f"input {name!r} has no data")
    try:
        values = np.asarray(_decode_data(entry.data))
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as exc:
        raise RequestError(400, f"input {name!r}: data is no rectangular list of numbers: {exc}") from exc
    if values.size == 0 and expected == 0:
        return b""
    if values.ndim > 1 and values.shape != tuple(entry.shape):
        raise RequestError(400, f"input {name!r}: nested data has shape {list(values.shape)}, not {entry.shape}")
    if values.size * dtype.itemsize != expected:
        raise RequestError(400, f"input {name!r}: {values.size} values do not fill shape {entry.shape}")
    allowed = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    if values.dtype.kind not in allowed:
        raise RequestError(400, f"input {name!r}: data are not {entry.datatype} values")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise RequestError(400, f"input {name!r}: a value does not fit {entry.datatype}")
    with np.errstate(over="ignore"):
        return values.astype(dtype).tobytes()


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise RequestError(400, f"parameter {name} must be true or false")
    return value


def plan(request: InferRequest, config: ModelConfig) -> list[InputTensor]:
    """The request's inputs in the order of ``config.inputs``, checked against what that model serves.

    Raises:
        RequestError: 400, an input or output that the model does not have, or another datatype or shape.
    """
    given = {tensor.name: tensor for tensor in request.inputs}
    ordered = []
    for spec in config.inputs:
        tensor = given.pop(spec.name, None)
        if tensor is None:
            raise RequestError(400, f"input {spec.name!r} is missing; {_signature(config)}")
        if tensor.datatype != spec.datatype:
            raise RequestError(400, f"input {spec.name!r} is {tensor.datatype}; {_signature(config)}")
        if len(tensor.shape) != len(spec.shape) or not all(
            n == m if m >= 0 else n > 0 for n, m in zip(tensor.shape, spec.shape, strict=True)
        ):
            raise RequestError(400, f"input {spec.name!r} has shape {list(tensor.shape)}; {_signature(config)}")
        ordered.append(tensor)
    if given:
        raise RequestError(400, f"no input is called {next(iter(given))!r}; {_signature(config)}")
    if request.outputs is not None:
        known = {spec.name for spec in config.outputs}
        for name in request.outputs:
            if name not in known:
                raise RequestError(400, f"no output is called {name!r}; {_signature(config)}")
    return ordered


def _signature(config: ModelConfig) -> str:
    def show(specs: tuple[TensorSpec, ...]) -> str:
        return ", ".join(f"{s.name} {s.datatype} {list(s.shape)}" for s in specs)

    return f"{config.model} {config.version} takes {show(config.inputs)} and gives {show(config.outputs)}"


def encode_answer(
    request: InferRequest, model: str, version: str, outputs: list[OutputTensor]
) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON header when binary tensors follow it (else None).

    Args:
        model, version: of the worker that really computed it.
        outputs: every output of the model.
    """
    entries, blobs = [], []
    for tensor in outputs:
        if request.outputs is None:
            binary = request.binary
        elif tensor.name in request.outputs:
            binary = request.outputs[tensor.name]
        else:
            continue
        if binary:
            entries.append(_Output(tensor.name, tensor.datatype, tensor.shape, {"binary_data_size": len(tensor.data)}))
            blobs.append(tensor.data)
        else:
            values = np.frombuffer(tensor.data, NUMPY[tensor.datatype]).tolist()
            entries.append(_Output(tensor.name, tensor.datatype, tensor.shape, {}, values))
    header = _encode(_Answer(model, version, entries, request.id))
    if not blobs:
        return header, None
    return b"".join((header, *blobs)), len(header)


def error_body(message: str) -> bytes:
    """The protocol's error object."""
    return _encode({"error": message})


def model_metadata(config: ModelConfig, versions: list[str]) -> bytes:
    """The protocol's model metadata response."""

    def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": s.shape} for s in specs]

    return _encode(
        {
            "name": config.model,
            "versions": versions,
            "platform": f"{config.engine}_{config.precision}",
            "inputs": tensors(config.inputs),
            "outputs": tensors(config.outputs),
        }
    )
