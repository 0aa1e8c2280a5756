"""Run by the tflite toolchain's Python: converts and quantizes every network of a folder by the product's own recipe.

Arguments: the compile package's folder, and a folder with ``NAME.onnx`` beside ``NAME.safetensors`` (samples, first axis N).
Writes ``NAME.tflite`` in int8, with the quantizer's own ranges: what is tested is what the converter hands to it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import onnx
from safetensors.numpy import load_file


def main(package: str, folder: Path) -> None:
    sys.path.append(package)
    convert = import_module("children.tflite.onnx_to_tflite").convert
    joined = import_module("children.tflite.islands").joined
    quantizer_of = import_module("children.litert").quantizer_of
    for path in sorted(folder.glob("*.onnx")):
        converted = convert(onnx.load(path))
        samples = load_file(path.with_suffix(".safetensors"))
        count = len(next(iter(samples.values())))
        feeds = [{name: values[i : i + 1] for name, values in samples.items()} for i in range(count)]
        worker = quantizer_of(converted.content, converted.whole)
        found = worker.calibrate({"serving_default": feeds}, num_threads=1)
        path.with_suffix(".tflite").write_bytes(joined(bytes(worker.quantize(found).quantized_model)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
