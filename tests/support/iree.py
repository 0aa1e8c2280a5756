"""Small networks through IREE's compiler, for this machine. The compiler has an environment of its own; a board never has one."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from edgefleet_controller.compile.toolchains import Toolchains

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
OPTIONS = (
    "--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu", "--iree-llvmcpu-target-cpu=generic",
)  # fmt: skip


@functools.cache
def module(network: bytes) -> bytes:
    """A .vmfb of an ONNX network."""
    programs = Path(Toolchains(CACHE).ensure("iree").python).parent
    with tempfile.TemporaryDirectory() as folder:
        source, imported, compiled = (Path(folder, name) for name in ("m.onnx", "m.mlir", "m.vmfb"))
        source.write_bytes(network)
        for command in (
            [programs / "iree-import-onnx", source, "-o", imported],
            [programs / "iree-compile", imported, *OPTIONS, "-o", compiled],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
        return compiled.read_bytes()
