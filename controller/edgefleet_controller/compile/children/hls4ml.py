"""Stage 2, compile: FPGAs, by hls4ml. Makes a project of C++ for Vitis HLS from ONNX, in fixed point, and its C simulation for this host.

The compiled model is a ZIP, stored, of what Vitis synthesizes; making the bitstream and loading it is a builder's work. The stand-in is the same C++
compiled by g++, whose fixed-point types compute bit by bit what the FPGA does: a ZIP of a shared library and the weights that it reads.
Source: hls4ml's documentation (ONNX front end, by way of qonnx; Vitis back end; C simulation).
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import sys
import tempfile
import zipfile
from typing import Any

import hls4ml
import numpy as np
import onnx
from onnx import numpy_helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
from qonnx.transformation.gemm_to_matmul import GemmToMatMul
from qonnx.util.cleanup import cleanup_model

from . import job, vendor
from .measure import Array, Run, measure
from .products import with_plain_products

NAME = "network"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LIBRARY = "simulation.so"
# What hls4ml writes for its own later use: paths of this machine and a random number.
_OURS = ("hls4ml_config.yml", "build_lib.sh", f"{NAME}.onnx")


def load(request: job.Request, path: str) -> Run:
    """The C simulation. Request: ``inputs``, ``outputs`` and ``output_shapes``, in order; it reads its weights from the working folder."""
    with zipfile.ZipFile(path) as archive:
        shutil.rmtree("weights", ignore_errors=True)
        os.mkdir("weights")
        for member in archive.namelist():  # plain names that compile_model gave
            with archive.open(member) as source, open(os.path.join(".", member), "wb") as copy:
                shutil.copyfileobj(source, copy)
    function = getattr(ctypes.CDLL(os.path.abspath(_LIBRARY)), f"{NAME}_float")
    shapes = [[1 if size == -1 else size for size in shape] for shape in request["output_shapes"]]
    pointer = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    function.argtypes = [pointer] * (len(request["inputs"]) + len(shapes))
    function.restype = None

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        answers = [np.zeros(shape, np.float32) for shape in shapes]
        function(*[np.ascontiguousarray(feeds[name], np.float32) for name in request["inputs"]], *answers)
        return dict(zip(request["outputs"], answers, strict=True))

    return run


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``options`` (``total_bits``, ``integer_bits``, ``reuse``, ``part``), ``jobs`` (each ``network``, ``compiled``, ``stand_in``)."""
    for number, one in enumerate(request["jobs"]):
        with tempfile.TemporaryDirectory(dir=".") as relative:
            folder = os.path.abspath(relative)
            progress("writing C++", number, len(request["jobs"]))
            _written(one["network"], request["options"], folder)
            progress("compiling the C simulation", number, len(request["jobs"]))
            _simulation(folder, one["stand_in"])
            _pack(folder, one["compiled"])
    progress("compiling the C simulation", len(request["jobs"]), len(request["jobs"]))
    return {}


def _written(network: str, options: dict[str, Any], folder: str) -> None:
    model = ModelWrapper(_explicit(with_plain_products(onnx.load(network))))
    fixed = f"fixed<{options['total_bits']},{options['integer_bits']},RND,SAT>"
    try:
        for step in (ConvertToChannelsLastAndClean(), GemmToMatMul()):
            model = cleanup_model(model).transform(step)
        model = cleanup_model(model)
        settings = hls4ml.utils.config.config_from_onnx_model(
            model, granularity="name", default_precision=fixed, default_reuse_factor=options["reuse"], backend="Vitis"
        )
        hls4ml.converters.convert_from_onnx_model(
            model,
            output_dir=folder,
            project_name=NAME,
            io_type="io_stream",
            hls_config=settings,
            backend="Vitis",
            part=options["part"],
        ).write()
    except Exception as exc:  # hls4ml and qonnx raise bare Exception
        raise _refusal(str(exc), network) from exc


