"""The Open Inference Protocol's infer request: receives an HTTP body, hands on tensors that a model takes. Pure.

Source: KServe Open Inference Protocol v2 (HTTP/REST), Triton's binary tensor data and system shared memory extensions: the body is
a JSON header of ``Inference-Header-Content-Length`` bytes, then each binary tensor in the header's order, little-endian, no padding.
Clients send the same header again and again, so a header is understood once: what it says is a :class:`Form`, kept by its bytes.

Not handled here: sockets (:mod:`http`), which version answers (:mod:`switchboard`), the answer (:mod:`answer`), what lies in a shared
memory region (:mod:`regions`). Refused with a reason: BYTES and BF16 tensors, Triton's classification extension.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent.runtime import json_data
from edgefleet_agent.runtime.tensors import NUMPY, element_count

MAX_TENSORS = 256
MAX_OBJECTS = 64 * MAX_TENSORS  # of a header; each input is made before anybody can count them
MAX_RANK = 16
MAX_ID_CHARACTERS = 1024
MAX_PART_BYTES = (
    256 * 1024
)  # of a shape, of parameters, of the outputs: they are parsed, and take many times that for a moment
KEPT_FORMS, MAX_KEPT_BYTES = 64, 4096

_PartT = TypeVar("_PartT")


class RequestError(Exception):
    """A request that can't be answered; ``status`` is the HTTP status, the message goes to the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class RegionUse(msgspec.Struct, frozen=True):
    """``size`` bytes from ``offset`` of the shared memory region that the client registered as ``name``."""

    name: str
    offset: int
    size: int


# Bytes, or what puts them into memory of their size and may raise RequestError.
Data = bytes | memoryview | Callable[[memoryview], None]


class InputTensor:
    """One tensor of a request: little-endian bytes of ``datatype`` in row-major order.

    ``data`` are its ``size`` bytes; they begin ``start`` bytes behind the header, or came as JSON (then ``start`` is -1). Of a tensor in
    a ``region`` it is what fills memory of that size from there.
    """

    __slots__ = ("data", "datatype", "name", "region", "shape", "size", "start")

    def __init__(
        self, name: str, datatype: str, shape: tuple[int, ...], data: Data, size: int, start: int = -1,
        region: RegionUse | None = None,
    ) -> None:  # fmt: skip
        self.name, self.datatype, self.shape = name, datatype, shape
        self.data, self.size, self.start, self.region = data, size, start, region


class OutputTensor(msgspec.Struct):
    """One tensor of an answer, like :class:`InputTensor`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class Wanted(msgspec.Struct, frozen=True):
    """How the client wants an output: in binary or as JSON, or put into a region."""

    binary: bool
    region: RegionUse | None = None


class Form:
    """What a header says, whatever the tensors hold.

    ``inputs`` have no data yet unless it was JSON; ``binary_bytes`` follow the header, and all inputs are there if ``all_binary``. ``outputs`` maps each wanted output to how;
    None means all of them, each as ``binary`` says. ``fits``, ``order`` and ``placed`` (where in what follows the header each input
    of the config begins, and its shape) remember which config the form was last held against, ``heads`` which answers it got, see
    :mod:`answer`.
    """

    __slots__ = (
        "all_binary",
        "binary",
        "binary_bytes",
        "fits",
        "heads",
        "id",
        "inputs",
        "order",
        "outputs",
        "placed",
        "uses_regions",
    )

    def __init__(self, id: str, inputs: list[InputTensor], binary_bytes: int, outputs: dict[str, Wanted] | None, binary: bool) -> None:  # fmt: skip
        self.id, self.inputs, self.binary_bytes = id, inputs, binary_bytes
        self.outputs, self.binary = outputs, binary
        self.all_binary = all(t.start >= 0 for t in inputs)
        self.uses_regions = any(t.region for t in inputs) or any(w.region for w in (outputs or {}).values())
        self.fits: ModelConfig | None = None
        self.order: list[int] = []
        self.placed: list[tuple[int, tuple[int, ...]]] = []
        self.heads: dict[tuple[str, str], KnownAnswer] = {}


class KnownAnswer(msgspec.Struct, frozen=True):
    """What an answer is like whatever its tensors hold: shape, datatype and name of all outputs, its JSON header, which outputs follow that."""

    outputs: list[tuple[tuple[int, ...], str, str]]
    header: bytes
    binary: list[int]


class InferRequest:
    """A parsed request: its form, and its tensors in the form's order.

    Args:
        binary: what follows the header, if the tensors are there.
        inputs: the tensors themselves, if they are elsewhere.
    """

    __slots__ = ("_binary", "_inputs", "form")

    def __init__(self, form: Form, binary: memoryview, inputs: list[InputTensor] | None = None) -> None:
        self.form, self._binary, self._inputs = form, binary, inputs

    @property
    def inputs(self) -> list[InputTensor]:
        """Made when they are asked for: a request whose body lies in a worker's slot already does without."""
        if self._inputs is None:
            self._inputs = [self._filled(tensor) for tensor in self.form.inputs]
        return self._inputs

    def _filled(self, tensor: InputTensor) -> InputTensor:
        if tensor.start < 0:
            return tensor
        data = self._binary[tensor.start : tensor.start + tensor.size]
        return InputTensor(tensor.name, tensor.datatype, tensor.shape, data, tensor.size, tensor.start)


