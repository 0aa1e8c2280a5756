"""Stage 2, compile: LiteRT. Makes a .tflite from ONNX, quantizes it to int8 by ai-edge-quantizer, measures it.

Inputs and outputs keep the source's names, order, type (float) and shape; the file quantizes and dequantizes at its edges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from ai_edge_litert.interpreter import Interpreter

from . import job
from .measure import Array, Run, SampleFile, measure
from .onnx_to_tflite import convert


def load(path: str) -> Run:
    """An interpreter on one thread."""
    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    run = interpreter.get_signature_runner("serving_default")

    def call(feeds: dict[str, Array]) -> dict[str, Array]:
        return {name: np.array(value) for name, value in run(**feeds).items()}

    return call


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``simplified``, ``calibration``, ``compiled`` and ``float`` (files to write), ``precision``."""
    progress("converting", 0, 1)
    content = convert(onnx.load(request["simplified"]))
    with open(request["float"], "wb") as stream:
        stream.write(content)
    progress("converting", 1, 1)
    if request["precision"] == "int8":
        progress("quantizing", 0, 1)
        content = _quantize(content, SampleFile(request["calibration"]))
        progress("quantizing", 1, 1)
    with open(request["compiled"], "wb") as stream:
        stream.write(content)
    return {}


def _quantize(content: bytes, samples: SampleFile) -> bytes:
    from ai_edge_quantizer import quantizer, recipe

    worker = quantizer.Quantizer(bytearray(content), recipe.static_wi8_ai8())
    found = worker.calibrate({"serving_default": [samples[i] for i in range(len(samples))]}, num_threads=1)
    return bytes(worker.quantize(found).quantized_model)


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(load, r, p)})
