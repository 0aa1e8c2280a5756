"""Stage 2, compile: OpenVINO. Makes IR from ONNX in float or QDQ, or quantizes it by NNCF, packed as one file, and measures it.

The compiled model is a ZIP with the members ``model.xml``, deflated, since it says everything twenty times, and ``model.bin``, stored, and without time stamps, so
the same inputs give the same bytes. Importing openvino or nncf starts a telemetry package that calls home; here it can't be imported.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import zipfile
from typing import Any

import numpy as np
import onnx

from . import job
from .measure import Array, Run, SampleFile, measure

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # None: importing it fails, and both go on without

import openvino as ov  # noqa: E402

from .ov_gates import fusible  # noqa: E402
from .ov_pads import pad_in_float  # noqa: E402

_EPOCH = (1980, 1, 1, 0, 0, 0)
_MEMBERS = {"model.xml": zipfile.ZIP_DEFLATED, "model.bin": zipfile.ZIP_STORED}


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
    # One tensor has several names where what stood between them is folded, a Cast to half precision and back; each may be the served one.
    names = [sorted(output.get_names()) for output in compiled.outputs]
    infer = compiled.create_infer_request()

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        results = infer.infer(feeds)
        return {name: np.array(results[i]) for i, known in enumerate(names) for name in known}

    return run


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``calibration``, ``jobs`` (each ``recipe``, ``network`` in float or QDQ, ``compiled``, the file to write)."""
    core = ov.Core()
    samples = SampleFile(request["calibration"])
    for number, one in enumerate(request["jobs"]):
        progress("converting", number, len(request["jobs"]))
        try:
            model = _read(core, one["network"])
        except RuntimeError as exc:
            raise _refusal(exc, one["network"]) from exc
        fusible(model)
        _keep_names(model)
        if one["recipe"]["quantizer"] == "nncf":
            progress("quantizing", number, len(request["jobs"]))
            model = _by_nncf(model, samples, one["recipe"])
        _write(model, one["compiled"])
    progress("converting", len(request["jobs"]), len(request["jobs"]))
    return {}


def _read(core: Any, network: str) -> Any:
    """The network as the engine reads it, its paddings such as are computed rightly; from a file, for of bytes it drops the inputs that nothing reads."""
    model = onnx.load(network)
    if not pad_in_float(model):
        return core.read_model(network)
    with tempfile.TemporaryDirectory() as folder:
        padding_rightly = os.path.join(folder, "network.onnx")
        onnx.save(model, padding_rightly)
        return core.read_model(padding_rightly)


def _by_nncf(model: Any, samples: SampleFile, recipe: dict[str, Any]) -> Any:
    """Its own post-training quantization; it has no entropy method, and the target asks for none."""
    import nncf

    ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet
    overflow = nncf.quantization.advanced_parameters.OverflowFix
    known = {operation.get_friendly_name() for operation in model.get_ordered_ops()}
    return nncf.quantize(
        model,
        nncf.Dataset([samples[i] for i in range(len(samples))]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        fast_bias_correction=True,
        ignored_scope=nncf.IgnoredScope(names=[name for name in recipe["in_float"] if name in known]),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=ranges.MINMAX if recipe["ranges"] == "minmax" else ranges.MEAN_QUANTILE,
            overflow_fix=overflow.DISABLE if recipe["weights"] == "full" else overflow.ENABLE,
        ),
    )


def _write(model: Any, path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(model, os.path.join(folder, "model.xml"), compress_to_fp16=False)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for member, way in _MEMBERS.items():
                with open(os.path.join(folder, member), "rb") as stream:
                    archive.writestr(zipfile.ZipInfo(member, _EPOCH), stream.read(), way, compresslevel=9)


def _keep_names(model: Any) -> None:
    """Every input and output must have its ONNX name, which is the name it is served by."""
    for port in (*model.inputs, *model.outputs):
        port.get_any_name()


def _unpack(core: Any, path: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        xml, weights = (archive.read(member) for member in _MEMBERS)
    return core.read_model(xml, ov.Tensor(np.frombuffer(weights, np.uint8)))


def _refusal(exc: Exception, path: str) -> job.Refused:
    """OpenVINO's error as a sentence that names operator and node; its own text names the operator."""
    text = str(exc)
    found = re.search(r"No conversion rule found for operations: ([^\s,]+)", text)
    if found:
        domain, _, op = re.sub(r"-\d+$", "", found[1]).rpartition(".")  # ONNX's own are told with their version
        nodes = [n for n in onnx.load(path).graph.node if (n.domain or domain, n.op_type) == (domain, op)]
        where = f" (node {nodes[0].name or nodes[0].output[0]!r})" if nodes else ""
        return job.Refused("bad_model", f"openvino has no operator {f'{domain}.' if domain else ''}{op}{where}")
    broken = re.search(r"ONNX node '<Node\((\w+)\): (.*?)>'(.+?)(?:\n\n|\n-- |$)", text, re.S)
    if broken:
        op, node, told = broken.groups()
        return job.Refused(
            "bad_model", f"openvino can't read operator {op} (node {node!r}): {told.strip().splitlines()[-1].strip()}"
        )
    reason = next((line for line in reversed(text.splitlines()) if line.strip()), "unknown")
    return job.Refused("bad_model", f"openvino can't read this network: {reason.strip()}")


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(load, r, p)})
