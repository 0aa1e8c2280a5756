"""Stage 2, compile: ncnn. Has pnnx make its two files from ONNX, packs them as one, and measures them.

The compiled model is ``model.bin`` with a ZIP behind it that stores ``model.param``, without a time stamp: the board's engine reads weights
from the file's beginning. Inputs are blobs ``in0``, ``in1``, ...
and outputs ``out0``, ... in the network's order, without the batch axis, which is 1. Where nothing in the network tells pnnx which axis that is
(no convolution: an attention over words), it stays, and the input's line in ``model.param`` says its sizes. pnnx writes operators that ncnn has no
layer for all the same: they are refused here. Source: pnnx's README and the script that it writes, ncnn's Python binding.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import tempfile
import zipfile
from typing import Any

import ncnn
import numpy as np
import onnx

from . import job, vendor
from .measure import Array, Run, measure
from .products import with_plain_products

MEMBER = "model.param"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_NO_BATCH_AXIS = "233"  # pnnx's word for it
# What the layer Input calls its sizes, from the innermost axis outwards, by their number: w, h, d, c.
_SIZES = {1: ("0",), 2: ("0", "1"), 3: ("0", "1", "2"), 4: ("0", "1", "11", "2")}


def load(request: job.Request, path: str) -> Run:
    """A network on one thread. Request: ``inputs``, ``outputs`` and ``output_shapes``, in order."""
    network = ncnn.Net()
    network.opt.num_threads = 1
    network.opt.use_vulkan_compute = False
    for half in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(network.opt, half, False)
    with zipfile.ZipFile(path) as archive:
        param = archive.read(MEMBER).decode()
    if network.load_param_mem(param) != 0 or network.load_model(path) != 0:
        raise job.Refused("toolchain_failed", "ncnn can't load what pnnx made; the log says why")

    whole = {int(place) for place in re.findall(r"^Input\s+in(\d+)\s.*\s0=", param, re.M)}
    shapes = [[1 if size == -1 else size for size in shape] for shape in request["output_shapes"]]

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        extractor = network.create_extractor()
        held = [  # a Mat borrows its memory
            np.ascontiguousarray(feeds[name] if place in whole else feeds[name][0])
            for place, name in enumerate(request["inputs"])
        ]
        for place, value in enumerate(held):
            extractor.input(f"in{place}", ncnn.Mat(value))
        found = {}
        for place, (name, shape) in enumerate(zip(request["outputs"], shapes, strict=True)):
            status, value = extractor.extract(f"out{place}")
            if status != 0:
                raise job.Refused(
                    "toolchain_failed", f"ncnn computes no output {name!r} (status {status}); the log says why"
                )
            answer = np.array(value)
            if answer.size != np.prod(shape):
                raise job.Refused(
                    "toolchain_failed", f"ncnn's output {name!r} has shape {list(answer.shape)}, the network's {shape}"
                )
            found[name] = answer.reshape(shape)
        return found

    return run


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``jobs`` (each ``network`` in float and ``compiled``, the file to write)."""
    (home,) = importlib.util.find_spec("pnnx").submodule_search_locations  # type: ignore[union-attr,misc]
    for number, one in enumerate(request["jobs"]):
        progress("converting", number, len(request["jobs"]))
        with tempfile.TemporaryDirectory(dir=".") as folder:
            onnx.save(with_plain_products(onnx.load(one["network"])), os.path.join(folder, "model.onnx"))
            code, said = vendor.call([os.path.join(home, "pnnx"), "model.onnx", "fp16=0"], folder)
            files = [os.path.join(folder, f"model.ncnn.{ending}") for ending in ("param", "bin")]
            if code != 0 or not all(map(os.path.exists, files)):
                raise vendor.failed("pnnx", code, said)
            _check(files[0], one["network"], said)
            _say_sizes(files[0], os.path.join(folder, "model_ncnn.py"), request["inputs"], one["network"])
            _pack(files[0], files[1], one["compiled"])
    progress("converting", len(request["jobs"]), len(request["jobs"]))
    return {}


def _check(param: str, network: str, said: str) -> None:
    """Refuse the first layer that ncnn does not have, by the ONNX node where it kept that operator's name; or that it has under this name with
    other parameters: pnnx tells of those that it could not write."""
    with open(param, encoding="utf-8") as stream:
        kinds = [line.split()[0] for line in stream.read().splitlines()[2:] if line.strip()]
    for place, kind in enumerate(kinds):
        if ncnn.create_layer(kind) is None:
            raise _lacking(kinds, place, network)
    if ncnn.Net().load_param(param) != 0:
        left = set(re.findall(r"^ignore (\w+) \S+ param", said, re.M))
        place = next((place for place, kind in enumerate(kinds) if kind in left), -1)
        if place < 0:
            raise job.Refused("toolchain_failed", "ncnn can't load what pnnx made; the log says why")
        raise _lacking(kinds, place, network)


def _lacking(kinds: list[str], place: int, network: str) -> job.Refused:
    nodes = [node for node in onnx.load(network).graph.node if node.op_type == kinds[place]]
    before = kinds[:place].count(kinds[place])
    where = f" (node {nodes[before].name or nodes[before].output[0]!r})" if before < len(nodes) else ""
    return job.Refused("bad_model", f"ncnn has no operator {kinds[place]}{where}")


def _say_sizes(param: str, script: str, inputs: list[str], network: str) -> None:
    """Write the sizes of the inputs that keep their batch axis behind them, as ncnn's layer Input takes them."""
    with open(script, encoding="utf-8") as stream:
        told = re.findall(r"ex\.input\(\"(in\d+)\", .*batch_index=(\d+)\)", stream.read())
    kept = {name for name, axis in told if axis == _NO_BATCH_AXIS}
    sizes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in onnx.load(network).graph.input
    }
    with open(param, encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    for place, name in enumerate(inputs):
        if f"in{place}" not in kept:
            continue
        shape = sizes[name]
        if len(shape) not in _SIZES:
            raise job.Refused(
                "bad_model", f"ncnn can't take the input {name!r}: with its batch axis it has {len(shape)} axes"
            )
        row = next(number for number, line in enumerate(lines) if line.split()[:2] == ["Input", f"in{place}"])
        lines[row] += " " + " ".join(
            f"{key}={size}" for key, size in zip(_SIZES[len(shape)], reversed(shape), strict=True)
        )
    with open(param, "w", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")


def _pack(param: str, weights: str, target: str) -> None:
    shutil.copyfile(weights, target)
    with zipfile.ZipFile(target, "a", zipfile.ZIP_STORED) as archive, open(param, "rb") as stream:
        archive.writestr(zipfile.ZipInfo(MEMBER, _EPOCH), stream.read())


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(functools.partial(load, r), r, p)})
