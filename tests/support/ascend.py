"""Huawei's ``acl`` (pyACL) as recorded: names, signatures and manners of what our adapter calls, on a device whose memory is bytes apart.

Recorded from CANN's "pyACL API reference" and its samples (which functions answer a status, which a value and a status, which a value
alone). A file is ``OM`` and a seed of the tests' network. Whatever was given and not given back stands in :attr:`Npu.held`; a copy of the wrong kind or of too
much is refused by status, as the library does it.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import artifacts

_FLOAT = 0
_REFUSED = 507899  # ACL_ERROR_RT_INTERNAL_ERROR: any status but 0 is a refusal
_SHAPES = {"input": (1, artifacts.SIDE, artifacts.SIDE, artifacts.CHANNELS), "output": (1, artifacts.CLASSES)}


class Npu:
    """The device: how many there are, whether the program runs on it, and what it gave that was not given back."""

    def __init__(self) -> None:
        self.count, self.on_device = 1, False
        self.held: dict[str, set[int]] = {}
        self.memory: dict[int, Any] = {}
        self.initialised = 0
        self.fail: dict[str, int] = {}  # function -> the status that it answers
        self._next = itertools.count(0x1000_0000, 1 << 16)

    def give(self, what: str) -> int:
        number = next(self._next)
        self.held.setdefault(what, set()).add(number)
        return number

    def take(self, what: str, number: int) -> int:
        if number not in self.held.get(what, set()):
            return _REFUSED
        self.held[what].remove(number)
        return 0

    @property
    def left(self) -> dict[str, set[int]]:
        return {what: numbers for what, numbers in self.held.items() if numbers}


def acl(npu: Npu) -> types.ModuleType:
    """The module, with this device."""
    module, rt, mdl = (types.ModuleType(name) for name in ("acl", "acl.rt", "acl.mdl"))
    models: dict[int, int] = {}
    descriptions: dict[int, int] = {}
    buffers: dict[int, tuple[int, int]] = {}
    datasets: dict[int, list[int]] = {}

    def status(name: str) -> int:
        return npu.fail.get(name, 0)

    def init(config_path: str | None = None) -> int:
        npu.initialised += 1
        return status("init") or (100002 if npu.initialised > 1 else 0)

    def set_device(device_id: int) -> int:
        npu.held.setdefault("device", set()).add(device_id)
        return status("set_device")

    def malloc(size: int, policy: int) -> tuple[int, int]:
        if status("malloc"):
            return 0, status("malloc")
        address = npu.give("memory")
        npu.memory[address] = ctypes.create_string_buffer(size)
        return address, 0

    def free(dev_ptr: int) -> int:
        npu.memory.pop(dev_ptr, None)
        return npu.take("memory", dev_ptr)

    def memcpy(dst: int, dest_max: int, src: int, count: int, direction: int) -> int:
        on_device = [dst in npu.memory, src in npu.memory]
        # Where the program runs on the device, all memory is the device's, and the library is told so.
        wanted = {1: [True, False], 2: [False, True]}.get(direction)
        if npu.on_device != (direction == 3) or (wanted is not None and on_device != wanted):
            return _REFUSED
        if count > dest_max or any(
            address in npu.memory and count > len(npu.memory[address]) for address in (dst, src)
        ):
            return _REFUSED
        ctypes.memmove(npu.memory.get(dst, dst), npu.memory.get(src, src), count)
        return 0

    def load_from_file(model_path: str) -> tuple[int, int]:
        content = Path(model_path).read_bytes()
        if content[:2] != b"OM" or len(content) != 3:
            return 0, 145011
        number = npu.give("model")
        models[number] = content[2]
        return number, 0

    def get_desc(model_desc: int, model_id: int) -> int:
        descriptions[model_desc] = model_id
        return 0 if model_id in models else _REFUSED

    def create_data_buffer(data_addr: int, size: int) -> int:
        number = npu.give("buffer")
        buffers[number] = (data_addr, size)
        return number

    def create_dataset() -> int:
        number = npu.give("dataset")
        datasets[number] = []
        return number

    def add_dataset_buffer(dataset: int, data_buffer: int) -> tuple[int, int]:
        datasets[dataset].append(data_buffer)
        return dataset, 0

    def execute(model_id: int, input_dataset: int, output_dataset: int) -> int:
        if status("execute"):
            return status("execute")
        (source,), (target,) = datasets[input_dataset], datasets[output_dataset]
        x = np.frombuffer(npu.memory[buffers[source][0]], np.float32, int(np.prod(_SHAPES["input"])))
        y = artifacts.truth(models[model_id], x.reshape(_SHAPES["input"])).astype(np.float32)
        ctypes.memmove(npu.memory[buffers[target][0]], y.tobytes(), y.nbytes)
        return 0

    def dims(what: str) -> Any:
        return lambda model_desc, index: (
            {"name": what, "dimCount": len(_SHAPES[what]), "dims": list(_SHAPES[what])},
            0,
        )

    rt_functions = {
        "get_device_count": lambda: (npu.count, status("get_device_count")),
        "get_run_mode": lambda: (0 if npu.on_device else 1, 0),
        "set_device": set_device,
        "reset_device": lambda device_id: npu.take("device", device_id),
        "create_context": lambda device_id: (npu.give("context"), 0),
        "destroy_context": lambda context: npu.take("context", context),
        "malloc": malloc, "free": free, "memcpy": memcpy,
    }  # fmt: skip
    mdl_functions = {
        "load_from_file": load_from_file,
        "unload": lambda model_id: npu.take("model", model_id),
        "create_desc": lambda: npu.give("description"),
        "destroy_desc": lambda model_desc: npu.take("description", model_desc),
        "get_desc": get_desc,
        "create_dataset": create_dataset,
        "destroy_dataset": lambda dataset: npu.take("dataset", dataset),
        "add_dataset_buffer": add_dataset_buffer,
        "execute": execute,
    } | {
        f"get_{what}_{of}": function
        for what in ("input", "output")
        for of, function in {
            "dims": dims(what),
            "data_type": lambda model_desc, index: _FLOAT,
            "size_by_index": lambda model_desc, index, what=what: int(np.prod(_SHAPES[what])) * 4,
        }.items()
    } | {"get_num_inputs": lambda model_desc: 1, "get_num_outputs": lambda model_desc: 1}  # fmt: skip
    own = {
        "init": init, "finalize": lambda: 0, "create_data_buffer": create_data_buffer,
        "destroy_data_buffer": lambda data_buffer: npu.take("buffer", data_buffer),
    }  # fmt: skip
    for part, functions in ((rt, rt_functions), (mdl, mdl_functions), (module, own)):
        for name, function in functions.items():
            setattr(part, name, function)
    module.rt, module.mdl = rt, mdl  # type: ignore[attr-defined]
    return module


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Npu:
    """Make ``acl`` importable from a folder like CANN's, for the rest of a test. Returns the device."""
    package = folder / "ascend-toolkit" / "8.0.RC3" / "python" / "site-packages"
    npu = Npu()
    made = acl(npu)
    # find_spec answers from here what it would find on the path.
    made.__spec__ = types.SimpleNamespace(origin=str(package / "acl.so"), name="acl")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "acl", made)
    return npu