# What could become many times its size is parsed only once it is known to be small, see :mod:`json_data`.
class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: msgspec.Raw
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    data: msgspec.Raw = msgspec.Raw(b"")


class _Wanted(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Parts(msgspec.Struct):
    outputs: msgspec.Raw = msgspec.Raw(b"[]")


class _Header(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    outputs: msgspec.Raw = msgspec.Raw(b"[]")


_decode_header = msgspec.json.Decoder(_Header).decode
_NULL = msgspec.Raw(b"null")  # clients that write all fields of their model write so what they leave out
_Shape, _Parameters, _Outputs = list[int], dict[str, Any], list[_Wanted]


def parse_infer(body: bytes | bytearray | memoryview, header_length: str | None) -> InferRequest:
    """Parse an infer request.

    Args:
        body: the whole HTTP body, decompressed.
        header_length: the value of ``Inference-Header-Content-Length``, None when the header is absent.

    Raises:
        RequestError: 400, with what is wrong.
    """
    view = memoryview(body)
    length = len(view) if header_length is None else _header_length(header_length, len(view))
    return _whole(parse_form(bytes(view[:length])), view[length:])


def is_long(body: bytes | bytearray | memoryview, header_length: str | None) -> bool:
    """Whether there may be so much JSON in a body that others should have their turn meanwhile."""
    length = len(body) if header_length is None else _header_length(header_length, len(body))
    return length > json_data.SMALL_BYTES


def parse_long_infer(
    body: bytes | bytearray | memoryview, header_length: str | None
) -> Generator[None, None, InferRequest]:
    """Like :func:`parse_infer`: lets others have their turn at each ``yield``."""
    view = memoryview(body)
    length = len(view) if header_length is None else _header_length(header_length, len(view))
    form = yield from _form_in_pieces(bytes(view[:length]))
    return _whole(form, view[length:])


def _whole(form: Form, binary: memoryview) -> InferRequest:
    """The request, once what follows its header is as long as that says."""
    rest = len(binary)
    if rest != form.binary_bytes:
        if rest > form.binary_bytes:
            raise RequestError(400, f"{rest - form.binary_bytes} bytes follow the last binary tensor")
        cut = next(t for t in form.inputs if t.start >= 0 and t.start + t.size > rest)
        raise RequestError(400, f"input {cut.name!r}: the body ends {cut.start + cut.size - rest} bytes too early")
    return InferRequest(form, binary)


def parse_form(header: bytes) -> Form:
    """What the JSON header of a request says. Raises like :func:`parse_infer`."""
    return _kept_form(header) if len(header) <= MAX_KEPT_BYTES else _form(header)


def _header_length(text: str, body_bytes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise RequestError(400, f"Inference-Header-Content-Length is not a length: {text[:40]!r}")
    length = int(text)
    if length > body_bytes:
        raise RequestError(
            400, f"Inference-Header-Content-Length is {length}, but the body has only {body_bytes} bytes"
        )
    return length


def _form(raw: bytes) -> Form:
    """Raises: RequestError."""
    steps = _form_in_pieces(raw)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            form: Form = end.value
            return form


def _form_in_pieces(raw: bytes) -> Generator[None, None, Form]:
    """Raises: RequestError."""
    try:
        header = _decode_header(raw) if raw.count(b"{") <= MAX_OBJECTS else _crowded(raw)
    except MALFORMED as exc:
        raise RequestError(400, f"the request is not an inference request: {exc}") from exc
    outputs = _small(header.outputs, _Outputs, "outputs")
    if not header.inputs or len(header.inputs) > MAX_TENSORS or len(outputs) > MAX_TENSORS:
        raise RequestError(400, f"a request has 1 to {MAX_TENSORS} inputs and at most {MAX_TENSORS} outputs")
    name = header.id or ""
    if len(name) > MAX_ID_CHARACTERS:
        raise RequestError(400, f"the id is longer than {MAX_ID_CHARACTERS} characters")
    inputs, offset = [], 0
    for entry in header.inputs:
        tensor = yield from _input(entry, offset)
        inputs.append(tensor)
        offset += tensor.size if tensor.start >= 0 else 0
    if len({tensor.name for tensor in inputs}) != len(inputs):
        raise RequestError(400, "an input is given twice")
    binary = _flag(_small(header.parameters, _Parameters, "parameters"), "binary_data_output", False)
    return Form(name, inputs, offset, _outputs(outputs, binary), binary)


def _crowded(raw: bytes) -> NoReturn:
    """Say what there is too much of in a header. Raises RequestError, msgspec.DecodeError."""
    _small(msgspec.json.decode(raw, type=_Parts).outputs, _Outputs, "outputs")
    raise RequestError(400, f"a request has 1 to {MAX_TENSORS} inputs, and no objects or texts among their data")


def _small(raw: msgspec.Raw, kind: type[_PartT], what: str) -> _PartT:
    """A part of the header, parsed.

    Raises:
        RequestError: 400, it is too large to be meant, or not what it should be.
    """
    if len(raw) > MAX_PART_BYTES:
        raise RequestError(400, f"{what} has {len(raw)} bytes, {MAX_PART_BYTES} are allowed")
    if raw == _NULL:
        return kind()
    try:
        return msgspec.json.decode(raw, type=kind)
    except MALFORMED as exc:
        raise RequestError(400, f"the request is not an inference request: {what}: {exc}") from exc


_kept_form = lru_cache(KEPT_FORMS)(_form)


def _outputs(entries: list[_Wanted], binary: bool) -> dict[str, Wanted] | None:
    wanted: dict[str, Wanted] = {}
    for entry in entries:
        if entry.name in wanted:
            raise RequestError(400, f"output {entry.name!r} is asked for twice")
        parameters = entry.parameters or {}
        if parameters.get("classification"):
            raise RequestError(400, f"output {entry.name!r}: classification is not supported by this server")
        region = region_use(f"output {entry.name!r}", parameters)
        wanted[entry.name] = Wanted(_flag(parameters, "binary_data", binary), region)
    return wanted or None


def _input(entry: _Input, offset: int) -> Generator[None, None, InputTensor]:
    """One input, whose bytes lie ``offset`` behind the header if they are there."""
    name = entry.name
    dtype = NUMPY.get(entry.datatype)
    if dtype is None:
        raise RequestError(400, f"input {name!r}: datatype {entry.datatype!r} is not served; one of {', '.join(NUMPY)}")
    if entry.shape == _NULL:
        raise RequestError(400, f"input {name!r} has no shape")
    sizes = _small(entry.shape, _Shape, f"input {name!r}: shape")
    if len(sizes) > MAX_RANK or any(n < 0 or n > 1 << 40 for n in sizes):
        raise RequestError(400, f"input {name!r}: not a shape: {sizes[: MAX_RANK + 1]}")
    parameters = _small(entry.parameters, _Parameters, f"input {name!r}: parameters")
    expected = element_count(sizes) * dtype.itemsize
    shape = tuple(sizes)
    size = parameters.get("binary_data_size")
    region = region_use(f"input {name!r}", parameters)
    if region is not None:
        if size is not None or _is_there(entry.data):
            raise RequestError(400, f"input {name!r} has data beside its shared memory")
        if region.size != expected:
            raise RequestError(
                400,
                f"input {name!r}: shared_memory_byte_size is {region.size}, {entry.datatype} {list(shape)} has {expected} bytes",
            )
        return InputTensor(name, entry.datatype, shape, b"", expected, region=region)
    if size is None:
        values = yield from _from_json(entry, dtype, sizes)
        return InputTensor(name, entry.datatype, shape, values, expected)
    if _is_there(entry.data):
        raise RequestError(400, f"input {name!r} has data both in JSON and in binary")
    if type(size) is not int or size != expected:
        raise RequestError(
            400, f"input {name!r}: binary_data_size is {size!r}, {entry.datatype} {list(shape)} has {expected} bytes"
        )
    return InputTensor(name, entry.datatype, shape, b"", expected, offset)


def _is_there(data: msgspec.Raw) -> bool:
    return bool(len(data)) and data != _NULL


def region_use(what: str, parameters: dict[str, Any]) -> RegionUse | None:
    """Which part of a region a tensor's parameters name, None where they name none.

    Raises:
        RequestError: 400, they make no sense.
    """
    name = parameters.get("shared_memory_region")
    if name is None:
        return None
    size, offset = parameters.get("shared_memory_byte_size"), parameters.get("shared_memory_offset")
    offset = 0 if offset is None else offset
    if type(name) is not str or not name:
        raise RequestError(400, f"{what}: shared_memory_region must be a region's name")
    if type(size) is not int or type(offset) is not int or not 0 < size < 1 << 48 or not 0 <= offset < 1 << 48:
        raise RequestError(400, f"{what}: shared_memory_byte_size and shared_memory_offset must be numbers of bytes")
    return RegionUse(name, offset, size)


def _from_json(entry: _Input, dtype: np.dtype[Any], shape: list[int]) -> Generator[None, None, bytes]:
    """The tensor of a JSON ``data`` field."""
    if not _is_there(entry.data):
        raise RequestError(400, f"input {entry.name!r} has no data")
    try:
        if len(entry.data) <= json_data.SMALL_BYTES:
            return json_data.tensor_bytes(bytes(entry.data), entry.datatype, dtype, shape)
        return (yield from json_data.long_tensor_bytes(memoryview(entry.data), entry.datatype, dtype, shape))
    except ValueError as exc:
        raise RequestError(400, f"input {entry.name!r}: {exc}") from exc


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise RequestError(400, f"parameter {name} must be true or false")
    return value


def check(form: Form, config: ModelConfig) -> None:
    """Hold a request's form against what a model serves.

    Raises:
        RequestError: 400, an input or output that the model does not have, or another datatype or shape.
    """
    if form.fits is not config:
        form.order = _fit(form, config)
        form.placed = [(form.inputs[i].start, form.inputs[i].shape) for i in form.order]
        form.fits = config


def fits(form: Form, config: ModelConfig) -> bool:
    """Whether a model takes requests of this form, see :func:`check`."""
    try:
        check(form, config)
    except RequestError:
        return False
    return True


def plan(request: InferRequest, config: ModelConfig) -> list[InputTensor]:
    """The request's inputs in the order of ``config.inputs``, checked like :func:`check`."""
    if request.form.fits is not config:
        check(request.form, config)
    inputs = request.inputs
    return [inputs[i] for i in request.form.order] if len(inputs) > 1 else inputs


def _fit(form: Form, config: ModelConfig) -> list[int]:
    """Where each input of ``config`` is in the form."""
    given = {tensor.name: tensor for tensor in form.inputs}
    order = []
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
        order.append(form.inputs.index(tensor))
    if given:
        raise RequestError(400, f"no input is called {next(iter(given))!r}; {_signature(config)}")
    if form.outputs is not None:
        known = {spec.name for spec in config.outputs}
        for name in form.outputs:
            if name not in known:
                raise RequestError(400, f"no output is called {name!r}; {_signature(config)}")
    return order


def _signature(config: ModelConfig) -> str:
    def show(specs: tuple[TensorSpec, ...]) -> str:
        return ", ".join(f"{s.name} {s.datatype} {list(s.shape)}" for s in specs)

    return f"{config.model} {config.version} takes {show(config.inputs)} and gives {show(config.outputs)}"
