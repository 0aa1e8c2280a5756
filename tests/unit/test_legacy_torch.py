"""The one foreign pickle that is read: only tensors come out, nothing is called."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from edgefleet_controller.source.importers.legacy_torch import read_weights
from edgefleet_shared.errors import ModelError

HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


class Global:
    """Pickles as a reference to ``module.name``."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    def __init__(self, function: Global, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments


class Persistent(tuple):
    pass


class Writer(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python can be taught to write foreign names
    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if isinstance(obj, Persistent) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(b"c" + obj.module.encode() + b"\n" + obj.name.encode() + b"\n")
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


def dump(value: Any) -> bytes:
    import io

    stream = io.BytesIO()
    Writer(stream, 2).dump(value)
    return stream.getvalue()


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 6) -> Call:
    storage = Persistent(("storage", Global("torch", "FloatStorage"), "k", "cpu", count, None))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, size, stride, False, OrderedDict()))


def file(value: Any, numbers: Any = range(6)) -> bytes:
    data = np.array(list(numbers), "<f4")
    return HEADER + dump(value) + pickle.dumps(["k"], 2) + len(data).to_bytes(8, "little") + data.tobytes()


def test_a_tensor_comes_out_with_its_strides() -> None:
    found = read_weights(file({"w": tensor((3, 2), (1, 3))}))
    assert found["w"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("collections", "Counter")]
)
def test_any_other_name_is_refused_and_never_called(module: str, name: str, tmp_path: Any) -> None:
    witness = tmp_path / "witness"
    with pytest.raises(ModelError, match=f"refused {module}.{name}"):
        read_weights(file({"w": Call(Global(module, name), (f"touch {witness}",))}))
    assert not os.path.exists(witness)


def test_a_header_that_calls_is_refused() -> None:
    with pytest.raises(ModelError, match=r"refused os\.system"):
        read_weights(dump(Call(Global("os", "system"), ("true",))))


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((7,), (1,), 0), ((2,), (1,), 5), ((3, 2), (10, 1), 0), ((2,), (-1,), 3)]
)
def test_a_tensor_outside_its_storage_is_refused(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> None:
    with pytest.raises(ModelError, match="outside its storage"):
        read_weights(file({"w": tensor(size, stride, offset)}))


def test_a_file_cut_short_is_refused() -> None:
    with pytest.raises(ModelError, match="weights file"):
        read_weights(file({"w": tensor((6,), (1,))})[:-4])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04zip", pickle.dumps(1)])
def test_another_format_is_refused(content: bytes) -> None:
    with pytest.raises(ModelError):
        read_weights(content)
