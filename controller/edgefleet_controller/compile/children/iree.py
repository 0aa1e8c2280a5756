"""Stage 2, compile: IREE. Makes a .vmfb for a processor from ONNX, and a stand-in for this host where the processor is another.

The module has one function, ``main``, whose arguments and results are the network's inputs and outputs in their order, with their types
and shapes. Source: IREE's guides for ONNX (``iree-import-onnx``) and for CPUs (``iree-compile``, target llvm-cpu).
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
import tempfile
from typing import Any

import iree.compiler.tools
import iree.runtime
import numpy as np
import onnx
from iree.compiler.tools.binaries import CompilerToolError, find_tool

from . import job
from .measure import Array, Run, measure

ENTRY = "main"
# (LLVM's triple, processor, features) that every processor of an architecture has.
GENERIC = {
    "x86_64": ("x86_64-linux-gnu", "x86-64", ""),
    "aarch64": ("aarch64-linux-gnu", "generic", ""),
    "armv7l": ("armv7a-linux-gnueabihf", "generic", "+neon,+vfp4"),
    "riscv64": ("riscv64-linux-gnu", "generic-rv64", "+m,+a,+f,+d,+c"),
}


def load(request: job.Request, path: str) -> Run:
    """A module on one thread. Request: ``inputs`` and ``outputs``, names in order."""
    config = iree.runtime.Config("local-sync")
    context = iree.runtime.SystemContext(config=config)
    with open(path, "rb") as stream:
        context.add_vm_module(iree.runtime.VmModule.copy_buffer(config.vm_instance, stream.read()))
    function = context.modules.module[ENTRY]

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        found = function(*[feeds[name] for name in request["inputs"]])
        values = found if isinstance(found, (tuple, list)) else (found,)
        return {name: np.array(value) for name, value in zip(request["outputs"], values, strict=True)}

    return run


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``options`` (``arch``, ``cpu``, ``features``), ``jobs`` (each ``network``, ``compiled`` and ``stand_in``, files to
    write)."""
    options = request["options"]
    triple, cpu, features = GENERIC[options["arch"]]
    own = (triple, options["cpu"] or cpu, ",".join(filter(None, (features, options["features"]))))
    os.environ["TMPDIR"] = "."  # where iree-compile puts what it links; its paths go to a shell, unquoted
    for number, one in enumerate(request["jobs"]):
        progress("importing", number, len(request["jobs"]))
        with tempfile.TemporaryDirectory(dir=".") as folder:
            imported = _imported(one["network"], folder)
            progress("compiling", number, len(request["jobs"]))
            _compiled(imported, one["network"], one["compiled"], *own)
            if not _runs_here(options):
                progress("compiling for this host", number, len(request["jobs"]))
                _compiled(imported, one["network"], one["stand_in"], *GENERIC[platform.machine()])
    progress("compiling", len(request["jobs"]), len(request["jobs"]))
    return {}


def _runs_here(options: dict[str, Any]) -> bool:
    """Whether this host's processor is one of the class."""
    if options["arch"] != platform.machine() or options["cpu"]:
        return False
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        flags = set(stream.read().replace("_", "").split())
    wanted = {feature.lstrip("+").replace(".", "") for feature in options["features"].split(",") if feature}
    return wanted <= flags | ({"bmi"} if "bmi1" in flags else set())


def _imported(network: str, folder: str) -> bytes:
    """The network as MLIR, its graph's name being the entry point's."""
    model = onnx.load(network)
    model.graph.name = ENTRY
    renamed, imported = os.path.join(folder, "network.onnx"), os.path.join(folder, "network.mlir")
    onnx.save(model, renamed)
    command = [sys.executable, "-m", "iree.compiler.tools.import_onnx", renamed, "-o", imported]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    said = ended.stdout.decode(errors="replace")
    if ended.returncode != 0:
        sys.stderr.write(said)
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it says nothing")
        raise job.Refused("bad_model", f"iree can't import this network: {last[:400]}")
    with open(imported, "rb") as stream:
        return stream.read()


def _compiled(imported: bytes, network: str, target: str, triple: str, cpu: str, features: str) -> None:
    """Compile from standard input: a file's name would end up in the module."""
    arguments = [
        f"--iree-llvmcpu-embedded-linker-path={_linker()}",
        f"--iree-llvmcpu-target-triple={triple}", f"--iree-llvmcpu-target-cpu={cpu}",
        f"--iree-llvmcpu-target-cpu-features={features}", "--iree-llvmcpu-stack-allocation-limit=262144",
        "--iree-opt-level=O3", "--iree-llvmcpu-debug-symbols=false", "--iree-vm-bytecode-module-strip-source-map=true",
    ]  # fmt: skip
    try:
        iree.compiler.tools.compile_str(
            imported, input_type="onnx", target_backends=["llvm-cpu"], output_file=target, extra_args=arguments
        )
    except CompilerToolError as exc:
        sys.stderr.write(str(exc))
        raise _refusal(str(exc), imported.decode(errors="replace"), network) from exc


def _linker() -> str:
    """IREE's linker by a name that a shell takes as one word, wherever the toolchain lies."""
    name = "./iree-lld"
    if not os.path.lexists(name):
        os.symlink(find_tool("iree-lld"), name)
    return name


def _refusal(text: str, imported: str, network: str) -> job.Refused:
    """iree-compile's diagnostic as a sentence that names operator and node; it speaks of lines of the imported network."""
    lines = imported.splitlines()
    for number in re.findall(r'(?:loc\("[^"]*":|<stdin>:|^-:)(\d+):\d+', text, re.M):
        operator = re.search(
            r'torch\.operator "onnx\.(\w+)"', lines[int(number) - 1] if int(number) <= len(lines) else ""
        )
        if operator is None:
            continue
        before = sum(f'"onnx.{operator[1]}"' in line for line in lines[: int(number) - 1])
        nodes = [node for node in onnx.load(network).graph.node if node.op_type == operator[1]]
        where = f" (node {nodes[before].name or nodes[before].output[0]!r})" if before < len(nodes) else ""
        return job.Refused("bad_model", f"iree has no operator {operator[1]}{where} for these types and shapes")
    reason = re.search(r"error: (.+)", text)
    return job.Refused("bad_model", f"iree can't compile this network: {reason[1][:400] if reason else 'see the log'}")


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(functools.partial(load, r), r, p)})
