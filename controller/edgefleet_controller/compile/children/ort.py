"""Stage 2, compile: onnxruntime. Simplifies networks, answers for the float reference, gathers statistics, writes QDQ int8, measures.

What it writes in int8 is compiled further by every target whose engine reads QDQ.
"""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.numpy import save_file

from . import gathered, half, job, opset, qdq, sensitivity, statistics
from .int8_weights import Settling
from .measure import Array, Run, SampleFile, measure, run_all
from .moved_halves import move_in_float
from .readings import pools_first
from .scaled import scale_by_convolutions
from .slopes import slopes_apart
from .tidy import tidy
from .typed import write_types

onnxruntime.disable_telemetry_events()

COPIES = 4  # of a network that its simplifier has on the disk at most, in whole or in part
LOOKED_AT = 4  # samples that tell a network from one that computes something else
DRAWING = ("Dropout", "Bernoulli", "Multinomial")  # beside those whose names say so
SAME_DB = 40.0  # signal to noise, from which two ways of computing one network are one; float32's own rounding leaves 80 and more
ROUNDED = 1e-6  # what float32 may be off by about one: of answers next to zero that a Sigmoid gives, more than there is of them


def load(path: str, *, int8_kernels: bool = True) -> Run:
    """A session on one thread, on the CPU. Without ``int8_kernels`` it rounds as QDQ says and computes in float, as a stand-in for another
    device: the CPU's own kernels saturate where it has no VNNI."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not int8_kernels:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def prepare(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Simplify a network and answer the samples with it in float.

    Request: ``network``, ``simplified`` (file to write), ``formed`` (file to write where onnxruntime is faster at the network in another form), ``samples`` and
    ``references`` (lists of files, in pairs).
    """
    progress("simplifying", 0, 1)
    try:
        run = load(request["network"])
    except Exception as exc:  # onnxruntime's own classes share no base but this
        raise _refusal(exc, request["network"]) from exc
    with tempfile.TemporaryDirectory(dir=".") as folder:
        source = os.path.join(folder, "network.onnx")
        onnx.save(opset.of_today(onnx.load(request["network"])), source)
        job.need_room(tempfile.gettempdir(), COPIES * os.path.getsize(source))
        quant_pre_process(source, request["simplified"], skip_symbolic_shape=True)
    tidy(request["simplified"])
    move_in_float(request["simplified"])
    write_types(request["simplified"])
    networks = [request["simplified"]]
    if form({"network": request["simplified"], "formed": request["formed"]}, progress)["formed"]:
        networks.append(request["formed"])
    progress("simplifying", 1, 1)
    _repeats(run, request["network"], SampleFile(request["samples"][0], LOOKED_AT), progress)
    for samples, references in zip(request["samples"], request["references"], strict=True):
        save_file(_answers(run, request["network"], SampleFile(samples), progress), references)
    for network in networks:
        _same(run, load(network), SampleFile(request["samples"][0], LOOKED_AT), progress)
    return {"engine_version": onnxruntime.__version__}


