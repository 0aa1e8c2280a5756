"""Stage 1, source: samples from a Python function of the operator's. Receives ``file.py:function``, hands on a safetensors file that it wrote.

The function runs in a child process, with the interpreter and the packages of this program, in the folder of its file: it may crash, hang, print or go on
for ever, and leaves nothing behind here, however this program ends. It is the operator's own code on the operator's own machine, run with the operator's rights; a controller never runs one.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from pathlib import Path

from edgefleet_shared.errors import DataError, ToolchainError

from edgefleet_controller.compile.port import MAX_BLOB_BYTES
from edgefleet_controller.compile.watching import Child, last_line, watch

ENTRY = re.compile(r"^(?P<file>[^:]+\.py):(?P<function>[A-Za-z_][A-Za-z0-9_]*)$")
LIMIT_S = 1800.0

# What runs in the child: file, function, how many (or 0), how many bytes at most and the file to write are its arguments.
_CHILD = """
import importlib.util, itertools, sys
import numpy as np
from safetensors.numpy import save_file

file, function, count, most_bytes, target = sys.argv[1:]
spec = importlib.util.spec_from_file_location("edgefleet_entry", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if not callable(getattr(module, function, None)):
    sys.exit(f"there is no function {function}")
rows, held_bytes = {}, 0
given = getattr(module, function)()
for number, sample in enumerate(itertools.islice(given, int(count) or None)):
    if not isinstance(sample, dict) or not sample:
        sys.exit(f"sample {number} is a {type(sample).__name__}, expected a dict of arrays by input name")
    if rows and rows.keys() != sample.keys():
        sys.exit(f"sample {number} has the inputs {', '.join(sample)}, the first one {', '.join(rows)}")
    for name, value in sample.items():
        value = np.asarray(value)
        if value.dtype.name not in ("uint8", "float32", "float16", "int8", "int32", "int64", "bool"):
            sys.exit(f"sample {number}: {name} is {value.dtype}, expected uint8 (a picture), float32, or what else the network takes")
        if name in rows and (value.shape, value.dtype) != (rows[name][0].shape, rows[name][0].dtype):
            sys.exit(f"sample {number}: {name} is {value.dtype} {value.shape}, the first one {rows[name][0].dtype} {rows[name][0].shape}")
        rows.setdefault(name, []).append(value)
        held_bytes += value.nbytes
    if held_bytes > int(most_bytes):
        sys.exit(f"its first {number + 1} samples take more than the {int(most_bytes):,} bytes that there is room for; where it has no end, say how many by count")
if not rows:
    sys.exit("it yields no sample")
save_file({name: np.stack(values) for name, values in rows.items()}, target)
"""


def write(
    split: str,
    base: Path,
    entry: str,
    count: int | None,
    target: Path,
    *,
    limit_s: float = LIMIT_S,
    most_bytes: int = MAX_BLOB_BYTES,
) -> None:
    """Run an entry point and have its samples written.

    The function takes no argument and yields samples: dicts of one array per input, without a batch axis, uint8 pictures (height x width x channels,
    in the input's size) or arrays as the network takes them.

    Args:
        entry: ``file.py:function``, the file relative to ``base``.
        count: how many samples to take; None for all.

    Raises:
        DataError: no such file or function; it raised, yields something else, more than ``most_bytes``, or takes longer than ``limit_s``.
    """
    found = ENTRY.match(entry)
    if found is None:
        raise DataError(f"{split}: {entry!r} is no entry point", hint="write file.py:function")
    file = (base / found["file"]).resolve()
    if not file.is_file():
        raise DataError(f"{split}: no file {file}", hint="paths are relative to the manifest's file")
    asked = [str(file), found["function"], str(count or 0), str(most_bytes), str(target)]
    with tempfile.TemporaryDirectory() as folder:
        child = Child(
            name=f"{split}: {entry}", command=[sys.executable, "-c", _CHILD, *asked], environment={**os.environ, "PYTHONHASHSEED": "0"},
            folder=file.parent, log=Path(folder) / "log", limit_s=limit_s,
        )  # fmt: skip
        try:
            status = watch(child, lambda _: None, threading.Event())
        except ToolchainError as exc:
            raise DataError(exc.message) from exc
        if status > 0:
            raise DataError(f"{child.name} failed: {last_line(child.log)}")
        if status < 0:
            raise DataError(f"{child.name} failed: status {status}")
        if not target.is_file():
            raise DataError(f"{child.name} failed: it ended the process before it had given all samples")
