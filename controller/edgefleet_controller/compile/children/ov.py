"""Stage 2, compile: OpenVINO. Makes int8 IR by NNCF's post-training quantization, packed as one file, and measures it.

The compiled model is a ZIP, stored, with the members ``model.xml`` and ``model.bin`` and no time stamps, so the same inputs
give the same bytes. Importing openvino or nncf starts a telemetry package that calls home; here it can't be imported.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import zipfile
from typing import Any

import numpy as np

from . import job
from .measure import Array, Run, SampleFile, measure

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # None: importing it fails, and both go on without

import openvino as ov  # noqa: E402

_EPOCH = (1980, 1, 1, 0, 0, 0)
_MEMBERS = ("model.xml", "model.bin")


def load(path: str) -> Run:
    """A compiled model on one thread of the CPU, from a packed IR or an ONNX file."""
    core = ov.Core()
    model = _unpack(core, path) if zipfile.is_zipfile(path) else core.read_model(path)
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    names = [output.get_any_name() for output in compiled.outputs]
    infer = compiled.create_infer_request()

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        results = infer.infer(feeds)
        return {name: np.array(results[i]) for i, name in enumerate(names)}

    return run


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``simplified``, ``calibration``, ``compiled`` (file to write), ``precision``, ``method``, ``options``."""
    import nncf

    progress("converting", 0, 1)
    core = ov.Core()
    try:
        model = core.read_model(request["simplified"])
    except RuntimeError as exc:
        raise _refusal(exc) from exc
    _keep_names(model)
    progress("converting", 1, 1)
    if request["precision"] == "int8":
        samples = SampleFile(request["calibration"])
        progress("quantizing", 0, 1)
        dataset = nncf.Dataset([samples[i] for i in range(len(samples))])
        model = nncf.quantize(
            model,
            dataset,
            preset=nncf.QuantizationPreset(request["options"]["preset"]),
            subset_size=len(samples),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=_convolutions(model)[: request["options"]["float_first"]]),
            advanced_parameters=_advanced(nncf, request["method"], request["options"]),
        )
        progress("quantizing", 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(model, os.path.join(folder, "model.xml"), compress_to_fp16=False)
        with zipfile.ZipFile(request["compiled"], "w", zipfile.ZIP_STORED) as archive:
            for member in _MEMBERS:
                with open(os.path.join(folder, member), "rb") as stream:
                    archive.writestr(zipfile.ZipInfo(member, _EPOCH), stream.read())
    return {}


def _advanced(nncf: Any, method: str, options: dict[str, Any]) -> Any:
    """How activation ranges are estimated (NNCF has no entropy method; the target refuses it), and whether weights keep to 7
    bits, without which pairs of products overflow on x86 before VNNI."""
    ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet
    overflow = nncf.quantization.advanced_parameters.OverflowFix
    return nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params={"minmax": ranges.MINMAX, "percentile": ranges.MEAN_QUANTILE}[method],
        overflow_fix=overflow.ENABLE if options["reduce_range"] else overflow.DISABLE,
    )


def _convolutions(model: Any) -> list[str]:
    kinds = {"Convolution", "GroupConvolution"}
    return [
        operation.get_friendly_name() for operation in model.get_ordered_ops() if operation.get_type_name() in kinds
    ]


def _keep_names(model: Any) -> None:
    """Every input and output must have its ONNX name, which is the name it is served by."""
    for port in (*model.inputs, *model.outputs):
        port.get_any_name()


def _unpack(core: Any, path: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        xml, weights = (archive.read(member) for member in _MEMBERS)
    return core.read_model(xml, ov.Tensor(np.frombuffer(weights, np.uint8)))


def _refusal(exc: Exception) -> job.Refused:
    text = str(exc)
    found = re.search(r"OpenVINO does not support the following ONNX operations: ([^\s,]+)", text)
    if found:
        return job.Refused("bad_model", f"openvino has no operator {found[1]}")
    reason = next((line for line in reversed(text.splitlines()) if line.strip()), "unknown")
    return job.Refused("bad_model", f"openvino can't read this network: {reason.strip()}")


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(load, r, p)})
