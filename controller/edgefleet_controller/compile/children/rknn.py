"""Stage 2, compile: RKNN-Toolkit2. Makes an .rknn for one Rockchip NPU from ONNX, and answers by its simulator.

The simulator runs what was just built, never a file, so the stand-in is what to build: a ZIP, stored, of network, calibration samples and
settings; building again takes seconds. Inputs stay as the network has them (float, N x C x H x W); whoever runs the file says so.
Source: Rockchip's RKNN-Toolkit2 API reference (``config``, ``load_onnx``, ``build``, ``hybrid_quantization_step1`` and ``step2``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from rknn.api import RKNN

from . import job
from .measure import Array, Run, SampleFile, measure

ALGORITHMS = {"minmax": "normal", "mse": "mmse", "entropy": "kl_divergence"}
MOST_SAMPLES = 100  # for calibration: the toolkit holds all of them in memory
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MEMBERS = ("network.onnx", "settings.json")


def load(request: job.Request, path: str) -> Run:
    """The simulator. Request: ``inputs`` and ``outputs``, names in order."""
    with _unpacked(path) as folder:
        with open(os.path.join(folder, "settings.json"), encoding="utf-8") as stream:
            settings = json.load(stream)
        toolkit = _build(folder, settings)
    _done(toolkit.init_runtime(), "start its simulator")

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        values = [feeds[name] for name in request["inputs"]]
        # Each as the network has it, whatever its axes are; "nhwc" would be turned, and what has other than four axes wants a word, too.
        found = toolkit.inference(inputs=values, data_format=["nchw" for _ in values])
        if found is None:
            raise job.Refused("toolchain_failed", "rknn's simulator answered nothing; its log says why")
        if len(found) != len(request["outputs"]):
            raise job.Refused(
                "bad_model",
                f"rknn gives {len(found)} of the network's {len(request['outputs'])} outputs: it drops what is the same for every input",
                "leave constant outputs out of the network",
            )
        return {name: np.array(value) for name, value in zip(request["outputs"], found, strict=True)}

    return run


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``calibration``, ``options`` (``chip``, ``optimization_level``), ``jobs`` (each ``recipe``, ``network``, ``compiled``,
    ``stand_in``)."""
    for number, one in enumerate(request["jobs"]):
        progress("converting", number, len(request["jobs"]))
        samples = SampleFile(request["calibration"], MOST_SAMPLES) if one["recipe"]["precision"] == "int8" else None
        _pack(
            one["stand_in"], one["network"], request["options"] | {"recipe": one["recipe"]}, samples, request["inputs"]
        )
        with _unpacked(one["stand_in"]) as folder:
            with open(os.path.join(folder, "settings.json"), encoding="utf-8") as stream:
                settings = json.load(stream)
            toolkit = _build(folder, settings)
            _done(toolkit.export_rknn(one["compiled"]), "write the file")
            toolkit.release()
    progress("converting", len(request["jobs"]), len(request["jobs"]))
    return {}


def _build(folder: str, settings: dict[str, Any]) -> Any:
    """The toolkit with the network built; an operator that the chip lacks is refused here: the toolkit only prints a line, and leaves it to code that nobody wrote."""
    network = os.path.join(folder, "network.onnx")
    try:
        with _printed() as printed:
            toolkit = _steps(network, os.path.join(folder, "dataset.txt"), settings)
    except job.Refused:
        raise
    except Exception as exc:  # the toolkit raises what it met
        raise _refusal(str(exc)) from exc
    lacking = re.search(r"No lowering found for: (.+?), node type = (\w+)", printed[0])
    if lacking:
        raise job.Refused("bad_model", f"rknn has no operator {lacking[2]} (node {lacking[1]!r})")
    return toolkit


