"""Stage 2, compile: Coral's Edge TPU. Has Google's compiler map an int8 .tflite onto the chip.

The .tflite is the TFLite target's own (:mod:`.litert`); as it was before mapping it stands in here, where LiteRT computes the same integers
on the CPU. Source: Coral's documentation of ``edgetpu_compiler`` 16 (options, and the operation log that it prints).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from typing import Any

from . import job, litert, vendor
from .measure import measure

PROGRAM = "edgetpu_compiler"
MIN_RUNTIME = 13  # of libedgetpu that the file needs: what every release since 2020 has
LIMIT_S = 600  # the compiler's own, for one of its subprocesses


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: as :func:`.litert.compile_model`, each job with ``stand_in``."""
    plain = [one | {"compiled": one["stand_in"]} for one in request["jobs"]]
    litert.compile_model(request | {"jobs": plain}, progress)
    for number, one in enumerate(request["jobs"]):
        if one["recipe"]["precision"] != "int8":  # only asked for as what int8 is held against; the chip has no float
            shutil.copyfile(one["stand_in"], one["compiled"])
            continue
        progress("mapping onto the Edge TPU", number, len(request["jobs"]))
        _mapped(one["stand_in"], one["compiled"])
    progress("mapping onto the Edge TPU", len(request["jobs"]), len(request["jobs"]))
    return {}


def _mapped(source: str, target: str) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        shutil.copyfile(source, os.path.join(folder, "model.tflite"))
        code, said = vendor.call(
            [PROGRAM, "-s", "-m", str(MIN_RUNTIME), "-t", str(LIMIT_S), "-o", ".", "model.tflite"], folder
        )
        made = os.path.join(folder, "model_edgetpu.tflite")
        if code != 0:
            raise _refusal(code, said)
        if not os.path.exists(made):
            raise job.Refused("toolchain_failed", f"{PROGRAM} ended well, but wrote no file")
        mapped = re.search(r"operations that will run on Edge TPU: (\d+)", said)
        if mapped is None:
            raise job.Refused("toolchain_failed", f"{PROGRAM} does not tell how much it mapped; is it version 16?")
        if mapped[1] == "0":
            raise job.Refused("bad_model", f"none of the network's operators runs on the Edge TPU{_left(said)}")
        shutil.move(made, target)


def _left(said: str) -> str:
    """Operators that stay on the CPU, each with the compiler's reason."""
    rows = re.findall(r"^([A-Z][A-Z0-9_]+)\s+(\d+)\s+(.+?)\s*$", said, re.M)
    told = [f"{name} x {count}: {status}" for name, count, status in rows if status != "Mapped to Edge TPU"]
    return f" ({'; '.join(told)})" if told else ""


def _refusal(code: int, said: str) -> job.Refused:
    for words in ("Model not quantized", "Invalid model", "Internal compiler error"):
        if words in said:
            return job.Refused("bad_model", f"{PROGRAM} refuses the network: {words}{_left(said)}")
    return vendor.failed(PROGRAM, code, said)


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(litert.load, r, p)})
