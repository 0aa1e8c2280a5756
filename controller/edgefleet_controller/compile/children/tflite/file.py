"""Stage 2, compile: the last step of a .tflite. Receives a model of the schema's classes, hands on the flatbuffer's bytes.

TFLite's schema asks that the content of a buffer begin at a multiple of 16 bytes (``force_align: 16``): kernels on Arm load vectors from
there, and some read beyond a wrong address without a word. The generated Python classes write bytes where they fall, at multiples of 4.
Source: TensorFlow Lite ``schema.fbs``, table ``Buffer``.
"""

from __future__ import annotations

import sys
from typing import Any

import flatbuffers
import numpy as np

ALIGNMENT_BYTES = 16
_IDENTIFIER = b"TFL3"
_SPARE_BYTES = 65536  # for what is no constant; the builder grows by itself


class _Aligned:
    """A buffer whose content lies where the schema asks it to; takes the place of a ``BufferT``."""

    def __init__(self, schema: Any, data: Any) -> None:
        self._schema, self.data = schema, data

    def Pack(self, builder: Any) -> int:
        schema = self._schema
        if self.data is None:
            return int(schema.BufferT().Pack(builder))
        content = np.ascontiguousarray(self.data, np.uint8).tobytes()
        builder.StartVector(1, len(content), ALIGNMENT_BYTES)
        builder.head -= len(content)
        builder.Bytes[builder.head : builder.head + len(content)] = content
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return int(schema.BufferEnd(builder))


def unpacked(schema: Any, content: bytes) -> Any:
    """A file as ``ModelT`` of these classes, all constants inside their buffers, as old readers expect: newer writers put them behind the flatbuffer."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.offset:
            buffer.data = np.frombuffer(content, np.uint8, int(buffer.size), int(buffer.offset))
            buffer.offset = buffer.size = 0
    return model


def packed(model: Any) -> bytes:
    """The file of a ``ModelT`` (LiteRT's or TensorFlow's: each has these classes generated in a module of its own) whose constants are all inside
    their buffers (none behind the flatbuffer by offset)."""
    schema = sys.modules[type(model).__module__]
    model.buffers = [_Aligned(schema, buffer.data) for buffer in model.buffers]
    size = sum(len(buffer.data) + ALIGNMENT_BYTES for buffer in model.buffers if buffer.data is not None)
    builder = flatbuffers.Builder(size + _SPARE_BYTES)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def with_served_outputs(schema: Any, content: bytes, original: bytes) -> bytes:
    """A quantized file whose signature names the tensors that the file gives out, in the order of the one that it was made from.

    An output that an operator in float reads, too, has another tensor after quantizing; ai-edge-quantizer 0.10 leaves the signature at the former.
    """
    model, before = unpacked(schema, content), unpacked(schema, original)
    outputs = [int(tensor) for tensor in model.subgraphs[0].outputs]
    places = [int(tensor) for tensor in before.subgraphs[0].outputs]
    wanted = {one.name: outputs[places.index(one.tensorIndex)] for one in before.signatureDefs[0].outputs}
    served = model.signatureDefs[0].outputs
    if all(one.tensorIndex == wanted[one.name] for one in served):
        return content
    for one in served:
        one.tensorIndex = wanted[one.name]
    return packed(model)
