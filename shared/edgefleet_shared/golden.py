"""Golden pictures and their float reference, as one safetensors blob. Read by the accepting child, written by the compiler.

Tensors: ``input.<name>`` (uint8 N x H x W x C pictures when the model has a :class:`PictureEncoding`, else the input tensor
itself, first axis N) and ``reference.<name>`` (the float model's output, float32, first axis N). numpy is imported here,
so the resident agent never imports this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgefleet_shared.contract import PictureEncoding
from edgefleet_shared.errors import ArtifactError

Array = npt.NDArray[Any]


def encode_pictures(pictures: Array, encoding: PictureEncoding) -> Array:
    """Pictures (uint8, N x H x W x C, RGB) as the network's input (float32, N x C x H x W or N x H x W x C)."""
    x = pictures[..., ::-1] if encoding.colour == "BGR" else pictures
    mean, std = np.asarray(encoding.mean, np.float32), np.asarray(encoding.std, np.float32)
    x = (x.astype(np.float32) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if encoding.layout == "NCHW" else x)


def pack(inputs: dict[str, Array], references: dict[str, Array]) -> bytes:
    """The golden blob."""
    tensors = {f"input.{name}": np.ascontiguousarray(a) for name, a in inputs.items()}
    tensors |= {f"reference.{name}": np.ascontiguousarray(a, dtype=np.float32) for name, a in references.items()}
    return bytes(save(tensors))


def unpack(content: bytes, encoding: PictureEncoding | None) -> tuple[dict[str, Array], dict[str, Array]]:
    """(inputs ready for the network, references), each by tensor name, first axis N.

    Raises:
        ArtifactError: not safetensors, nothing in it, or counts that differ.
    """
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as exc:
        raise ArtifactError(f"golden pictures are not safetensors: {exc}") from exc
    inputs = {k[len("input.") :]: v for k, v in tensors.items() if k.startswith("input.")}
    references = {k[len("reference.") :]: v for k, v in tensors.items() if k.startswith("reference.")}
    counts = {len(a) if a.ndim else 0 for a in (*inputs.values(), *references.values())}
    if not inputs or not references or len(counts) != 1 or counts == {0}:
        raise ArtifactError("golden pictures need inputs and references of one and the same count above 0")
    if encoding is not None:
        inputs = {
            k: encode_pictures(v, encoding) if v.dtype == np.uint8 and v.ndim == 4 else v for k, v in inputs.items()
        }
    return inputs, references