def _steps(network: str, dataset: str, settings: dict[str, Any]) -> Any:
    toolkit = RKNN(verbose=False)
    recipe = settings["recipe"]
    int8 = recipe["precision"] == "int8"
    _done(
        toolkit.config(
            target_platform=settings["chip"],
            quantized_dtype="w8a8",
            quantized_algorithm=ALGORITHMS.get(recipe["ranges"], "normal"),
            quantized_method="channel" if recipe["granularity"] == "channel" else "layer",
            optimization_level=settings["optimization_level"],
        ),
        "take these settings",
    )
    _done(toolkit.load_onnx(model=network), "read the network")
    if not recipe["in_float"]:
        _done(toolkit.build(do_quantization=int8, dataset=dataset if int8 else None), "build the network")
        return toolkit
    # In two steps: the first writes files named like the network into the working folder, the second, a toolkit of its own, reads them.
    edges = _edges(network, recipe["in_float"])
    _done(toolkit.hybrid_quantization_step1(dataset=dataset, custom_hybrid=edges), "leave layers in float")
    parts = [f"network{ending}" for ending in (".model", ".data", ".quantization.cfg")]
    toolkit.release()
    toolkit = RKNN(verbose=False)
    _done(toolkit.hybrid_quantization_step2(*parts), "build the network with layers in float")
    return toolkit


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
    """What the toolkit and its native code print meanwhile, as the list's one item afterwards; it goes into the log too."""
    said: list[str] = []
    with tempfile.TemporaryFile(dir=".") as file:
        kept = os.dup(1), os.dup(2)
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield said
        finally:
            ctypes.CDLL(None).fflush(None)  # native code writes through C's buffers
            sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
            sys.stderr.write(said[0])


def _edges(network: str, in_float: list[str]) -> list[list[str]]:
    """Each node that stays in float as the toolkit wants it: what goes in and what comes out."""
    return [[node.input[0], node.output[0]] for node in onnx.load(network).graph.node if node.name in in_float]


def _done(status: int | None, what: str) -> None:
    if status not in (0, None):
        raise job.Refused("toolchain_failed", f"rknn can't {what} (status {status}); its log says why")


def _refusal(text: str) -> job.Refused:
    """The toolkit's exception, whose text is a traceback of its own."""
    told = re.findall(r"^\w*(?:Error|Exception): .+", text, re.M)
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it does not say why")
    return job.Refused("bad_model", f"rknn can't compile this network: {(told[-1] if told else last)[:400]}")


def _pack(path: str, network: str, settings: dict[str, Any], samples: SampleFile | None, inputs: list[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        content = _with_short_edges(onnx.load(network)).SerializeToString(deterministic=True)
        archive.writestr(zipfile.ZipInfo("network.onnx", _EPOCH), content)
        archive.writestr(zipfile.ZipInfo("settings.json", _EPOCH), json.dumps(settings, sort_keys=True))
        names = []
        for index in range(len(samples) if samples else 0):
            assert samples is not None
            row: list[str] = []
            sample = samples[index]
            for value in (sample[name] for name in inputs):
                row.append(f"{index:04}-{len(row)}.npy")
                with archive.open(zipfile.ZipInfo(row[-1], _EPOCH), "w") as stream:
                    np.save(stream, value, allow_pickle=False)
            names.append(" ".join(row))
        archive.writestr(zipfile.ZipInfo("dataset.txt", _EPOCH), "\n".join(names) + "\n")


def _with_short_edges(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with inputs and outputs called ``in0``, ``out0``, ...: the toolkit cuts names off at 127 characters and then misses them. Whoever
    runs the file goes by their order."""
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    renamed: dict[str, str] = {}
    for kind, values in (("in", graph.input), ("out", graph.output)):
        for place, value in enumerate(values):
            short = f"{kind}{place}"
            while short in taken:
                short += "_"
            value.name = renamed.setdefault(value.name, short)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for known in graph.value_info:
        known.name = renamed.get(known.name, known.name)
    return model


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[str]:
    """Its members, all plain names that :func:`_pack` gave, in a folder of their own; the toolkit writes beside them and into the working
    folder."""
    with tempfile.TemporaryDirectory(dir=".") as folder, zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as source, open(os.path.join(folder, os.path.basename(member)), "wb") as copy:
                shutil.copyfileobj(source, copy)
        yield os.path.abspath(folder)


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(functools.partial(load, r), r, p)})
