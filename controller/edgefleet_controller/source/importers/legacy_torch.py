"""Weights in PyTorch's legacy ``.pth`` format (before 1.6): receives bytes, hands on named arrays. No torch needed.

The file is a chain of pickles followed by raw storages. edgefleet never uses pickle as a format of its own, and never
unpickles with the standard ``Unpickler``, whose ``find_class`` may import and call anything. A published network in this
format still has to be read, so :class:`_Weights` resolves exactly three names, each to a harmless constructor of this
module, and refuses every other before it is imported or called; the header pickles are read by one that resolves none.
The bytes are checked against a pinned hash by the caller before they come here. Source: ``torch/serialization.py``,
``_legacy_save`` and ``_legacy_load``.
"""

from __future__ import annotations

import io
import pickle  # see the module's docstring: restricted to data, on bytes of a pinned hash
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
from edgefleet_shared.errors import ModelError

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


class _Storage:
    """A flat array whose bytes follow after the pickles."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.values: npt.NDArray[Any] = np.empty(0, self.dtype)


class _Tensor:
    """A strided view into a storage."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_ignored: Any) -> None:
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor without a storage")
        self.storage, self.offset, self.size, self.stride = storage, int(offset), tuple(size), tuple(stride)

    def array(self) -> npt.NDArray[Any]:
        flat = self.storage.values
        # The last element that the view touches must lie inside: as_strided itself checks nothing.
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if min((self.offset, *self.stride)) < 0 or min(self.size, default=1) < 1 or last >= len(flat):
            raise ModelError("the weights file describes a tensor outside its storage")
        strides = [s * flat.itemsize for s in self.stride]
        view: npt.NDArray[Any] = np.lib.stride_tricks.as_strided(flat[self.offset :], self.size, strides)
        return np.array(view)


class _Plain(pickle.Unpickler):
    """Numbers, text, lists and mappings; no name is resolved."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused {module}.{name}")


class _Weights(_Plain):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _DTYPES:
            return name
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _location, _count, view = pid[:6]
        if view is not None:
            raise pickle.UnpicklingError("views of storages are not supported")
        return self.storages.setdefault(str(key), _Storage(_DTYPES[kind]))


def read_weights(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """The state dict of a legacy ``.pth``.

    Raises:
        ModelError: not that format, cut short, or it names anything but tensors.
    """
    stream = io.BytesIO(content)
    try:
        if _Plain(stream).load() != _MAGIC:
            raise ModelError("not a legacy PyTorch weights file")
        _Plain(stream).load()  # protocol version
        _Plain(stream).load()  # byte order and integer sizes of the writer
        reader = _Weights(stream)
        state = reader.load()
        for key in _Plain(stream).load():
            storage = reader.storages[str(key)]
            count = int.from_bytes(stream.read(8), "little")
            storage.values = np.frombuffer(stream.read(count * storage.dtype.itemsize), storage.dtype)
            if len(storage.values) != count:
                raise ModelError("the weights file is cut short")
        return {str(name): tensor.array() for name, tensor in state.items() if isinstance(tensor, _Tensor)}
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
        raise ModelError(f"can't read the weights file: {exc}") from exc
