"""The Open Inference Protocol's answers: receives tensors, hands on HTTP bodies. Pure.

Source: KServe Open Inference Protocol v2 (HTTP/REST), Triton's binary tensor data and system shared memory extensions.
"""

from __future__ import annotations

from collections.abc import Generator
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec

from edgefleet_agent.runtime.json_data import MAX_PIECES
from edgefleet_agent.runtime.protocol import Form, InferRequest, KnownAnswer, OutputTensor, RequestError, Wanted
from edgefleet_agent.runtime.tensors import NUMPY

KEPT_HEADS = 8  # of one form: its answers differ by version
PIECE_VALUES = 8 * 1024  # written as JSON at once: a millisecond's work


class _Output(msgspec.Struct, omit_defaults=True):
    """All of an output but ``data``, which is written behind it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] = {}


class _Answer(msgspec.Struct, omit_defaults=True):
    """All of an answer but ``outputs``, which are written behind it."""

    model_name: str
    model_version: str
    id: str = ""


_encode = msgspec.json.Encoder().encode


def encode_answer(
    request: InferRequest, model: str, version: str, outputs: list[OutputTensor]
) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON header when binary tensors follow it (else None).

    Args:
        model, version: of the worker that really computed it.
        outputs: every output of the model. Those that the client wants in a region are named, not repeated.

    Raises:
        RequestError: 400, it would be too large as JSON.
    """
    known = request.form.heads.get((model, version))
    if known is None or known.outputs != list(map(_kind, outputs)):
        steps = _known(request.form, model, version, outputs)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                known = end.value
                break
    return _with_binary(known, outputs)


def is_long(form: Form, outputs: list[OutputTensor]) -> bool:
    """Whether an answer has so many values as JSON that others should have their turn while they are written."""
    return sum(_json_values(form, tensor) for tensor in outputs) > PIECE_VALUES


def encode_long_answer(
    request: InferRequest, model: str, version: str, outputs: list[OutputTensor]
) -> Generator[None, None, tuple[bytes, int | None]]:
    """Like :func:`encode_answer`: lets others have their turn at each ``yield``."""
    known = yield from _known(request.form, model, version, outputs)
    return _with_binary(known, outputs)


def _with_binary(known: KnownAnswer, outputs: list[OutputTensor]) -> tuple[bytes, int | None]:
    if not known.binary:
        return known.header, None
    return b"".join((known.header, *(outputs[i].data for i in known.binary))), len(known.header)


_kind = attrgetter("shape", "datatype", "name")


def _known(form: Form, model: str, version: str, outputs: list[OutputTensor]) -> Generator[None, None, KnownAnswer]:
    """The answer's header, kept for the next one if nothing of what the tensors hold is in it."""
    how = [_how(form, tensor.name) for tensor in outputs]
    wanted = [(tensor, way) for tensor, way in zip(outputs, how, strict=True) if way is not None]
    binary = [i for i, way in enumerate(how) if way is not None and way.binary and way.region is None]
    header = yield from _header(form, model, version, wanted)
    made = KnownAnswer(list(map(_kind, outputs)), header, binary)
    if all(way.binary or way.region is not None for _, way in wanted):
        if len(form.heads) >= KEPT_HEADS:
            form.heads.clear()
        form.heads[model, version] = made
    return made


def _how(form: Form, name: str) -> Wanted | None:
    if form.outputs is None:
        return _BINARY if form.binary else _PLAIN
    return form.outputs.get(name)


_BINARY, _PLAIN = Wanted(True), Wanted(False)


def _json_values(form: Form, tensor: OutputTensor) -> int:
    """How many values of an output the answer has as JSON."""
    how = _how(form, tensor.name)
    if how is None or how.binary or how.region is not None:
        return 0
    return len(tensor.data) // NUMPY[tensor.datatype].itemsize


def _header(
    form: Form, model: str, version: str, wanted: list[tuple[OutputTensor, Wanted]]
) -> Generator[None, None, bytes]:
    """Raises: RequestError."""
    if sum(_json_values(form, tensor) for tensor, _ in wanted) > MAX_PIECES:
        raise RequestError(
            400, f"the answer has more than {MAX_PIECES} values as JSON; ask for it in binary, with binary_data_output"
        )
    pieces = [_encode(_Answer(model, version, form.id))[:-1], b',"outputs":[']
    for number, (tensor, how) in enumerate(wanted):
        parameters: dict[str, Any] = {}
        if how.region is not None:
            parameters = {
                "shared_memory_region": how.region.name,
                "shared_memory_offset": how.region.offset,
                "shared_memory_byte_size": len(tensor.data),
            }
        elif how.binary:
            parameters = {"binary_data_size": len(tensor.data)}
        entry = _encode(_Output(tensor.name, tensor.datatype, tensor.shape, parameters))
        pieces += [b"," if number else b"", entry[:-1]]
        if not parameters:
            pieces.append(b',"data":[')
            yield from _write_values(tensor, pieces)
            pieces.append(b"]")
        pieces.append(b"}")
    pieces.append(b"]}")
    return b"".join(pieces)


def _write_values(tensor: OutputTensor, pieces: list[bytes]) -> Generator[None, None, None]:
    """Put a tensor's values behind ``pieces``."""
    values = np.frombuffer(tensor.data, NUMPY[tensor.datatype])
    for at in range(0, len(values), PIECE_VALUES):
        if at:
            pieces.append(b",")
            yield
        pieces.append(_encode(values[at : at + PIECE_VALUES].tolist())[1:-1])


def error_body(message: str) -> bytes:
    """The protocol's error object."""
    return _encode({"error": message})


def model_configuration(config: ModelConfig, max_rows: int) -> bytes:
    """Triton's model configuration, as much of it as has a meaning here; its clients learn from it whether they may send batches.

    Args:
        max_rows: the largest batch; 0 for a model that takes none.
    """
    batch_axes = 1 if max_rows else 0

    def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": s.name, "data_type": f"TYPE_{s.datatype}", "dims": s.shape[batch_axes:]} for s in specs]

    return _encode(
        {
            "name": config.model,
            "platform": f"{config.engine}_{config.precision}",
            "backend": config.engine,
            "max_batch_size": max_rows,
            "input": tensors(config.inputs),
            "output": tensors(config.outputs),
        }
    )


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
