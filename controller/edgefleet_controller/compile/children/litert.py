"""Stage 2, compile: LiteRT. Makes a .tflite from ONNX, quantizes it to int8 by ai-edge-quantizer, measures it.

Inputs and outputs keep the source's names, order, type (float) and shape; the file quantizes and dequantizes at its edges. Ranges
and bias corrections are those of :mod:`.statistics` and :mod:`.weights`, as for every engine.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from onnx import numpy_helper

from . import gathered, job
from .in_float import outside, with_passages
from .int8_weights import Settling
from .measure import Array, Run, SampleFile, measure
from .readings import pools_first
from .tflite.file import with_served_outputs
from .tflite.half import halved
from .tflite.islands import joined
from .tflite.onnx_to_tflite import Converted, convert
from .weights import WEIGHTED, axis_of, channel_scales, own_weights

NORMALISATIONS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization")


def load(path: str) -> Run:
    """An interpreter on one thread."""
    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_list().get("serving_default", {"inputs": []})
    run = interpreter.get_signature_runner("serving_default") if signature["inputs"] else None
    by_tensors = _by_tensors(interpreter)  # files of other makers have no signature, or name things otherwise in it

    def call(feeds: dict[str, Array]) -> dict[str, Array]:
        if run is None or set(signature["inputs"]) != set(feeds):
            return by_tensors(feeds)
        return {name: np.array(value) for name, value in run(**feeds).items()}

    return call


def _by_tensors(interpreter: Any) -> Run:
    """Feeds and answers by the names of the file's tensors; what it takes or gives in int8 is float outside, as on the board."""
    inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
    outputs = interpreter.get_output_details()

    def call(feeds: dict[str, Array]) -> dict[str, Array]:
        for name, value in feeds.items():
            interpreter.set_tensor(inputs[name]["index"], _to_file(value, inputs[name]))
        interpreter.invoke()
        return {detail["name"]: _from_file(interpreter.get_tensor(detail["index"]), detail) for detail in outputs}

    return call


def _to_file(value: Array, detail: dict[str, Any]) -> Array:
    scale, zero = detail["quantization"]
    if not scale:  # numbers that mean themselves; TFLite's whole ones may have fewer bits
        return value.astype(detail["dtype"], copy=False)
    limits = np.iinfo(detail["dtype"])
    return np.asarray(np.clip(np.rint(value / scale) + zero, limits.min, limits.max).astype(detail["dtype"]))


