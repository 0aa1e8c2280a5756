"""Stage 2, compile: Ascend. Has Huawei's ``atc`` make an .om from ONNX, after ``amct_onnx`` where int8 is asked for.

Neither can be had without an account, and an .om runs on the chip only: what comes out is judged by the board alone.
Source: CANN's ATC user guide (``--framework=5`` is ONNX) and AMCT user guide (``amct_onnx calibration``), CANN 6 to 8.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from typing import Any

import onnx

from . import job, vendor
from .measure import SampleFile

MOST_SAMPLES = 64
_PRECISION = {"fp16": "allow_fp32_to_fp16", "int8": "allow_fp32_to_fp16", "fp32": "must_keep_origin_dtype"}


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``calibration``, ``inputs``, ``options`` (``soc``), ``jobs`` (each ``recipe``, ``network``, ``compiled``)."""
    for number, one in enumerate(request["jobs"]):
        with tempfile.TemporaryDirectory(dir=".") as relative:
            folder = os.path.abspath(relative)
            network = one["network"]
            shapes = _shapes(network)
            if one["recipe"]["precision"] == "int8":
                progress("calibrating", number, len(request["jobs"]))
                network = _calibrated(network, shapes, request, folder)
            progress("compiling", number, len(request["jobs"]))
            _compiled(network, shapes, request["options"]["soc"], one, folder)
    progress("compiling", len(request["jobs"]), len(request["jobs"]))
    return {}


def _shapes(network: str) -> str:
    """``name:1,3,224,224;...`` as both programs take it."""
    graph = onnx.load(network, load_external_data=False).graph
    constants = {i.name for i in graph.initializer}
    return ";".join(
        f"{i.name}:{','.join(str(d.dim_value) for d in i.type.tensor_type.shape.dim)}"
        for i in graph.input
        if i.name not in constants
    )


def _calibrated(network: str, shapes: str, request: job.Request, folder: str) -> str:
    """The network for deployment in int8."""
    samples = SampleFile(request["calibration"], MOST_SAMPLES)
    folders = [os.path.join(folder, f"input{place}") for place in range(len(request["inputs"]))]
    for place, name in zip(folders, request["inputs"], strict=True):
        os.mkdir(place)
        for index in range(len(samples)):
            samples[index][name].tofile(os.path.join(place, f"{index:04}.bin"))
    code, said = vendor.call(
        [
            "amct_onnx", "calibration", f"--model={network}", "--save_path=./quantized", f"--input_shape={shapes}",
            f"--data_dir={';'.join(folders)}", f"--data_types={';'.join('float32' for _ in folders)}",
        ],
        folder,
    )  # fmt: skip
    made = os.path.join(folder, "quantized_deploy_model.onnx")
    if code != 0:
        raise _refusal("amct_onnx", code, said)
    if not os.path.exists(made):
        raise job.Refused("toolchain_failed", "amct_onnx ended well, but wrote no quantized_deploy_model.onnx")
    return made


def _compiled(network: str, shapes: str, soc: str, one: dict[str, Any], folder: str) -> None:
    layout = "NCHW" if all(shape.count(",") == 3 for shape in shapes.split(";")) else "ND"
    code, said = vendor.call(
        [
            "atc", f"--model={network}", "--framework=5", "--output=./compiled", f"--soc_version={soc}",
            f"--input_format={layout}", f"--input_shape={shapes}", f"--precision_mode={_PRECISION[one['recipe']['precision']]}",
        ],
        folder,
    )  # fmt: skip
    made = os.path.join(folder, "compiled.om")
    if code != 0:
        raise _refusal("atc", code, said)
    if not os.path.exists(made):
        raise job.Refused("toolchain_failed", "atc ended well, but wrote no compiled.om")
    shutil.move(made, one["compiled"])


def _refusal(program: str, code: int, said: str) -> job.Refused:
    """An unsupported operator by name and node, as E19010 (parser) and EZ3003 (no kernel) tell it."""
    parser = re.search(r"No parser is registered for Op \[(.+?), optype \[(?:[\w.]+::\d+::)?(\w+)\]", said)
    kernel = re.search(r"No supported Ops kernel and engine are found for \[(.+?)\], optype \[(\w+)\]", said)
    found = parser or kernel
    if found:
        return job.Refused("bad_model", f"{program} has no operator {found[2]} (node {found[1]!r})")
    return vendor.failed(program, code, said)


def _measure(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    raise job.Refused("toolchain_failed", "an .om runs on an Ascend chip only")


def main() -> None:
    job.serve({"compile": compile_model, "measure": _measure})
