"""Plain post-training quantization, as a user of the tool would write it; run in a toolchain's own environment by ``compile.py``.

``python compile_peers.py ort|nncf REQUEST``; the request is JSON: ``network``, ``calibration`` (safetensors), ``compiled`` (file to write),
``reduce_range``. Source of the recipes: onnxruntime's quantization guide and NNCF's README, with their defaults but for per-channel weights
and 7-bit weights where the processor lacks VNNI, which both recommend.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def samples(path: str) -> list[dict[str, Any]]:
    tensors = load_file(path)
    count = len(next(iter(tensors.values())))
    return [{name: np.ascontiguousarray(a[i : i + 1]) for name, a in tensors.items()} for i in range(count)]


def by_onnxruntime(request: dict[str, Any]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, Any]] = iter(samples(request["calibration"]))

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    quantize_static(
        request["network"], request["compiled"], Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        reduce_range=request["reduce_range"], weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        extra_options={"QDQDisableWeightAdjustForInt32Bias": True},  # without it 1.32 raises on biases of shape [C, 1, 1]
    )  # fmt: skip


def by_nncf(request: dict[str, Any]) -> None:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it calls home
    import nncf
    import openvino as ov

    overflow = nncf.quantization.advanced_parameters.OverflowFix
    feeds = samples(request["calibration"])
    model = nncf.quantize(
        ov.Core().read_model(request["network"]), nncf.Dataset(feeds), preset=nncf.QuantizationPreset.MIXED, subset_size=len(feeds),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=overflow.ENABLE if request["reduce_range"] else overflow.DISABLE
        ),
    )  # fmt: skip
    for port in (*model.inputs, *model.outputs):
        port.get_any_name()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(request["compiled"], "w") as archive:
        ov.save_model(model, os.path.join(folder, "model.xml"), compress_to_fp16=False)
        for member in ("model.xml", "model.bin"):
            archive.write(os.path.join(folder, member), member)


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as stream:
        {"ort": by_onnxruntime, "nncf": by_nncf}[sys.argv[1]](json.load(stream))
