"""Stage 2, compile: pictures as people see them. Receives a version's split, hands on the pictures in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from edgefleet_shared.artifact import Layout
from safetensors.numpy import load

from edgefleet_controller.compile.port import MAX_BLOB_BYTES
from edgefleet_controller.model_version import ModelVersion, Split


def pictures_of(version: ModelVersion, split: Split, layout: Layout) -> npt.NDArray[Any] | None:
    """uint8, N x H x W x C; None where the samples are tensors, or pictures that came encoded."""
    if version.encoding is None:
        return None
    (array,) = load(layout.read(split.digest, MAX_BLOB_BYTES)).values()
    return array if array.dtype == np.uint8 and array.ndim == 4 else None