def _explicit(model: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX leaves to defaults, and qonnx asks for: attributes, and that what flattens a picture is called Flatten, for it turns the axes
    of the weights behind that only."""
    constants = {i.name: i for i in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    sizes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    for node in model.graph.node:
        given = {attribute.name: attribute for attribute in node.attribute}
        defaults: dict[str, Any] = {}
        if node.op_type == "Conv" and node.input[1] in constants:
            kernel = list(constants[node.input[1]].dims)[2:]
            defaults = {"kernel_shape": kernel, "dilations": [1] * len(kernel), "group": 1}
        elif node.op_type in ("MaxPool", "AveragePool"):
            kernel = list(given["kernel_shape"].ints)
            defaults = {"ceil_mode": 0}
        if defaults:
            strides = list(given["strides"].ints) if "strides" in given else [1] * len(kernel)
            defaults |= {"strides": strides, "pads": _pads(node, kernel, strides, sizes)}
            node.attribute.extend(onnx.helper.make_attribute(n, v) for n, v in defaults.items() if n not in given)
            for attribute in [a for a in node.attribute if a.name == "auto_pad"]:
                node.attribute.remove(attribute)
        if node.op_type == "Reshape" and node.input[1] in constants:
            shape = numpy_helper.to_array(constants[node.input[1]]).tolist()
            if len(shape) == 2 and shape[0] in (0, 1):
                flatten = onnx.helper.make_node("Flatten", [node.input[0]], list(node.output), name=node.name, axis=1)
                node.CopyFrom(flatten)
    return model


def _pads(node: onnx.NodeProto, kernel: list[int], strides: list[int], sizes: dict[str, list[int]]) -> list[int]:
    """What ``auto_pad`` means in numbers. Source: ONNX's description of Conv."""
    way = next((a.s.decode() for a in node.attribute if a.name == "auto_pad"), "NOTSET")
    if way not in ("SAME_UPPER", "SAME_LOWER"):
        return [0, 0] * len(kernel)
    before, after = [], []
    for size, out, k, s in zip(sizes[node.input[0]][2:], sizes[node.output[0]][2:], kernel, strides, strict=True):
        total = max((out - 1) * s + k - size, 0)
        least = total // 2
        before.append(least if way == "SAME_UPPER" else total - least)
        after.append(total - before[-1])
    return [*before, *after]


def _simulation(folder: str, target: str) -> None:
    command = [
        "g++", "-O2", "-fPIC", "-std=c++11", "-fno-gnu-unique", "-Ifirmware/ap_types/", '-DWEIGHTS_DIR="weights"', "-shared",
        f"firmware/{NAME}.cpp", f"{NAME}_bridge.cpp", "-o", _LIBRARY,
    ]  # fmt: skip
    code, said = vendor.call(command, folder)
    if code != 0:
        raise vendor.failed("g++", code, said)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.write(os.path.join(folder, _LIBRARY), _LIBRARY)
        weights = os.path.join(folder, "firmware", "weights")
        for name in sorted(os.listdir(weights)):
            if name.endswith(".txt"):
                archive.write(os.path.join(weights, name), f"weights/{name}")
    os.unlink(os.path.join(folder, _LIBRARY))


def _pack(folder: str, target: str) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for place, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                member = os.path.relpath(os.path.join(place, name), folder)
                if member not in _OURS:
                    with open(os.path.join(place, name), "rb") as stream:
                        archive.writestr(zipfile.ZipInfo(member, _EPOCH), stream.read())


def _refusal(text: str, network: str) -> job.Refused:
    sys.stderr.write(text + "\n")
    missing = re.search(r"[Uu]nsupported (?:operation|layer) type:? (\w+)", text)
    if missing:
        nodes = [node for node in onnx.load(network).graph.node if node.op_type == missing[1]]
        where = f" (node {nodes[0].name or nodes[0].output[0]!r})" if nodes else ""
        return job.Refused("bad_model", f"hls4ml has no operator {missing[1]}{where}")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it does not say why")
    return job.Refused("bad_model", f"hls4ml can't take this network: {last[:400]}")


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(functools.partial(load, r), r, p)})
