"""Run by the iree toolchain's Python: compiles an ONNX file for 64-bit Arm. Arguments: the network, the module to write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from iree.compiler.tools import compile_file

OPTIONS = ["--iree-llvmcpu-target-triple=aarch64-linux-gnu", "--iree-llvmcpu-target-cpu=generic"]


def main(network: Path, module: Path) -> None:
    imported = module.with_suffix(".mlir")
    subprocess.run(
        [sys.executable, "-m", "iree.compiler.tools.import_onnx", str(network), "-o", str(imported)], check=True
    )
    compile_file(str(imported), output_file=str(module), target_backends=["llvm-cpu"], extra_args=OPTIONS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
