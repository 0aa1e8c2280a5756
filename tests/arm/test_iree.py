"""IREE's module for 64-bit Arm: compiled here, run there, its answers held against onnxruntime's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import edgefleet_controller.compile
import numpy as np
import onnxruntime
import pytest
from edgefleet_controller.compile.toolchains import Toolchains
from support.arm import TOOLCHAINS
from support.networks import classifier
from support.userland import ARM64, Userland, UserlandMissing

LOCK = Path(edgefleet_controller.compile.__file__).parent / "locks" / "iree.txt"
SUPPORT = Path(__file__).resolve().parents[1] / "support"


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row with its like."""
    return np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def test_a_module_for_64_bit_arm_answers_there_as_onnxruntime_does_here(tmp_path: Path) -> None:
    try:
        userland = Userland(ARM64, LOCK, only=frozenset({"iree-base-runtime", "ml-dtypes", "numpy"}))
    except UserlandMissing as exc:
        pytest.skip(str(exc))
    network = classifier()
    (tmp_path / "net.onnx").write_bytes(network.SerializeToString())
    python = Toolchains(TOOLCHAINS).ensure("iree").python
    done = subprocess.run(
        [python, "-I", str(SUPPORT / "compile_iree.py"), str(tmp_path / "net.onnx"), str(tmp_path / "net.vmfb")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    inputs = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    with userland.folder() as (here, inside):
        for file in (tmp_path / "net.vmfb", tmp_path / "inputs.npy", SUPPORT / "run_iree.py"):
            shutil.copy(file, here)
        names = [f"{inside}/{name}" for name in ("run_iree.py", "net.vmfb", "inputs.npy", "answers.npy")]
        ran = userland.run("python3", *names)
        assert ran.returncode == 0, ran.stderr[-2000:]
        answers = np.load(here / "answers.npy")
    assert ran.stdout.split() == ["aarch64"]
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    wanted = np.concatenate([session.run(None, {"image": one[None]})[0] for one in inputs])
    print(f"cosine with onnxruntime {cosines(answers, wanted).min():.6f}")
    assert cosines(answers, wanted).min() > 0.99999
    assert cosines(answers[::-1], wanted).min() < 0.999, "other pictures have other answers"