def _from_file(value: Array, detail: dict[str, Any]) -> Array:
    scale, zero = detail["quantization"]
    if not scale:
        return np.array(value)
    return np.asarray((value.astype(np.float32) - zero) * np.float32(scale))


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``simplified``, ``calibration``, ``statistics`` (or null), ``jobs`` (each ``recipe`` and ``compiled``, the file to write)."""
    progress("converting", 0, 1)
    model = onnx.load(request["simplified"], load_external_data=False)
    pools_first(model)
    plain = convert(model)
    progress("converting", 1, 1)
    quantizer: _Quantizer | None = None
    for number, one in enumerate(request["jobs"]):
        if one["recipe"]["precision"] != "int8":
            half = one["recipe"]["precision"] == "fp16"
            _write(one["compiled"], halved(plain.content) if half else plain.content)
            continue
        progress("quantizing", number, len(request["jobs"]))
        quantizer = quantizer or _Quantizer(model, plain, request["statistics"], SampleFile(request["calibration"]))
        _write(one["compiled"], quantizer.quantize(one["recipe"]))
    progress("quantizing", len(request["jobs"]), len(request["jobs"]))
    return {}


class _Quantizer:
    """Quantizes one network by several recipes; it is calibrated once."""

    def __init__(self, model: onnx.ModelProto, plain: Converted, statistics: str, samples: SampleFile) -> None:
        self._statistics = gathered.load(statistics)
        self._settling = Settling(self._statistics)
        self._model, self._plain = model, plain
        known = self._statistics.ranges
        known |= {name: known[source] for name, source in plain.same_as.items() if source in known}
        # One sample tells which tensors want a range.
        self._found = self._calibrate(samples, 1)
        if not self._found:
            raise job.Refused(
                "bad_model", "no operator of this network can be quantized for tflite", "ask for precision fp32"
            )
        if not set(self._found) <= set(known):  # some that only the .tflite has: pads, parts of a hard sigmoid
            self._found = self._calibrate(samples, len(samples))

    def quantize(self, recipe: dict[str, Any]) -> bytes:
        left = {*recipe["in_float"], *outside(self._model, recipe["scope"]), *_in_pieces(self._model)}
        left = with_passages(self._model, left)
        converted = self._plain
        if recipe["correct_bias"] or recipe["fit_weights"]:
            settled = onnx.ModelProto()
            settled.CopyFrom(self._model)
            own_weights(settled, left)
            self._settling.settle(settled, _scales(settled, left), recipe)
            converted = convert(settled)
        nodes = [node for node in self._model.graph.node if node.name in left]
        # What the writer put before an operator is named after its own output, the operator perhaps after that of its activation.
        in_float = {node.output[0] for node in nodes} | {converted.made.get(node.name, "") for node in nodes} - {""}
        in_float |= {value.name for value in self._model.graph.input if any(value.name in n.input for n in nodes)}
        worker = quantizer_of(converted.content, [*sorted(in_float), *converted.whole])
        content = joined(bytes(worker.quantize(self._ranges(recipe["ranges"])).quantized_model))
        content = with_served_outputs(schema, content, converted.content)
        return halved(content) if left else content

    def _calibrate(self, samples: SampleFile, count: int) -> dict[str, Any]:
        worker = quantizer_of(self._plain.content, self._plain.whole)
        feeds = {"serving_default": [samples[i] for i in range(count)]}
        try:
            found: dict[str, Any] = worker.calibrate(feeds, num_threads=1)
        except RuntimeError as exc:  # the interpreter's, over the float model
            raise job.Refused(
                "bad_model", f"tflite can't run this network over its calibration samples: {exc}"
            ) from exc
        return found

    def _ranges(self, method: str) -> dict[str, Any]:
        """ai-edge-quantizer's own ranges, replaced where the statistics know the tensor."""
        out = {}
        for name, own in self._found.items():
            methods = self._statistics.ranges.get(name)
            if methods is None or not {"min", "max"} <= own.keys():
                out[name] = own
                continue
            low, high = methods[method]
            out[name] = own | {"min": np.full_like(own["min"], low), "max": np.full_like(own["max"], high)}
        return out


def _in_pieces(model: onnx.ModelProto) -> set[str]:
    """The names of normalisations, which TFLite computes in pieces: their variance, a mean of squares, spans more than 8 bits tell apart."""
    return {node.name for node in model.graph.node if node.op_type in NORMALISATIONS}


def quantizer_of(content: bytes, in_float: list[str]) -> Any:
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
            regex=f"^{re.escape(name)}(/[a-z]+)?(;|$)",  # with the parts that the writer splits an operator into
            operation_name=operations.ALL_SUPPORTED,
            algorithm_key=algorithms.NO_QUANTIZE,
        )
    return quantizer.Quantizer(bytearray(content), recipe.get_quantization_recipe())


def _scales(model: onnx.ModelProto, in_float: set[str]) -> dict[str, Array]:
    """The scales that ai-edge-quantizer gives weights, but for those of nodes in float: 8 bits over each channel's largest."""
    constants = {i.name: i for i in model.graph.initializer}
    return {
        node.input[1]: channel_scales(numpy_helper.to_array(constants[node.input[1]]), axis_of(node), "full")
        for node in model.graph.node
        if node.op_type in WEIGHTED and node.name not in in_float and node.input[1] in constants
    }


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(load, r, p)})
