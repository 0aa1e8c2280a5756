"""Run by the tflite toolchain's Python: converts and quantizes every network of a folder, as :mod:`children.litert` does.

Arguments: the compile package's folder, and a folder with ``NAME.onnx`` beside ``NAME.safetensors`` (samples, first axis N).
Writes ``NAME.tflite`` in int8. Only the quantizer is called anew here; what is tested is what the converter hands to it.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import onnx
from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe_manager
from safetensors.numpy import load_file


def main(package: str, folder: Path) -> None:
    sys.path.append(package)
    convert = import_module("children.onnx_to_tflite").convert
    joined = import_module("children.tflite_islands").joined
    operations, algorithms = qtyping.TFLOperationName, algorithm_manager.AlgorithmName
    for path in sorted(folder.glob("*.onnx")):
        converted = convert(onnx.load(path))
        recipe = recipe_manager.RecipeManager()
        recipe.add_static_config(
            regex=".*", operation_name=operations.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8,
            algorithm_key=algorithms.MIN_MAX_UNIFORM_QUANT,
        )  # fmt: skip
        for edge in (operations.INPUT, operations.OUTPUT):
            recipe.add_quantization_config(regex=".*", operation_name=edge, algorithm_key=algorithms.NO_QUANTIZE)
        for name in converted.whole:
            recipe.add_quantization_config(
                regex=f"^{re.escape(name)}(;|$)",
                operation_name=operations.ALL_SUPPORTED,
                algorithm_key=algorithms.NO_QUANTIZE,
            )
        samples = load_file(path.with_suffix(".safetensors"))
        count = len(next(iter(samples.values())))
        feeds = [{name: values[i : i + 1] for name, values in samples.items()} for i in range(count)]
        worker = quantizer.Quantizer(bytearray(converted.content), recipe.get_quantization_recipe())
        found = worker.calibrate({"serving_default": feeds}, num_threads=1)
        path.with_suffix(".tflite").write_bytes(joined(bytes(worker.quantize(found).quantized_model)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
