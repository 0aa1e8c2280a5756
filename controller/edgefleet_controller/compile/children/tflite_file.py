"""Stage 2, compile: the last step of a .tflite. Receives a model of the schema's classes, hands on the flatbuffer's bytes.

TFLite's schema asks that the content of a buffer begin at a multiple of 16 bytes (``force_align: 16``): kernels on Arm load vectors from
there, and some read beyond a wrong address without a word. The generated Python classes write bytes where they fall, at multiples of 4.
Source: TensorFlow Lite ``schema.fbs``, table ``Buffer``.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

ALIGNMENT_BYTES = 16
_IDENTIFIER = b"TFL3"
_SPARE_BYTES = 65536  # for what is no constant; the builder grows by itself


class _Aligned(schema.BufferT):  # type: ignore[misc]  # the generated module has no types
    """A buffer whose content lies where the schema asks it to."""

    def Pack(self, builder: Any) -> int:
        if self.data is None:
            return int(super().Pack(builder))
        content = np.ascontiguousarray(self.data, np.uint8).tobytes()
        builder.StartVector(1, len(content), ALIGNMENT_BYTES)
        builder.head -= len(content)
        builder.Bytes[builder.head : builder.head + len(content)] = content
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return int(schema.BufferEnd(builder))


def packed(model: Any) -> bytes:
    """The file of a ``ModelT`` whose constants are all inside their buffers (none behind the flatbuffer by offset)."""
    model.buffers = [_Aligned(buffer.data) for buffer in model.buffers]
    size = sum(len(buffer.data) + ALIGNMENT_BYTES for buffer in model.buffers if buffer.data is not None)
    builder = flatbuffers.Builder(size + _SPARE_BYTES)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())
