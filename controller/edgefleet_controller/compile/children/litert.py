"""Stage 2, compile: LiteRT. Makes a .tflite from ONNX, quantizes it to int8 by ai-edge-quantizer, measures it.

Inputs and outputs keep the source's names, order, type (float) and shape; the file quantizes and dequantizes at its edges.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
from ai_edge_litert.interpreter import Interpreter

from . import job
from .measure import Array, Run, SampleFile, measure
from .onnx_to_tflite import convert
from .tflite_islands import joined


def load(path: str) -> Run:
    """An interpreter on one thread."""
    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    run = interpreter.get_signature_runner("serving_default")

    def call(feeds: dict[str, Array]) -> dict[str, Array]:
        return {name: np.array(value) for name, value in run(**feeds).items()}

    return call


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``simplified``, ``calibration``, ``compiled`` and ``float`` (files to write), ``precision``,
    ``options``."""
    progress("converting", 0, 1)
    model = onnx.load(request["simplified"], load_external_data=False)
    converted = convert(model)
    content = converted.content
    with open(request["float"], "wb") as stream:
        stream.write(content)
    progress("converting", 1, 1)
    if request["precision"] == "int8":
        progress("quantizing", 0, 1)
        convolutions = [
            converted.made[n.name] for n in model.graph.node if n.op_type == "Conv" and n.name in converted.made
        ]
        in_float = convolutions[: request["options"]["float_first"]] + converted.whole
        content = _quantize(content, SampleFile(request["calibration"]), in_float)
        progress("quantizing", 1, 1)
    with open(request["compiled"], "wb") as stream:
        stream.write(content)
    return {}


def _quantize(content: bytes, samples: SampleFile, in_float: list[str]) -> bytes:
    """Full int8 but for the operators that make the tensors named ``in_float``."""
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe_manager

    recipe = recipe_manager.RecipeManager()
    operations, algorithms = qtyping.TFLOperationName, algorithm_manager.AlgorithmName
    recipe.add_static_config(
        regex=".*", operation_name=operations.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8,
        algorithm_key=algorithms.MIN_MAX_UNIFORM_QUANT,
    )  # fmt: skip
    for edge in (operations.INPUT, operations.OUTPUT):
        recipe.add_quantization_config(regex=".*", operation_name=edge, algorithm_key=algorithms.NO_QUANTIZE)
    for name in in_float:
        recipe.add_quantization_config(
            regex=f"^{re.escape(name)}(;|$)",
            operation_name=operations.ALL_SUPPORTED,
            algorithm_key=algorithms.NO_QUANTIZE,
        )
    worker = quantizer.Quantizer(bytearray(content), recipe.get_quantization_recipe())
    found = worker.calibrate({"serving_default": [samples[i] for i in range(len(samples))]}, num_threads=1)
    if not found:
        raise job.Refused(
            "bad_model", "no operator of this network can be quantized for tflite", "ask for precision fp32"
        )
    return joined(bytes(worker.quantize(found).quantized_model))


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(load, r, p)})
