"""Stage 2, compile: ncnn. Has pnnx make its two files from ONNX, packs them as one, and measures them.

The compiled model is ``model.bin`` with a ZIP behind it that stores ``model.param``, without a time stamp: the board's engine reads weights
from the file's beginning. Inputs are blobs ``in0``, ``in1``, ...
and outputs ``out0``, ... in the network's order, without the batch axis, which is 1. pnnx writes operators that ncnn has no layer for
all the same: they are refused here. Source: pnnx's README, ncnn's Python binding.
"""

from __future__ import annotations

import functools
import importlib.util
import os
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


def load(request: job.Request, path: str) -> Run:
    """A network on one thread. Request: ``inputs`` and ``outputs``, names in order."""
    network = ncnn.Net()
    network.opt.num_threads = 1
    network.opt.use_vulkan_compute = False
    for half in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(network.opt, half, False)
    with zipfile.ZipFile(path) as archive:
        param = archive.read(MEMBER).decode()
    if network.load_param_mem(param) != 0 or network.load_model(path) != 0:
        raise job.Refused("toolchain_failed", "ncnn can't load what pnnx made; the log says why")

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        extractor = network.create_extractor()
        held = [np.ascontiguousarray(feeds[name][0]) for name in request["inputs"]]  # a Mat borrows its memory
        for place, value in enumerate(held):
            extractor.input(f"in{place}", ncnn.Mat(value))
        found = {}
        for place, name in enumerate(request["outputs"]):
            status, value = extractor.extract(f"out{place}")
            if status != 0:
                raise job.Refused(
                    "toolchain_failed", f"ncnn computes no output {name!r} (status {status}); the log says why"
                )
            found[name] = np.array(value)[None]
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
            _check(files[0], one["network"])
            _pack(files[0], files[1], one["compiled"])
    progress("converting", len(request["jobs"]), len(request["jobs"]))
    return {}


def _check(param: str, network: str) -> None:
    """Refuse the first layer that ncnn does not have, by the ONNX node where it kept that operator's name."""
    with open(param, encoding="utf-8") as stream:
        kinds = [line.split()[0] for line in stream.read().splitlines()[2:] if line.strip()]
    for place, kind in enumerate(kinds):
        if ncnn.create_layer(kind) is None:
            nodes = [node for node in onnx.load(network).graph.node if node.op_type == kind]
            before = kinds[:place].count(kind)
            where = f" (node {nodes[before].name or nodes[before].output[0]!r})" if before < len(nodes) else ""
            raise job.Refused("bad_model", f"ncnn has no operator {kind}{where}")


def _pack(param: str, weights: str, target: str) -> None:
    shutil.copyfile(weights, target)
    with zipfile.ZipFile(target, "a", zipfile.ZIP_STORED) as archive, open(param, "rb") as stream:
        archive.writestr(zipfile.ZipInfo(MEMBER, _EPOCH), stream.read())


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(functools.partial(load, r), r, p)})
