"""Run in a userland for Arm: answers of every .tflite of a folder, by whichever interpreter is installed.

Argument: a folder with ``NAME.tflite`` beside ``NAME.npy`` (inputs, first axis N). Writes ``NAME.answers.npy``; each network has a process
of its own, because older kernels end the process over what they can't do. Prints one line per network: its name and how it ended.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np


def interpreter() -> type:
    for name in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        try:
            return importlib.import_module(name).Interpreter
        except ImportError:
            continue
    raise SystemExit("no interpreter is installed")


def answers(kind: type, path: Path) -> np.ndarray:
    made = kind(model_path=str(path), num_threads=1)
    made.allocate_tensors()
    (given,), found = made.get_input_details(), []
    for one in np.load(path.with_suffix(".npy")):
        made.set_tensor(given["index"], one[None])
        made.invoke()
        found.append(np.concatenate([made.get_tensor(o["index"]).ravel() for o in made.get_output_details()]))
    return np.stack(found)


def main(folder: Path) -> None:
    kind = interpreter()
    for path in sorted(folder.glob("*.tflite")):
        pid = os.fork()
        if pid == 0:
            np.save(path.with_suffix(".answers.npy"), answers(kind, path))
            os._exit(0)
        print(path.stem, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
