"""Stage 2, compile: RK1808 and RK3399Pro. Has Rockchip's older toolkit (RKNN-Toolkit 1.7) make an .rknn from ONNX.

That toolkit wants a Python of its own time, so it runs there (:mod:`.rk1808_build`), with what it needs as files. What comes out is
judged by the board alone. Source: Rockchip's RKNN-Toolkit 1.7 user guide.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from . import job, vendor
from .measure import SampleFile

PROGRAM = "rknn-toolkit1-python"
MAX_OPSET = 12  # of ONNX that RKNN-Toolkit 1.7 reads
MOST_SAMPLES = 64
_AS_ATTRIBUTE = {"Squeeze": "axes", "Unsqueeze": "axes", "ReduceSum": "axes", "Split": "split"}
_BUILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "rk1808_build.py")


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``calibration``, ``inputs``, ``options`` (``chip``), ``jobs`` (each ``recipe``, ``network``, ``compiled``)."""
    for number, one in enumerate(request["jobs"]):
        progress("converting", number, len(request["jobs"]))
        with tempfile.TemporaryDirectory(dir=".") as relative:
            _built(one, request, os.path.abspath(relative))
    progress("converting", len(request["jobs"]), len(request["jobs"]))
    return {}


def _built(one: dict[str, Any], request: job.Request, folder: str) -> None:
    int8 = one["recipe"]["precision"] == "int8"
    settings = {
        "chip": request["options"]["chip"],
        "network": _lowered(one["network"], folder),
        "dataset": _dataset(request, folder) if int8 else None,
        "rknn": os.path.join(folder, "compiled.rknn"),
    }
    with open(os.path.join(folder, "settings.json"), "w", encoding="utf-8") as stream:
        json.dump(settings, stream)
    code, said = vendor.call([PROGRAM, _BUILD, "settings.json"], folder)
    if code != 0:
        raise vendor.failed("rknn-toolkit", code, said)
    if not os.path.exists(settings["rknn"]):
        raise job.Refused("toolchain_failed", "rknn-toolkit ended well, but wrote no file")
    shutil.move(settings["rknn"], one["compiled"])


def _lowered(network: str, folder: str) -> str:
    """The network with an opset that the toolkit reads. ONNX's own converter has no way down for most operators, though all but a few mean
    the same: axes and sizes became inputs, and Softmax lost its flattening."""
    model = onnx.load(network)
    constants = {i.name: i for i in model.graph.initializer}
    ranks = {
        v.name: len(v.type.tensor_type.shape.dim) for v in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    for entry in model.opset_import:
        if entry.domain in {"", "ai.onnx"} and entry.version > MAX_OPSET:
            for node in model.graph.node:
                _lower(node, constants, ranks)
            entry.version = MAX_OPSET
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        said = str(exc).strip().splitlines()[0]
        raise job.Refused(
            "bad_model", f"rknn-toolkit reads ONNX up to opset {MAX_OPSET}, this network says more: {said}"
        ) from exc
    lowered = os.path.join(folder, "network.onnx")
    onnx.save(model, lowered)
    return lowered


def _lower(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], ranks: dict[str, int]) -> None:
    if node.op_type in _AS_ATTRIBUTE and len(node.input) > 1 and node.input[1] in constants:
        values = numpy_helper.to_array(constants[node.input[1]]).tolist()
        node.attribute.append(onnx.helper.make_attribute(_AS_ATTRIBUTE[node.op_type], values))
        del node.input[1:]
    if node.op_type in ("Softmax", "LogSoftmax"):
        axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
        last = ranks.get(node.input[0], 0) - 1
        if axis not in (-1, last):
            raise job.Refused(
                "bad_model",
                f"rknn-toolkit has no operator {node.op_type} over another axis than the last (node {node.name!r})",
            )
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("axis", last))


def _dataset(request: job.Request, folder: str) -> str:
    """A text file with one sample a line: the .npy of each input, N x C x H x W."""
    samples = SampleFile(request["calibration"], MOST_SAMPLES)
    lines = []
    for index in range(len(samples)):
        names = [f"{index:04}-{place}.npy" for place in range(len(request["inputs"]))]
        for name, tensor in zip(names, request["inputs"], strict=True):
            np.save(os.path.join(folder, name), samples[index][tensor], allow_pickle=False)
        lines.append(" ".join(names))
    path = os.path.join(folder, "dataset.txt")
    with open(path, "w", encoding="ascii") as stream:
        stream.write("\n".join(lines) + "\n")
    return path


def _measure(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    raise job.Refused("toolchain_failed", "an .rknn of this toolkit runs on its chip only")


def main() -> None:
    job.serve({"compile": compile_model, "measure": _measure})