def form(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Write a network as onnxruntime is fast at it, unless that is as it is. Request: ``network``, ``formed`` (file to write). Returns: ``formed``, whether it is written."""
    model = onnx.shape_inference.infer_shapes(onnx.load(request["network"]))
    formed = [slopes_apart(model.graph), scale_by_convolutions(model)]
    if any(formed):
        onnx.save(model, request["formed"])
        tidy(request["formed"])
    return {"formed": any(formed)}


def _answers(run: Run, network: str, samples: SampleFile, progress: job.Progress) -> dict[str, Array]:
    """What the network as it came says. What it can't answer is its own or the samples' fault: an index past a table's end, shapes that don't meet."""
    try:
        return run_all(run, samples, progress, "float reference")
    except (job.Refused, MemoryError):
        raise
    except Exception as exc:  # onnxruntime's own classes share no base but this
        raise _refusal(exc, network, "run") from exc


def _repeats(run: Run, network: str, samples: SampleFile, progress: job.Progress) -> None:
    """Refuse a network that answers one sample in two ways: nothing could be held against such answers, on no board."""
    once, again = (_answers(run, network, samples, progress) for _ in range(2))
    if all(np.array_equal(once[name], again[name], equal_nan=True) for name in once):
        return
    drawing = [n for n in onnx.load(network).graph.node if n.op_type.startswith("Random") or n.op_type in DRAWING]
    where = f" (operator {drawing[0].op_type}, node {drawing[0].name!r})" if drawing else ""
    raise job.Refused(
        "bad_model",
        f"the network answers one sample in two ways: it draws random numbers{where}",
        "export it in its evaluation mode, without noise and dropout",
    )


def _same(source: Run, simplified: Run, samples: SampleFile, progress: job.Progress) -> None:
    """Refuse a simplified network that answers something else: all that is made of it would, and where nothing runs here nobody would see."""
    before, after = (run_all(run, samples, progress, "simplified network") for run in (source, simplified))
    for name, want in before.items():
        want, have = (np.nan_to_num(side.astype(np.float64)) for side in (want, after[name]))
        noise, power = float(np.sum((have - want) ** 2)), float(np.sum(want**2))
        if noise > power / 10 ** (SAME_DB / 10) and np.abs(have - want).max() > ROUNDED:
            raise job.Refused(
                "bad_model",
                f"simplified, the network answers something else: {name} is off by up to {float(np.abs(have - want).max()):.3g}",
                f"export it with operator set {opset.PER_CHANNEL_OPSET} or later, simplified by its own exporter",
            )


def gather(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``simplified``, ``calibration``, ``statistics`` (file to write), ``histograms`` (whether all methods are asked for)."""
    found = statistics.collect(
        _inferred(request["simplified"]),
        SampleFile(request["calibration"]),
        progress,
        histograms=request["histograms"],
    )
    gathered.save(found, request["statistics"])
    return {}


def rank(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Noise of every layer. Request: ``simplified``, ``statistics``, ``samples``, ``count`` (how many of them), ``recipe``, ``parts`` (of the
    outputs), ``with_makers``."""
    model = _inferred(request["simplified"], fused=request["recipe"]["fused_activations"])
    known = gathered.load(request["statistics"])
    samples = SampleFile(request["samples"])
    feeds = [samples[i] for i in range(min(request["count"], len(samples)))]
    parts, with_makers = request["parts"], request["with_makers"]
    units = sensitivity.measure(model, known, feeds, request["recipe"], parts, progress, with_makers=with_makers)
    return {"units": units}


def quantize(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``simplified``, ``statistics``, ``jobs`` (each ``recipe`` and ``quantized``, the file to write)."""
    known = gathered.load(request["statistics"])
    settling = Settling(known)
    ways = {one["recipe"]["fused_activations"] for one in request["jobs"]}
    models = {fused: _inferred(request["simplified"], fused=fused) for fused in ways}
    for number, one in enumerate(request["jobs"]):
        progress("quantizing", number, len(request["jobs"]))
        model = models[one["recipe"]["fused_activations"]]
        onnx.save(qdq.quantize(model, known, one["recipe"], settling), one["quantized"])
    progress("quantizing", len(request["jobs"]), len(request["jobs"]))
    return {}


def _inferred(path: str, *, fused: bool = False) -> onnx.ModelProto:
    """A simplified network in the order in which int8 loses least.

    Args:
        fused: the engine computes activations with what is before them, where no maximum over neighbours may come between.
    """
    model = onnx.load(path)
    if not fused:
        pools_first(model)
    return onnx.shape_inference.infer_shapes(model)


def _refusal(exc: Exception, path: str, what: str = "load") -> job.Refused:
    """onnxruntime's error as a sentence that names operator and node; its own texts name one or the other."""
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
    return job.Refused("bad_model", f"onnxruntime can't {what} this network: {text.splitlines()[0]}")


def main() -> None:
    job.serve({
        "prepare": prepare, "form": form, "gather": gather, "rank": rank, "quantize": quantize, "halve": half.write,
        "measure": lambda r, p: measure(load, r, p),
    })  # fmt: skip
