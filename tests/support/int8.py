"""Small networks in int8, by the compile's own quantizer, and what onnxruntime makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from edgefleet_controller.compile.children import statistics
from edgefleet_controller.compile.children.measure import SampleFile
from safetensors.numpy import save_file

RECIPE = {
    "ranges": "minmax", "weights": "pairs", "granularity": "channel", "activations": "uint8", "scope": "all", "correct_bias": True, "in_float": [],
    "fit_weights": True, "fused_activations": False, "gates_in_int8": True, "aligned_channels": False,
}  # fmt: skip
PICTURES = np.random.default_rng(1).normal(size=(8, 3, 32, 32)).astype(np.float32)


def known_of(model: onnx.ModelProto, folder: Path) -> Any:
    """The statistics of a network over :data:`PICTURES`."""
    save_file({"image": PICTURES}, folder / "samples")
    return statistics.collect(model, SampleFile(str(folder / "samples")), lambda *_: None, histograms=False)


def answers(model: onnx.ModelProto) -> Any:
    """What comes out first for each of :data:`PICTURES`, in a row."""
    running = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([running.run(None, {"image": one[None]})[0] for one in PICTURES])


def db(have: Any, want: Any) -> float:
    """Signal to noise."""
    return float(10 * np.log10(np.sum(want**2) / np.sum((have - want) ** 2)))


def kernels(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that onnxruntime runs, in order."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    running = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    running.run(None, {"image": PICTURES[:1]})
    events = json.loads(Path(running.end_profiling()).read_text())
    return [event["args"]["op_name"] for event in events if event.get("name", "").endswith("_kernel_time")]
