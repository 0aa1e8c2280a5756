"""Ranges of activations, gathered over calibration samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.children import statistics
from edgefleet_controller.compile.children.measure import SampleFile
from safetensors.numpy import save_file
from support.networks import Net


@pytest.mark.filterwarnings("error")
def test_values_next_to_the_largest_that_there_are_have_ranges_too(tmp_path: Path) -> None:
    """From the lowest to the highest is more than float32 holds."""
    net = Net(3)
    net.conv(3, 8)
    pictures = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    pictures[0, 0, 0, :2] = -3e38, 3e38
    save_file({"image": pictures}, tmp_path / "samples")
    model = onnx.shape_inference.infer_shapes(net.model([1, 8, 32, 32]))
    samples = SampleFile(str(tmp_path / "samples"))
    ranges = statistics.collect(model, samples, lambda *_: None, histograms=True).ranges["image"]
    for low, high in ranges.values():
        assert -3.1e38 < low <= 0 <= high < 3.1e38
    np.testing.assert_allclose(ranges["minmax"], (-3e38, 3e38), rtol=1e-6)
