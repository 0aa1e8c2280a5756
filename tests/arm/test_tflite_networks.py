"""Networks of many kinds in int8, by our converter, in each interpreter on Arm: they load, and answer as float onnxruntime does here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import edgefleet_controller.compile
import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.toolchains import Toolchains
from safetensors.numpy import save_file
from support.arm import TOOLCHAINS, Board
from support.engines import onnx_answers
from support.networks import Net
from support.tflite_networks import NETWORKS

SUPPORT = Path(__file__).resolve().parents[1] / "support"
LOWEST = 0.95  # cosine with float, as for the same networks in LiteRT on this host (tests/integration/test_tflite_networks.py)


class Quantized:
    """Every network of the collection as int8 .tflite beside inputs that it was not calibrated on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, dict[str, onnx.ModelProto]()
        samples = np.random.default_rng(0).normal(size=(12, 3, 32, 32)).astype(np.float32)
        self.held_out = samples[1::4]
        for build in NETWORKS:
            net = Net(7)
            self.models[build.__name__] = net.model(build(net), opset=14)
        for name, model in self.models.items():
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
            save_file({"image": samples[::2]}, folder / f"{name}.safetensors")
            np.save(folder / f"{name}.npy", self.held_out)
        package = str(Path(edgefleet_controller.compile.__file__).parent)
        python = Toolchains(TOOLCHAINS).ensure("tflite").python
        done = subprocess.run(
            [python, "-I", str(SUPPORT / "quantize_tflite.py"), package, str(folder)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return Quantized(tmp_path_factory.mktemp("quantized"))


def test_int8_networks_load_and_answer_like_float_in_the_interpreters_on_arm(
    board: Board, quantized: Quantized
) -> None:
    if board.kind.engine != "tflite":
        pytest.skip(f"{board.kind.engine} reads no .tflite")
    with board.userland.folder() as (here, inside):
        for name in quantized.models:
            for suffix in ("tflite", "npy"):
                shutil.copy(quantized.folder / f"{name}.{suffix}", here)
        shutil.copy(SUPPORT / "run_tflite.py", here)
        ran = board.userland.run("python3", f"{inside}/run_tflite.py", inside)
        assert ran.returncode == 0, ran.stderr[-2000:]
        ends = dict(line.split() for line in ran.stdout.splitlines() if line.count(" ") == 1)
        assert ends == dict.fromkeys(sorted(quantized.models), "0"), ran.stderr[-2000:]
        lowest = {}
        for name, model in quantized.models.items():
            answers = np.load(here / f"{name}.answers.npy").astype(float)
            wanted = [onnx_answers(model, {"image": one[None]}) for one in quantized.held_out]
            flat = np.stack([np.concatenate([w[key].ravel() for key in w]) for w in wanted]).astype(float)
            both = np.linalg.norm(answers, axis=1) * np.linalg.norm(flat, axis=1)
            lowest[name] = round(float((np.sum(answers * flat, axis=1) / both).min()), 4)
    print(f"lowest cosine with float: {lowest}")
    assert {name: value for name, value in lowest.items() if value < LOWEST} == {}
