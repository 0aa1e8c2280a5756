"""The Open Inference Protocol's answers: receives tensors, hands on HTTP bodies. Pure.

Source: KServe Open Inference Protocol v2 (HTTP/REST), Triton's binary tensor data and system shared memory extensions.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec

from edgefleet_agent.runtime.protocol import Form, InferRequest, KnownAnswer, OutputTensor, Wanted
from edgefleet_agent.runtime.tensors import NUMPY

KEPT_HEADS = 8  # of one form: its answers differ by version


class _Output(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _Answer(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_Output]
    id: str = ""


_encode = msgspec.json.Encoder().encode


def encode_answer(
    request: InferRequest, model: str, version: str, outputs: list[OutputTensor]
) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON header when binary tensors follow it (else None).

    Args:
        model, version: of the worker that really computed it.
        outputs: every output of the model. Those that the client wants in a region are named, not repeated.
    """
    known = request.form.heads.get((model, version))
    if known is None or known.outputs != list(map(_kind, outputs)):
        known = _known(request.form, model, version, outputs)
    if not known.binary:
        return known.header, None
    body = known.header
    for i in known.binary:
        body += outputs[i].data
    return body, len(known.header)


_kind = attrgetter("shape", "datatype", "name")


def _known(form: Form, model: str, version: str, outputs: list[OutputTensor]) -> KnownAnswer:
    """The answer's header, kept for the next one if nothing of what the tensors hold is in it."""
    how = [_how(form, tensor.name) for tensor in outputs]
    wanted = [(tensor, way) for tensor, way in zip(outputs, how, strict=True) if way is not None]
    binary = [i for i, way in enumerate(how) if way is not None and way.binary and way.region is None]
    made = KnownAnswer(list(map(_kind, outputs)), _header(form, model, version, wanted), binary)
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


def _header(form: Form, model: str, version: str, wanted: list[tuple[OutputTensor, Wanted]]) -> bytes:
    entries = []
    for tensor, how in wanted:
        parameters: dict[str, Any] = {}
        values = None
        if how.region is not None:
            parameters = {
                "shared_memory_region": how.region.name,
                "shared_memory_offset": how.region.offset,
                "shared_memory_byte_size": len(tensor.data),
            }
        elif how.binary:
            parameters = {"binary_data_size": len(tensor.data)}
        else:
            values = np.frombuffer(tensor.data, NUMPY[tensor.datatype]).tolist()
        entries.append(_Output(tensor.name, tensor.datatype, tensor.shape, parameters, values))
    return _encode(_Answer(model, version, entries, form.id))


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
