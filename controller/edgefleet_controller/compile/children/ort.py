"""Stage 2, compile: onnxruntime. Simplifies networks, answers for the float reference, makes QDQ int8 models, measures them.

Source of the recipe: onnxruntime's quantization guide; per-channel because per-tensor weights changed one answer in five of
EfficientNet-Lite0. ``QDQDisableWeightAdjustForInt32Bias`` avoids a ValueError of 1.32 on biases of shape [C, 1, 1].
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.numpy import save_file

from . import job
from .measure import Array, Run, SampleFile, measure, run_all

PER_CHANNEL_OPSET = 13
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


def load(path: str) -> Run:
    """A session on one thread, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def prepare(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Simplify a network and answer the samples with it in float.

    Request: ``network``, ``simplified`` (file to write), ``samples`` and ``references`` (lists of files, in pairs).
    """
    progress("simplifying", 0, 1)
    try:
        run = load(request["network"])
    except Exception as exc:  # onnxruntime's own classes share no base but this
        raise _refusal(exc, request["network"]) from exc
    source = _at_least_opset(request["network"], request["simplified"])
    quant_pre_process(source, request["simplified"], skip_symbolic_shape=True)
    progress("simplifying", 1, 1)
    for samples, references in zip(request["samples"], request["references"], strict=True):
        save_file(run_all(run, SampleFile(samples), progress, "float reference"), references)
    return {"engine_version": onnxruntime.__version__}


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``simplified``, ``calibration``, ``compiled`` (file to write), ``precision``, ``method``, ``options``."""
    if request["precision"] == "fp32":
        os.link(request["simplified"], request["compiled"])
        return {}
    progress("quantizing", 0, 1)
    options = request["options"]
    convolutions = [node.name for node in onnx.load(request["simplified"]).graph.node if node.op_type == "Conv"]
    quantize_static(
        request["simplified"],
        request["compiled"],
        _Samples(SampleFile(request["calibration"])),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=bool(options["reduce_range"]),
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        nodes_to_exclude=convolutions[: options["float_first"]],
        calibrate_method=_METHODS[request["method"]],
        extra_options={"QDQDisableWeightAdjustForInt32Bias": True},
    )
    progress("quantizing", 1, 1)
    return {}


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, samples: SampleFile) -> None:
        self._feeds: Iterator[dict[str, np.ndarray[Any, Any]]] = (samples[i] for i in range(len(samples)))

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._feeds, None)


def _at_least_opset(path: str, beside: str) -> str:
    model = onnx.load(path)
    opset = max(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if opset >= PER_CHANNEL_OPSET:
        return path
    raised = beside + ".opset.onnx"
    onnx.save(onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET), raised)
    return raised


def _refusal(exc: Exception, path: str) -> job.Refused:
    """onnxruntime's load error as a sentence that names operator and node; its own texts name one or the other."""
    text = str(exc)
    missing = re.search(r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'", text)
    if missing:
        return job.Refused(
            "bad_model", f"onnxruntime has no operator {missing[1]} (node {missing[2]!r}) for these types"
        )
    unknown = re.search(r"([\w.]+):(\w+)\(-?\d+\) is not a registered function/op", text)
    if unknown:
        domain, op = unknown.groups()
        nodes = [n for n in onnx.load(path).graph.node if (n.domain, n.op_type) == (domain, op)]
        where = f" (node {nodes[0].name or nodes[0].output[0]!r})" if nodes else ""
        return job.Refused("bad_model", f"onnxruntime has no operator {domain}.{op}{where}")
    return job.Refused("bad_model", f"onnxruntime can't load this network: {text.splitlines()[0]}")


def main() -> None:
    job.serve({"prepare": prepare, "compile": compile_model, "measure": lambda r, p: measure(load, r, p)})
